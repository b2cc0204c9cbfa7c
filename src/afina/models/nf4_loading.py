"""Load a base in four bits, one layer at a time, by way of a cache on disk.

    published tensors --one at a time--> NF4 --> cache/<hash of the base>/part-000.safetensors ... , about.json
                                                  |  later loads start here
    empty model  <--- memory-mapped codes --------+
                 <--- published tensors of everything else, in the compute dtype

The model is built without weights, so that the whole of it never exists in 16 bits. Codes are mapped, not read: pages
of layers that are not in use cost no memory. Weights are quantised from the published precision, whatever the compute
dtype, so that one cache serves all.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from afina.errors import AfinaError, BaseError, pluralize
from afina.io.atomic import atomic_directory, write_json
from afina.io.hashing import hash_tensor_files
from afina.io.safetensors import read_header
from afina.kernels.nf4 import NF4Weight
from afina.models.bnb_format import from_files, quantised_paths, tied_names
from afina.models.nf4 import (
    PARTS,
    SKIP,
    LayerQuantization,
    NF4Linear,
    as_matrix,
    print_quantization,
    quantizable_modules,
    quantize_model,
    quantize_module,
    set_module,
)

FORMAT = 1  # of the cache: another number makes it anew
SHARD = (
    32 * 2**20
)  # bytes of a file of the cache, and of quantised tensors in memory while it is written

Places = dict[str, tuple[Path, list[int]]]  # name of a published tensor -> its file and shape
Tensors = dict[str, Tensor]


def cache_root() -> Path:
    """$AFINA_CACHE/nf4, or ~/.cache/afina/nf4."""
    return (
        Path(os.environ.get("AFINA_CACHE") or Path.home() / ".cache" / "afina").expanduser() / "nf4"
    )


class _NoWeights(TorchFunctionMode):
    """Tensors made by torch.empty, as weights are, get no memory; computed ones (rotary frequencies, masks) are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@torch.no_grad()
def load_nf4(
    folder: Path,
    files: list[Path],
    config: PretrainedConfig,
    digest: str,
    options: dict[str, Any],
    whole: Callable[[], PreTrainedModel],
    skip: Collection[str] = SKIP,
    tell: Callable[[LayerQuantization], None] = print_quantization,
) -> tuple[PreTrainedModel, list[LayerQuantization]]:
    """The causal language model in `folder`, its blocks in NF4, and what quantising did to each layer.

    `digest` is the hash of the published tensors in `files`; `options` are transformers' (dtype, attn_implementation,
    trust_remote_code). Some families are loaded by `whole`, then quantised, and not cached: those whose files name
    their tensors otherwise than the model does (fused experts, files without the model's prefix), those that cannot
    be built without weights, and those that keep some modules in float32.
    """
    places = {
        name: (file, list(entry.shape))
        for file in files
        for name, entry in read_header(file).items()
    }
    try:
        with _NoWeights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
        why = _hindrance(model, places)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        NotImplementedError,
    ) as error:
        why = f"it cannot be built without weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if why:
        model = whole()
        print(f"nf4  the whole model was loaded before it is quantised: {why}", file=sys.stderr)
        return model, quantize_model(model, skip, tell)
    tensors, report = _quantised(model, places, cache_root() / digest, skip, tell)
    quantised = quantizable_modules(model, skip)
    widths = {path: as_matrix(module, module.weight).shape[1] for path, module in quantised.items()}
    _fill(
        model,
        places,
        {
            p: NF4Weight(**{n: tensors[f"{p}.{n}"] for n in PARTS}, in_features=w)
            for p, w in widths.items()
        },
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), report


@torch.no_grad()
def read_nf4(
    folder: Path, files: list[Path], config: PretrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """A causal language model whose files hold NF4 codes; raises `BaseError` where a tensor is missing or of another kind."""
    places = {
        name: (file, list(entry.shape))
        for file in files
        for name, entry in read_header(file).items()
    }
    plain = copy.deepcopy(config)
    del plain.quantization_config
    with _NoWeights():
        model = AutoModelForCausalLM.from_config(plain, **options)
    paths = quantised_paths(places)
    parts = {
        path: {n: _read(places, n) for n in places if n.startswith(f"{path}.weight")}
        for path in paths
    }
    missing = (
        model.state_dict().keys()
        - tied_names(model)
        - {f"{path}.weight" for path in paths}
        - places.keys()
    )
    unknown = [path for path in paths if f"{path}.weight" not in model.state_dict()]
    if missing or unknown:
        why = f"the first: {min([*missing, *unknown])}"
        raise BaseError("the weights do not fit config.json", where=str(folder), why=why)
    _fill(model, places, {path: from_files(path, tensors) for path, tensors in parts.items()})
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _hindrance(model: PreTrainedModel, places: Places) -> str | None:
    """Why the published tensors are not, one for one, those of `model`; None if they are."""
    stored = {name: shape for name, (_, shape) in places.items()}
    state = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name: shape for name, shape in state.items() if name not in tied_names(model)}
    if stored != wanted:
        names = sorted(stored.keys() ^ wanted.keys()) or sorted(
            n for n in wanted if stored[n] != wanted[n]
        )
        return f"its files and the model differ in {pluralize(len(names), 'tensor')}, such as {names[0]}"
    unfinished = [
        name for name, buffer in model.named_buffers() if buffer.is_meta and name not in wanted
    ]
    if unfinished:
        return f"{unfinished[0]} is computed from tensors without a value"
    return (
        "it keeps some modules in float32"
        if getattr(model, "_keep_in_fp32_modules_strict", None)
        else None
    )


