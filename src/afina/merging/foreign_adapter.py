"""Adapters of mlx-lm and llama.cpp as PEFT folders, which all of afina reads.

    adapters.safetensors of mlx-lm    A (in, r), B (r, out), one scale
    a GGUF adapter                    A (r, in), B (out, r) in llama.cpp's order, scale alpha / r

The scale is in B: alpha is the rank of each module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from afina.errors import AdapterError, AfinaError
from afina.io.adapter_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from afina.io.atomic import write_json
from afina.io.strict_json import read_json_object
from afina.merging.gguf_architecture import gguf_architecture, library
from afina.merging.mlx_adapter import WEIGHTS as MLX_WEIGHTS
from afina.models.loading import load_config, resolve_model_dir
from afina.settings import ExportSettings


@dataclass(frozen=True)
class ModuleFactors:
    """The update of one module: B A, and the magnitudes of DoRA."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r), with the scale
    m: Tensor | None = None  # (out,)


@contextmanager
def peft_folder(settings: ExportSettings) -> Iterator[Path | None]:
    """Yield the adapter of the settings; one of mlx-lm or llama.cpp as a temporary PEFT folder.

    Raises:
        AdapterError: It is more than low-rank updates, damaged, or does not record its base.
    """
    given = settings.adapter
    if given is None or not (is_mlx(given) or given.suffix == ".gguf"):
        yield given
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / given.stem
        folder.mkdir()
        try:
            modules, base = _read_mlx(given) if is_mlx(given) else _read_gguf(given, settings)
        except AfinaError:
            raise
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise AdapterError("cannot be read", where=str(given), why=str(error)) from None
        _write_peft(folder, modules, settings.base or base)
        yield folder


def is_mlx(path: Path) -> bool:
    """Return whether a folder has an adapter of mlx-lm."""
    return (path / MLX_WEIGHTS).is_file()


def _read_mlx(folder: Path) -> tuple[dict[str, ModuleFactors], str | None]:
    about = read_json_object(folder / CONFIG_FILE, error=AdapterError)
    kind = about.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        what = f"an adapter of mlx-lm of the kind {kind!r} has no low-rank updates"
        raise AdapterError(what, where=str(folder), hint="mlx_lm.fuse")
    scale = float(about["lora_parameters"]["scale"])
    tensors = load_file(folder / MLX_WEIGHTS)
    paths = sorted({name.rpartition(".")[0] for name in tensors})
    modules = {
        path: ModuleFactors(
            tensors[f"{path}.lora_a"].float().T,
            scale * tensors[f"{path}.lora_b"].float().T,
            tensors.get(f"{path}.m"),
        )
        for path in paths
    }
    return modules, about.get("model")


def _read_gguf(file: Path, settings: ExportSettings) -> tuple[dict[str, ModuleFactors], None]:
    gguf = library()
    reader = gguf.GGUFReader(file)
    values_by_key = {name: field.contents() for name, field in reader.fields.items()}
    if (values_by_key.get("general.type"), values_by_key.get("adapter.type")) != (
        "adapter",
        "lora",
    ):
        what = "this GGUF file has no LoRA"
        raise AdapterError(what, where=str(file), hint="a run or adapter folder")
    if settings.base is None:
        raise AdapterError(
            "a GGUF adapter does not record its base", where=str(file), hint="--base PATH"
        )
    config = load_config(
        resolve_model_dir(settings.base, settings.revision),
        settings.base,
        settings.trust_remote_code,
    )
    form = gguf_architecture(config, settings.base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    paths = {form.name(f"{path}.weight"): path for path, _ in model.named_modules()}
    values = {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        )
        for tensor in reader.tensors
    }
    modules: dict[str, ModuleFactors] = {}
    for name in sorted({name.rpartition(".")[0] for name in values}):
        if name not in paths:
            raise AdapterError(f"the base has no module for {name}", where=str(file))
        a, b = values[f"{name}.lora_a"], values[f"{name}.lora_b"]
        scale = (
            float(values_by_key["adapter.lora.alpha"]) / len(a) or 1.0
        )  # 0: llama.cpp does not scale
        path = paths[name]
        modules[path] = ModuleFactors(a, scale * form.restored(f"{path}.weight", b))
    return modules, None


def _write_peft(folder: Path, modules: dict[str, ModuleFactors], base: str | None) -> None:
    """Write factors as PEFT stores them."""
    tensors: dict[str, Tensor] = {}
    for path, one in modules.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = one.a.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = one.b.contiguous()
        if one.m is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = one.m.float().contiguous()
    ranks = {path: len(one.a) for path, one in modules.items()}
    rank = max(ranks.values())
    others = {path: own for path, own in ranks.items() if own != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": list(modules),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_dora": any(one.m is not None for one in modules.values()),
        "bias": "none",
    }
    save_file(tensors, folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, config)
