"""Load a base in NF4, one module at a time, through a cache on disk.

    published tensors --one at a time--> NF4 --> cache/<hash of the base>/part-000.safetensors ...
                                                  |  later loads start here
    empty model  <--- memory-mapped codes --------+
                 <--- published tensors of everything else, in the compute dtype

The model is built without weights, so that it is never allocated in 16 bits. Codes are mapped and
not read: modules that are not in use take no memory. Weights are quantized from the published
precision for every compute dtype, so that one cache serves all.
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
from afina.models.bnb_format import from_files, quantized_paths, tied_names
from afina.models.nf4 import (
    PARTS,
    SKIP,
    LayerQuantization,
    NF4Linear,
    as_matrix,
    print_quantization,
    quantizable_experts,
    quantizable_modules,
    quantize_model,
    quantize_model_experts,
    quantize_module,
    set_module,
)
from afina.models.parameters import describe_unquantized

CACHE_FORMAT = 1  # a cache with another number is replaced
SHARD_BYTES = 32 * 2**20  # of a file of the cache, and of quantized tensors in memory meanwhile

Locations = dict[str, tuple[Path, list[int]]]  # name of a published tensor: its file and shape
Tensors = dict[str, Tensor]


def cache_root() -> Path:
    """Return $AFINA_CACHE/nf4, or ~/.cache/afina/nf4."""
    return (
        Path(os.environ.get("AFINA_CACHE") or Path.home() / ".cache" / "afina").expanduser() / "nf4"
    )


class _NoWeights(TorchFunctionMode):
    """Allocates no memory for torch.empty, as of weights; computed tensors (masks) are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _locations(files: list[Path]) -> Locations:
    """Return file and shape of each tensor in `files`."""
    return {
        name: (file, list(entry.shape))
        for file in files
        for name, entry in read_header(file).items()
    }


@torch.no_grad()
def load_nf4(
    folder: Path,
    files: list[Path],
    config: PretrainedConfig,
    digest: str,
    options: dict[str, Any],
    load_complete: Callable[[], PreTrainedModel],
    skip: Collection[str] = SKIP,
    report_module: Callable[[LayerQuantization], None] = print_quantization,
) -> tuple[PreTrainedModel, list[LayerQuantization]]:
    """Return the causal language model in `folder` with its layers in NF4, and their errors.

    Families whose files have other tensor names than the model (fused experts), that cannot be
    built without weights, or that keep modules in float32 are loaded complete, and not cached.

    Args:
        folder: The model's folder.
        files: Its weight files; `digest` is the hash of their tensors.
        config: Its configuration.
        options: Further arguments of transformers.
        load_complete: Loads the model without quantization.
        skip: Names of modules that are not quantized.
        report_module: Called with the error of each module.

    Raises:
        BaseError: a module cannot be quantized, or the files are damaged.
    """
    locations = _locations(files)
    try:
        with _NoWeights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
        why = _mismatch(model, locations)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        NotImplementedError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        why = f"it cannot be built without weights: {reason}"
    if why:
        return _quantize_complete(load_complete(), why, skip, report_module)
    tensors, report = _quantized(model, locations, cache_root() / digest, skip, report_module)
    modules = quantizable_modules(model, skip)
    widths = {path: as_matrix(module, module.weight).shape[1] for path, module in modules.items()}
    _fill(
        model,
        locations,
        {
            p: NF4Weight(**{n: tensors[f"{p}.{n}"] for n in PARTS}, in_features=w)
            for p, w in widths.items()
        },
    )
    report += quantize_model_experts(model, skip, report_module)  # once they are loaded
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), report


def _quantize_complete(
    model: PreTrainedModel,
    why: str,
    skip: Collection[str],
    report_module: Callable[[LayerQuantization], None],
) -> tuple[PreTrainedModel, list[LayerQuantization]]:
    """Quantize a loaded model, and print why it was not read one module at a time."""
    print(f"nf4  the entire model was loaded before quantization: {why}", file=sys.stderr)
    quantized = [*quantizable_modules(model, skip), *quantizable_experts(model, skip)]
    print(f"nf4  {describe_unquantized(model, quantized)}", file=sys.stderr)
    return model, quantize_model(model, skip, report_module)


@torch.no_grad()
def read_nf4(
    folder: Path, files: list[Path], config: PretrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """Return a causal language model whose files have NF4 codes.

    Raises:
        BaseError: a tensor is missing, unknown, or of another kind.
    """
    locations = _locations(files)
    unquantized = copy.deepcopy(config)
    del unquantized.quantization_config
    with _NoWeights():
        model = AutoModelForCausalLM.from_config(unquantized, **options)
    paths = quantized_paths(locations)
    parts = {
        path: {n: _read(locations, n) for n in locations if n.startswith(f"{path}.weight")}
        for path in paths
    }
    missing = (
        model.state_dict().keys()
        - tied_names(model)
        - {f"{path}.weight" for path in paths}
        - locations.keys()
    )
    unknown = [path for path in paths if f"{path}.weight" not in model.state_dict()]
    if missing or unknown:
        why = f"the first: {min([*missing, *unknown])}"
        raise BaseError("the weights do not fit config.json", where=str(folder), why=why)
    _fill(model, locations, {path: from_files(path, tensors) for path, tensors in parts.items()})
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _mismatch(model: PreTrainedModel, locations: Locations) -> str | None:
    """Return why the published tensors are not those of `model`; None if they are."""
    stored = {name: shape for name, (_, shape) in locations.items()}
    state = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name: shape for name, shape in state.items() if name not in tied_names(model)}
    if stored != wanted:
        names = sorted(stored.keys() ^ wanted.keys()) or sorted(
            n for n in wanted if stored[n] != wanted[n]
        )
        count = pluralize(len(names), "tensor")
        return f"its files and the model differ in {count}, such as {names[0]}"
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


