"""A LoRA or DoRA as mlx-lm stores it, for Macs.

    adapters.safetensors    PATH.lora_a (in, r), PATH.lora_b (r, out), of DoRA PATH.m (out)
    adapter_config.json     fine_tune_type, num_layers, lora_parameters: keys, rank, scale

    y = W x + scale * B A x, with one scale and one rank for all modules

The scale is that of the first module, and B of the others has what they differ by; lower ranks are
filled up with zeros.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from afina.io.adapter_folder import PREFIX
from afina.io.atomic import atomic_directory, write_json
from afina.merging.exported_source import (
    AdapterTarget,
    ExportedSource,
    cannot_write,
    not_low_rank,
    open_exported,
)
from afina.merging.results import ExportResult
from afina.settings import ExportSettings

MERGED = "--format hf writes base and adapter as one model, which mlx-lm loads"
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
TARGET = AdapterTarget("mlx-lm", "an MLX adapter", "mlx", ("lora", "dora"), MERGED)
# families whose modules have the same names in mlx-lm
FAMILIES = (
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
)


def export_mlx(settings: ExportSettings, out: Path) -> ExportResult:
    """Write a LoRA or DoRA to the folder `out`; return its scale and the number of its modules.

    Raises:
        AdapterError, MergeError: mlx-lm would compute something else.
    """
    opened = open_exported(settings, TARGET)
    _check(opened)
    config = opened.source.config
    paths = config.target_modules
    rank = max(map(config.rank_of, paths))
    scale = config.scale_of(paths[0]) or 1.0
    tensors: dict[str, Tensor] = {}
    for path in paths:
        a, b, m = _factors(opened, path)
        missing = rank - len(a)
        b = b.double() * (config.scale_of(path) / scale)
        tensors[f"{path}.lora_a"] = F.pad(a.float(), (0, 0, 0, missing)).T.contiguous()
        tensors[f"{path}.lora_b"] = F.pad(b.float(), (0, missing)).T.contiguous()
        if m is not None:
            tensors[f"{path}.m"] = m.float().contiguous()
    about: dict[str, Any] = {
        "fine_tune_type": config.method,
        "model": opened.base,
        "num_layers": opened.base_config.num_hidden_layers,
        "lora_parameters": {"keys": list(paths), "rank": rank, "scale": scale, "dropout": 0.0},
    }
    with atomic_directory(out) as folder:
        save_file(tensors, folder / WEIGHTS, {"afina.adapter": opened.source.hash})
        write_json(folder / CONFIG, about)
    return ExportResult(
        out=str(out),
        format="mlx",
        base=opened.base,
        adapter=opened.source.hash,
        layers=len(paths),
        alpha=scale * rank,
    )


def _check(opened: ExportedSource) -> None:
    """Raise where mlx-lm has no such module."""
    kind = opened.base_config.model_type
    if kind not in FAMILIES:
        why = f"its base is of the family {kind!r}; known are {', '.join(FAMILIES)}"
        raise cannot_write(opened.source, TARGET, why)
    for path in opened.source.config.target_modules:
        is_tied = path == "lm_head" and opened.base_config.tie_word_embeddings
        if path.endswith("embed_tokens") or is_tied:
            why = f"{path} is adapted, and mlx-lm supports no lora there on this base"
            raise cannot_write(opened.source, TARGET, why)


def _factors(opened: ExportedSource, path: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return A `(r, in)`, B `(out, r)` and magnitudes `(out,)`, which a LoRA lacks."""
    source = opened.source
    tensors = {
        name.removeprefix(f"{PREFIX}{path}."): source.reader[name]
        for name in source.tensors_by_module[path]
    }
    magnitude = next((value for name, value in tensors.items() if "magnitude" in name), None)
    factors = [value for name, value in sorted(tensors.items()) if "magnitude" not in name]
    if len(factors) != 2 or any(value.ndim != 2 for value in factors):
        raise not_low_rank(source, TARGET)
    a, b = factors
    return a, b, None if magnitude is None else magnitude.flatten().to(torch.float32)
