"""Adapters to be combined: their updates, one module at a time.

A lora's update is read from its file alone, whatever the size of the base. Updates that need the
base (dora's row norms, mora's shapes, trained weights) come from the adapter attached to it:
D = merged(W) - W in float64.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.adapters.attach import Adapter, frozen_module
from afina.adapters.load_run import load_run, recorded_format
from afina.adapters.loading import load_adapter
from afina.adapters.registry import get_method
from afina.adapters.target_module import TargetModule
from afina.errors import AdapterError, SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import PREFIX, AdapterFolder
from afina.io.adapter_metadata import read_metadata
from afina.io.chat_format import CHAT_KEY
from afina.io.composition import (
    WeightedAdapter,
    display_name,
    expand_composition,
    parse_weighted,
)
from afina.merging.low_rank import LowRankUpdate
from afina.merging.stream import TensorReader
from afina.models.encoder import EMBEDDING_KEY
from afina.models.frozen import FrozenModel
from afina.settings import ModelSettings


@dataclass
class AdapterSource:
    """One adapter to be combined: its files, its weight, and its update of each module."""

    part: WeightedAdapter
    folder: AdapterFolder
    config: AdapterConfig
    hash: str
    reader: TensorReader
    attached: Adapter | None = None
    base: FrozenModel | None = None
    _names: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def open(cls, part: WeightedAdapter) -> "AdapterSource":
        """Open an adapter; raise `AdapterError` where its files are damaged or were changed."""
        folder = AdapterFolder.open(part.folder)
        if folder.fused_experts:
            path = min(folder.fused_experts)
            raise AdapterError(
                "adapters of fused experts cannot be combined, extracted or written as GGUF",
                where=str(part.folder),
                why=f"{path} has one update per expert",
                hint="afina merge, or serve it as it is",
            )
        reader = TensorReader(folder.weights_file, entries=folder.entries)
        return cls(part, folder, folder.config(), folder.verified_hash(), reader)

    @property
    def weight(self) -> float:
        """Its weight in the combination."""
        return self.part.weight

    @property
    def name(self) -> str:
        """Its name in messages."""
        return display_name(self.part.folder)

    @cached_property
    def tensors_by_module(self) -> dict[str, list[str]]:
        """Names of its tensors on disk, by module: the longest target that is a prefix."""
        found: dict[str, list[str]] = {path: [] for path in self.config.target_modules}
        for name in self.reader.entries:
            path = name.removeprefix(PREFIX)
            while path and path not in found:
                path = path.rpartition(".")[0]
            if path:
                found[path].append(name)
        return found

    def low_rank_update(self, path: str) -> LowRankUpdate | None:
        """Return the update of a module as low-rank factors; None where it needs the base."""
        tensors = {name: self.reader[name] for name in self.tensors_by_module[path]}
        factors = _factors(tensors, self.config, path)
        return None if factors is None else LowRankUpdate(*factors)

    @cached_property
    def is_low_rank(self) -> bool:
        """Whether all of its updates are low-rank factors."""
        return (
            bool(self.config.target_modules)
            and self.low_rank_update(self.config.target_modules[0]) is not None
        )

    def layer(self, path: str) -> TargetModule:
        """Return the base's module; the base must be loaded."""
        assert self.base is not None
        return TargetModule(path, frozen_module(self.base.model, path))

    def dense_update(self, path: str) -> Tensor | None:
        """Return the update `(out, in)`, float64; None where the weight is no matrix."""
        if self.attached is None:
            low = self.low_rank_update(path)
            assert low is not None, "the base has to be loaded first"
            return low.dense()
        layer = self.layer(path)
        if not layer.is_matrix:
            return None
        dtype = torch.float32 if layer.device.type == "mps" else torch.float64  # mps has no float64
        weight = layer.weight.detach().to(dtype)
        return (self.attached.layers[path].merged_weight(weight).detach() - weight).double().cpu()

    def lineage_entry(self) -> dict[str, object]:
        """Return its entry among the parents in afina.json."""
        return {
            "name": self.name,
            "hash": self.hash,
            "weight": self.weight,
            "method": self.config.method,
        }