def _read(locations: Locations, name: str) -> Tensor:
    """Return a published tensor, mapped; its file is opened for it only, which frees used pages."""
    with safe_open(locations[name][0], framework="pt") as file:
        return file.get_tensor(name)


def _layers(
    model: nn.Module,
    locations: Locations,
    skip: Collection[str],
    report_module: Callable[[LayerQuantization], None],
) -> Iterator[tuple[Tensors, LayerQuantization]]:
    """Yield the stored tensors of each module in NF4, by name, and its error."""
    for path, module in quantizable_modules(model, skip).items():
        weight, error = quantize_module(path, as_matrix(module, _read(locations, f"{path}.weight")))
        report_module(error)
        yield {f"{path}.{part}": getattr(weight, part) for part in PARTS}, error


def _quantized(
    model: nn.Module,
    locations: Locations,
    cache: Path,
    skip: Collection[str],
    report_module: Callable[[LayerQuantization], None],
) -> tuple[Tensors, list[LayerQuantization]]:
    """Return all modules in NF4 from the cache, which is written if needed, else from memory."""
    paths = list(quantizable_modules(model, skip))
    if found := _open(cache, paths):
        return found
    if cache.exists():
        print(
            f"nf4  cache replaced, damaged or of other modules: {cache}",
            file=sys.stderr,
        )
    quantized = [*paths, *quantizable_experts(model, skip)]
    print(f"nf4  {describe_unquantized(model, quantized)}", file=sys.stderr)
    why = "the written cache cannot be read"
    try:
        _write(cache, _layers(model, locations, skip, report_module))
    except BaseError:  # a module that cannot be quantized
        raise
    except (AfinaError, OSError) as error:  # no disk space, or another process was faster
        why = str(error).splitlines()[0]
    if found := _open(cache, paths):
        return found
    print(f"nf4  in memory, not in the cache: {why}", file=sys.stderr)
    layers = list(_layers(model, locations, skip, report_module))
    tensors = {name: tensor for own, _ in layers for name, tensor in own.items()}
    return tensors, [report for _, report in layers]


def _write(cache: Path, layers: Iterator[tuple[Tensors, LayerQuantization]]) -> None:
    """Write the folder `cache`, which appears when it is complete."""
    report: list[LayerQuantization] = []
    parts: list[Path] = []
    shard: Tensors = {}
    with atomic_directory(cache) as folder:

        def flush() -> None:
            parts.append(folder / f"part-{len(parts):03}.safetensors")
            save_file(shard, parts[-1])
            shard.clear()

        for tensors, error in layers:
            report.append(error)
            shard |= tensors
            if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
                flush()
        if shard:
            flush()
        about = {
            "format": CACHE_FORMAT,
            "hash": hash_tensor_files(parts),
            "layers": [asdict(error) for error in report],
        }
        write_json(folder / "about.json", about)


def _open(cache: Path, paths: list[str]) -> tuple[Tensors, list[LayerQuantization]] | None:
    """Return the cache's mapped tensors and errors; None if missing, damaged or outdated."""
    try:
        about = json.loads((cache / "about.json").read_text())
        report = [
            LayerQuantization(**{**layer, "shape": tuple(layer["shape"])})
            for layer in about["layers"]
        ]
        parts = sorted(cache.glob("part-*.safetensors"))
        if (
            about["format"] != CACHE_FORMAT
            or [error.path for error in report] != paths
            or hash_tensor_files(parts) != about["hash"]
        ):
            return None
        tensors: Tensors = {}
        for part in parts:
            with safe_open(part, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:  # a damaged cache is written again
        return None
    return tensors, report


def _fill(model: PreTrainedModel, locations: Locations, weights: Mapping[str, NF4Weight]) -> None:
    """Fill an empty model: NF4 modules from `weights`, all else from the published files."""
    rest = model.state_dict().keys() - tied_names(model) - {f"{path}.weight" for path in weights}
    for path, weight in weights.items():
        module: Any = model.get_submodule(path)
        set_module(model, path, NF4Linear.in_place_of(module, weight))
    for name in sorted(rest):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        before = getattr(owner, child)
        value = torch.empty(before.shape, dtype=before.dtype).copy_(_read(locations, name))
        setattr(
            owner,
            child,
            nn.Parameter(value, requires_grad=False) if isinstance(before, nn.Parameter) else value,
        )
    model.tie_weights()  # type: ignore[operator]
