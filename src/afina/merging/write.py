"""A lora adapter written layer by layer from thin factors: alpha equals the rank everywhere, so that its scale is 1.

The scale and the weights are in the factors, once; `rank_pattern` and `alpha_pattern` tell PEFT of layers that differ.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import afina
from afina.adapters.attach import frozen_module
from afina.adapters.base import AdapterConfig
from afina.adapters.loading import (
    CONFIG,
    FORMAT_VERSION,
    METADATA_FILE,
    PREFIX,
    WEIGHTS,
    hash_adapter_file,
    read_json_object,
)
from afina.adapters.lora import LoRA
from afina.adapters.target_module import TargetModule
from afina.errors import AdapterError
from afina.io.atomic import atomic_directory, write_json
from afina.merging.low_rank import LowRankUpdate
from afina.merging.sources import AdapterSource
from afina.merging.stream import writing
from afina.models.frozen import FrozenModel


@dataclass(frozen=True)
class LoRATensorLayout:
    """How PEFT keeps the factors of one layer: names after its path, and the shapes of a kernel behind (r, in)."""

    a: str = "lora_A.weight"
    b: str = "lora_B.weight"
    kernel: tuple[int, ...] = ()  # (in channels, height, width) of a convolution

    def tensors(self, path: str, low: LowRankUpdate) -> dict[str, Tensor]:
        """The two tensors on disk, float32."""
        a, b = low.a.float(), low.b.float()
        if self.kernel:
            a, b = a.view(-1, *self.kernel), b.view(*b.shape, *(1 for _ in self.kernel[1:]))
        return {f"{PREFIX}{path}.{self.a}": a, f"{PREFIX}{path}.{self.b}": b}


def tensor_layout(path: str, sources: Sequence[AdapterSource]) -> LoRATensorLayout:
    """The form at a layer: as a lora among the sources has it, else as the base's layer asks for."""
    for source in sources:
        if source.base is None:
            names = {
                name.removeprefix(f"{PREFIX}{path}."): name
                for name in source.tensors_by_module[path]
            }
            a, b = sorted(names)
            shape = source.reader.entries[names[a]]["shape"]
            return LoRATensorLayout(a, b, tuple(shape[1:]) if len(shape) > 2 else ())
    return form_of_layer(sources[0].layer(path))


def form_of_layer(layer: TargetModule) -> LoRATensorLayout:
    """The form that a layer of the base asks for."""
    names, sizes = LoRA.names_on_disk(layer), layer.sizes(rank=1)
    kernel = (sizes.channels, *sizes.kernel) if sizes.kernel else ()
    return LoRATensorLayout(names["a"], names["b"], kernel)


def write_lora(
    out: Path,
    layers: Iterable[tuple[str, LowRankUpdate, LoRATensorLayout]],
    paths: Sequence[str],
    config: Mapping[str, Any],
    base: Mapping[str, Any],
    story: Mapping[str, Any],
    invocation: tuple[int, ...] = (),
) -> tuple[str, AdapterConfig]:
    """Write a lora adapter of these layers to `out`, whole or not at all; returns its hash and spec.

    `paths` are all that may come; `config` is a parent's PEFT configuration, for what does not change. Raises
    `AdapterError` where a factor is not finite.
    """
    names = [f"{PREFIX}{path}.lora_embedding_A" for path in paths for _ in range(2)]
    ranks: dict[str, int] = {}
    with atomic_directory(out) as folder:
        with writing(folder / WEIGHTS, names) as writer:
            for path, low, form in layers:
                for name, tensor in form.tensors(path, low).items():
                    if not bool(torch.isfinite(tensor).all()):
                        raise AdapterError(
                            "a number of the combination is not finite",
                            where=name,
                            hint="look at its parts",
                        )
                    writer.add(name, tensor)
                ranks[path] = low.rank
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {path: rank for path, rank in ranks.items() if rank != usual}
        alphas = {path: float(rank) for path, rank in others.items()}
        spec = AdapterConfig(
            "lora",
            tuple(ranks),
            usual,
            float(usual),
            rank_pattern=others,
            alpha_pattern=alphas,
            invocation=invocation,
        )
        digest = hash_adapter_file(folder / WEIGHTS, spec.canonical())
        write_json(folder / CONFIG, peft_config(spec, config, base))
        about = {
            "format_version": FORMAT_VERSION,
            "afina": afina.__version__,
            "hash": digest,
            "spec": spec.canonical(),
        }
        write_json(folder / METADATA_FILE, about | {"base": dict(base)} | dict(story))
    return digest, spec


def peft_config(
    spec: AdapterConfig, parent: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
    """adapter_config.json for PEFT; what depends on the base's kind (task, stored transposed) is as the parent has it."""
    return {
        "peft_type": "LORA",
        "task_type": parent.get("task_type"),
        "base_model_name_or_path": base.get("name"),
        "revision": base.get("revision"),
        "target_modules": list(spec.target_modules),
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {re.escape(path): rank for path, rank in spec.rank_pattern.items()},
        "alpha_pattern": {re.escape(path): alpha for path, alpha in spec.alpha_pattern.items()},
        "bias": "none",
        "fan_in_fan_out": parent.get("fan_in_fan_out", False),
        "alora_invocation_tokens": list(spec.invocation) or None,
        "init_lora_weights": True,
    }


def parent_config(sources: Sequence[AdapterSource]) -> dict[str, Any]:
    """A parent's PEFT configuration: the first that PEFT knows, else what the base says."""
    for source in sources:
        config = read_json_object(source.part.folder / CONFIG)
        if config.get("peft_type") == "LORA":
            return config
    base = sources[0].base
    assert base is not None
    return base_config(base, sources[0].config.target_modules)


def base_config(base: FrozenModel, paths: Sequence[str]) -> dict[str, Any]:
    """What a configuration says about the base: the task, and whether the weights lie transposed."""
    transposed = any(type(frozen_module(base.model, path)).__name__ == "Conv1D" for path in paths)
    task = "CAUSAL_LM" if hasattr(base.model, "prepare_inputs_for_generation") else None
    return {"task_type": task, "fan_in_fan_out": transposed}