def open_sources(texts: Sequence[str | Path]) -> list[AdapterSource]:
    """Open the adapters named "FOLDER:weight"; a composition is opened as its parts.

    Raises:
        SettingsError: There is none, or one occurs twice.
        AdapterError: One is missing or damaged.
    """
    if not texts:
        raise SettingsError(
            "no adapter to combine",
            where="adapters",
            hint="afina combine A:0.6 B:0.4 --output-dir C",
        )
    sources: list[AdapterSource] = []
    for text in texts:
        folder, weight = parse_weighted(text)
        for part in expand_composition(folder, weight):
            source = open_source(part)
            twin = next((other for other in sources if other.hash == source.hash), None)
            if twin is not None:
                where = f"{twin.part.folder}, {part.folder}"
                raise SettingsError(
                    "the same adapter twice",
                    where=where,
                    hint="name it once, with the sum of its weights",
                )
            sources.append(source)
    return sources


def open_source(part: WeightedAdapter) -> AdapterSource:
    """Open one adapter.

    Raises:
        AdapterError: It is damaged, or contains more than updates, such as a head.
    """
    source = AdapterSource.open(part)
    spec = source.config
    if spec.modules_to_save:
        why = "heads are trained from different random starts: their weighted sum has no meaning"
        raise AdapterError(
            f"this adapter contains {spec.modules_to_save[0]}", where=str(part.folder), why=why
        )
    if spec.trainable_tokens:
        why = "rows of new tokens are no update of the base"
        raise AdapterError(
            f"this adapter contains the token {next(iter(spec.trainable_tokens))!r}",
            where=str(part.folder),
            why=why,
        )
    return source


def attach_to_base(sources: Sequence[AdapterSource], settings: ModelSettings) -> FrozenModel:
    """Load the base and attach those adapters whose updates need it."""
    opened = load_run(sources[0].part.folder, settings, adapter=False)
    for number, source in enumerate(sources):
        source.base = opened.base
        if not source.is_low_rank:
            source.attached = load_adapter(source.part.folder, opened.base, f"part{number}")
    return opened.base


def chat_record(sources: Sequence[AdapterSource]) -> dict[str, Any]:
    """Return the keys `chat` and `embedding` of afina.json, where all sources have the same."""
    stored = [read_metadata(source.part.folder).get(EMBEDDING_KEY) for source in sources]
    if stored[0] is not None and all(one == stored[0] for one in stored):
        return {EMBEDDING_KEY: stored[0]}
    known = [recorded_format(source.part.folder) for source in sources]
    if known[0] is None or any(one is None or one.rendering != known[0].rendering for one in known):
        return {}
    return {CHAT_KEY: known[0].record()}


def adapted_modules(sources: Sequence[AdapterSource]) -> Iterator[tuple[str, list[AdapterSource]]]:
    """Yield each adapted module with the adapters that change it."""
    paths = dict.fromkeys(path for source in sources for path in source.config.target_modules)
    for path in paths:
        yield path, [source for source in sources if path in source.config.target_modules]


def _factors(
    tensors: Mapping[str, Tensor], spec: AdapterConfig, path: str
) -> tuple[Tensor, Tensor] | None:
    """Return s B `(out, r)` and A `(r, in)`, float64; None where they need the base, or full rank.

    Args:
        tensors: Tensors of the module by their names on disk; more than two after restarts.
        spec: The adapter's configuration.
        path: The module.
    """
    if get_method(spec.method).low_rank_tensors is None or len(tensors) != 2:
        return None
    # A is sorted before B for all kinds of modules
    a, b = (tensor for _, tensor in sorted(tensors.items()))
    return spec.scale_of(path) * b.double().flatten(1), a.double().flatten(1)
