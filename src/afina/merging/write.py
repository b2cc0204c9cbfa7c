"""Write a LoRA adapter module by module from low-rank factors, with alpha equal to the rank.

So the scale is 1 at each module: scale and weights are in the factors, once. `rank_pattern` and
`alpha_pattern` record the modules that differ.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import afina
from afina.adapters.attach import frozen_module
from afina.adapters.lora import LoRA
from afina.adapters.target_module import TargetModule
from afina.errors import AdapterError
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from afina.io.adapter_metadata import FORMAT_VERSION, METADATA_FILE
from afina.io.atomic import atomic_directory, write_json
from afina.io.hashing import hash_adapter_file
from afina.io.peft_config import PEFT_METHODS, peft_config_json
from afina.merging.low_rank import LowRankUpdate
from afina.merging.sources import AdapterSource
from afina.merging.stream import open_tensor_writer
from afina.models.frozen import FrozenModel


@dataclass(frozen=True)
class PeftContext:
    """What PEFT's configuration records about the base: task type, weights stored as (in, out)."""

    task_type: str | None = None
    is_transposed: bool = False


@dataclass(frozen=True)
class LoRATensorLayout:
    """PEFT's names of the two factors of one module, and the kernel's shape of a convolution."""

    a: str = "lora_A.weight"
    b: str = "lora_B.weight"
    kernel: tuple[int, ...] = ()  # (in channels, height, width) of a convolution

    def tensors(self, path: str, low: LowRankUpdate) -> dict[str, Tensor]:
        """Return the two tensors on disk, float32: A (r, in) and B (out, r), by name."""
        a, b = low.a.float(), low.b.float()
        if self.kernel:
            a, b = a.view(-1, *self.kernel), b.view(*b.shape, *(1 for _ in self.kernel[1:]))
        return {f"{PREFIX}{path}.{self.a}": a, f"{PREFIX}{path}.{self.b}": b}


def tensor_layout(path: str, sources: Sequence[AdapterSource]) -> LoRATensorLayout:
    """Return the layout of a module: that of a LoRA among the sources, else of the base."""
    for source in sources:
        if source.base is None:
            names = {
                name.removeprefix(f"{PREFIX}{path}."): name
                for name in source.tensors_by_module[path]
            }
            a, b = sorted(names)
            shape = source.reader.entries[names[a]].shape
            return LoRATensorLayout(a, b, tuple(shape[1:]) if len(shape) > 2 else ())
    return layout_of_module(sources[0].layer(path))


def layout_of_module(layer: TargetModule) -> LoRATensorLayout:
    """Return the layout of a LoRA on a module of the base."""
    names, sizes = LoRA.names_on_disk(layer), layer.sizes(rank=1)
    kernel = (sizes.channels, *sizes.kernel) if sizes.kernel else ()
    return LoRATensorLayout(names["a"], names["b"], kernel)


def write_lora(
    out: Path,
    layers: Iterable[tuple[str, LowRankUpdate, LoRATensorLayout]],
    paths: Sequence[str],
    context: PeftContext,
    base: Mapping[str, Any],
    metadata: Mapping[str, Any],
    invocation: tuple[int, ...] = (),
) -> tuple[str, AdapterConfig]:
    """Write a LoRA adapter to `out`, completely or not at all.

    Args:
        out: The folder.
        layers: Path, factors and layout of each module.
        paths: All paths that `layers` may have; space for their header is reserved.
        context: Task type and storage order, as a parent or the base has them.
        base: The base, as afina.json records it.
        metadata: Further keys of afina.json.
        invocation: Token ids of an activated LoRA.

    Returns:
        The adapter's hash and configuration.

    Raises:
        AdapterError: a factor is not finite.
    """
    with atomic_directory(out) as folder:
        ranks = _write_tensors(folder / WEIGHTS_FILE, layers, paths)
        config = _config_of_ranks(ranks, invocation)
        digest = hash_adapter_file(folder / WEIGHTS_FILE, config.canonical())
        config_json = peft_config_json(
            config,
            PEFT_METHODS["lora"],
            target_modules=config.target_modules,
            task_type=context.task_type,
            base=base.get("name"),
            revision=base.get("revision"),
            is_transposed=context.is_transposed,
        )
        write_json(folder / CONFIG_FILE, config_json)
        about = {
            "format_version": FORMAT_VERSION,
            "afina": afina.__version__,
            "hash": digest,
            "spec": config.canonical(),
        }
        write_json(folder / METADATA_FILE, about | {"base": dict(base)} | dict(metadata))
    return digest, config


def _write_tensors(
    file: Path,
    layers: Iterable[tuple[str, LowRankUpdate, LoRATensorLayout]],
    paths: Sequence[str],
) -> dict[str, int]:
    """Write the factors of each module as they come; return the ranks by path."""
    names = [f"{PREFIX}{path}.lora_embedding_A" for path in paths for _ in range(2)]
    ranks: dict[str, int] = {}
    with open_tensor_writer(file, names) as writer:
        for path, low, layout in layers:
            for name, tensor in layout.tensors(path, low).items():
                if not bool(torch.isfinite(tensor).all()):
                    raise AdapterError("an element of the combination is not finite", where=name)
                writer.add(name, tensor)
            ranks[path] = low.rank
    return ranks


def _config_of_ranks(ranks: Mapping[str, int], invocation: tuple[int, ...]) -> AdapterConfig:
    """Return the configuration of a LoRA with these ranks, and alpha equal to the rank."""
    most_common = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != most_common}
    return AdapterConfig(
        "lora",
        tuple(ranks),
        most_common,
        float(most_common),
        rank_pattern=others,
        alpha_pattern={path: float(rank) for path, rank in others.items()},
        invocation=invocation,
    )


def parent_config(sources: Sequence[AdapterSource]) -> PeftContext:
    """Return what PEFT's configuration of a parent records about the base, else the base's own."""
    for source in sources:
        peft = source.folder.peft
        if peft.is_lora:
            return PeftContext(peft.task_type, peft.fan_in_fan_out)
    base = sources[0].base
    assert base is not None
    return base_config(base, sources[0].config.target_modules)


def base_config(base: FrozenModel, paths: Sequence[str]) -> PeftContext:
    """Return the task type of a base, and whether its weights are stored transposed."""
    is_transposed = any(
        type(frozen_module(base.model, path)).__name__ == "Conv1D" for path in paths
    )
    task = "CAUSAL_LM" if hasattr(base.model, "prepare_inputs_for_generation") else None
    return PeftContext(task, is_transposed)