def _read(places: Places, name: str) -> Tensor:
    """A published tensor, mapped; its file is opened for it alone, so that pages already used are given back."""
    with safe_open(places[name][0], framework="pt") as file:
        return file.get_tensor(name)


def _layers(
    model: nn.Module,
    places: Places,
    skip: Collection[str],
    tell: Callable[[LayerQuantization], None],
) -> Iterator[tuple[Tensors, LayerQuantization]]:
    """The stored tensors of each layer in NF4, by name, and what quantising did to it."""
    for path, module in quantizable_modules(model, skip).items():
        weight, done = quantize_module(path, as_matrix(module, _read(places, f"{path}.weight")))
        tell(done)
        yield {f"{path}.{part}": getattr(weight, part) for part in PARTS}, done


def _quantised(
    model: nn.Module,
    places: Places,
    cache: Path,
    skip: Collection[str],
    tell: Callable[[LayerQuantization], None],
) -> tuple[Tensors, list[LayerQuantization]]:
    """All layers in NF4: from the cache, which is made where it is missing or damaged; in memory where it cannot be."""
    paths = list(quantizable_modules(model, skip))
    if found := _open(cache, paths):
        return found
    if cache.exists():
        print(
            f"nf4  made anew, since it was damaged or for another choice of layers: {cache}",
            file=sys.stderr,
        )
    why = "what was written cannot be read back"
    try:
        _write(cache, _layers(model, places, skip, tell))
    except BaseError:  # a layer that cannot be quantised
        raise
    except (AfinaError, OSError) as error:  # no place on the disk, or another process was faster
        why = str(error).splitlines()[0]
    if found := _open(cache, paths):
        return found
    print(f"nf4  kept in memory, not in the cache: {why}", file=sys.stderr)
    done = list(_layers(model, places, skip, tell))
    return {name: tensor for tensors, _ in done for name, tensor in tensors.items()}, [
        report for _, report in done
    ]


def _write(cache: Path, layers: Iterator[tuple[Tensors, LayerQuantization]]) -> None:
    """Fill the folder `cache`, which appears when all is written."""
    report: list[LayerQuantization] = []
    parts: list[Path] = []
    shard: Tensors = {}
    with atomic_directory(cache) as folder:

        def flush() -> None:
            parts.append(folder / f"part-{len(parts):03}.safetensors")
            save_file(shard, parts[-1])
            shard.clear()

        for tensors, done in layers:
            report.append(done)
            shard |= tensors
            if sum(t.nbytes for t in shard.values()) >= SHARD:
                flush()
        if shard:
            flush()
        about = {
            "format": FORMAT,
            "hash": hash_tensor_files(parts),
            "layers": [asdict(done) for done in report],
        }
        write_json(folder / "about.json", about)


def _open(cache: Path, paths: list[str]) -> tuple[Tensors, list[LayerQuantization]] | None:
    """The cache's tensors, mapped, and its report; None where it is not there, not whole, or for other layers."""
    try:
        about = json.loads((cache / "about.json").read_text())
        report = [
            LayerQuantization(**{**layer, "shape": tuple(layer["shape"])})
            for layer in about["layers"]
        ]
        parts = sorted(cache.glob("part-*.safetensors"))
        if (
            about["format"] != FORMAT
            or [done.path for done in report] != paths
            or hash_tensor_files(parts) != about["hash"]
        ):
            return None
        tensors: Tensors = {}
        for part in parts:
            with safe_open(part, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:  # whatever is wrong with it, it can be made again
        return None
    return tensors, report


def _fill(model: PreTrainedModel, places: Places, weights: Mapping[str, NF4Weight]) -> None:
    """Give the empty model its weights: NF4 layers as in `weights`, all else from the published files."""
    rest = model.state_dict().keys() - tied_names(model) - {f"{path}.weight" for path in weights}
    for path, weight in weights.items():
        module: Any = model.get_submodule(path)
        set_module(model, path, NF4Linear.in_place_of(module, weight))
    for name in sorted(rest):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        before = getattr(owner, child)
        value = torch.empty(before.shape, dtype=before.dtype).copy_(_read(places, name))
        setattr(
            owner,
            child,
            nn.Parameter(value, requires_grad=False) if isinstance(before, nn.Parameter) else value,
        )
    model.tie_weights()  # type: ignore[operator]
