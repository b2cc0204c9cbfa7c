"""The updates of the adapters to be combined, a layer at a time.

A lora's update is read from its file alone, whatever the size of the base. Updates that need the base (dora's row
norms, mora's shapes, trained weights) come from the adapter attached to it: D = merged(W) - W in float64.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from afina.base.frozen import Frozen
from afina.combining.lowrank import Low
from afina.combining.stream import Reader
from afina.config import BaseSettings
from afina.delta.attach import Adapter, frozen_module
from afina.delta.composition import Part, identity, label, parse_part, parts_of, spec_of
from afina.delta.contract import Spec, method
from afina.delta.files import PREFIX, WEIGHTS, load_adapter
from afina.delta.layers import Layer
from afina.delta.opening import open_run
from afina.errors import AdapterError, SettingsError


@dataclass
class Source:
    """One adapter to be combined: who it is, its weight, and its update at each layer."""

    part: Part
    spec: Spec
    hash: str
    reader: Reader
    attached: Adapter | None = None
    base: Frozen | None = None
    _names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        """Its weight in the combination."""
        return self.part.weight

    @property
    def name(self) -> str:
        """What people call it."""
        return label(self.part.folder)

    @cached_property
    def by_path(self) -> dict[str, list[str]]:
        """Names of its tensors on disk, by the path of the layer (the longest target that begins them)."""
        found: dict[str, list[str]] = {path: [] for path in self.spec.targets}
        for name in self.reader.entries:
            path = name.removeprefix(PREFIX)
            while path and path not in found:
                path = path.rpartition(".")[0]
            if path:
                found[path].append(name)
        return found

    def low(self, path: str) -> Low | None:
        """The update at `path` as thin factors; None where it is none, or not told by the file alone."""
        tensors = {name: self.reader[name] for name in self.by_path[path]}
        factors = _factors(tensors, self.spec, path)
        return None if factors is None else Low(*factors)

    @cached_property
    def is_low(self) -> bool:
        """Whether all of its updates are products of thin factors."""
        return bool(self.spec.targets) and self.low(self.spec.targets[0]) is not None

    def layer(self, path: str) -> Layer:
        """The base's layer; the base must be there."""
        assert self.base is not None
        return Layer(path, frozen_module(self.base.model, path))

    def dense(self, path: str) -> Tensor | None:
        """The update at `path` as a matrix (out, in) float64; None at a module that is no matrix (norms)."""
        if self.attached is None:
            low = self.low(path)
            assert low is not None, "the base is needed first"
            return low.dense()
        layer = self.layer(path)
        if not layer.is_matrix:
            return None
        wide = torch.float32 if layer.device.type == "mps" else torch.float64  # which mps does not know
        weight = layer.weight.detach().to(wide)
        return (self.attached.deltas[path].merged(weight).detach() - weight).double().cpu()

    def as_parent(self) -> dict[str, object]:
        """The line of afina.json that names it."""
        return {"name": self.name, "hash": self.hash, "weight": self.weight, "method": self.spec.method}


def open_sources(texts: Sequence[str | Path]) -> list[Source]:
    """The adapters named "FOLDER:weight" on the command line; compositions are taken apart.

    Raises `SettingsError` where one comes twice, and `AdapterError` where one is missing or damaged.
    """
    if not texts:
        raise SettingsError("no adapter to combine", where="parts", hint="afina combine A:0.6 B:0.4 --out C")
    sources: list[Source] = []
    for text in texts:
        folder, weight = parse_part(text)
        for part in parts_of(folder, weight):
            source = open_source(part)
            twin = next((other for other in sources if other.hash == source.hash), None)
            if twin is not None:
                where = f"{twin.part.folder}, {part.folder}"
                raise SettingsError("the same adapter twice", where=where, hint="name it once, with the sum of its weights")
            sources.append(source)
    return sources


def open_source(part: Part) -> Source:
    """One adapter, read strictly; raises `AdapterError` where it owns more than updates, of which there is no weighted sum."""
    spec = spec_of(part.folder)
    if spec.modules:
        why = "a head learned from its own random start: a weighted sum of heads is no head"
        raise AdapterError(f"this adapter owns {spec.modules[0]}", where=str(part.folder), why=why)
    if spec.tokens:
        why = "rows of new tokens are no update of the base's"
        raise AdapterError(f"this adapter owns the token {next(iter(spec.tokens))!r}", where=str(part.folder), why=why)
    return Source(part, spec, identity(part.folder), Reader(part.folder / WEIGHTS))


def with_base(sources: Sequence[Source], settings: BaseSettings) -> Frozen:
    """Load the base and attach those adapters whose updates need it."""
    opened = open_run(sources[0].part.folder, settings, adapter=False)
    for number, source in enumerate(sources):
        source.base = opened.base
        if not source.is_low:
            source.attached = load_adapter(source.part.folder, opened.base, f"part{number}")
    return opened.base


def all_paths(sources: Sequence[Source]) -> Iterator[tuple[str, list[Source]]]:
    """Each adapted layer with the adapters that change it; a layer that an adapter leaves alone is a zero update."""
    paths = dict.fromkeys(path for source in sources for path in source.spec.targets)
    for path in paths:
        yield path, [source for source in sources if path in source.spec.targets]


def _factors(tensors: Mapping[str, Tensor], spec: Spec, path: str) -> tuple[Tensor, Tensor] | None:
    """The update at `path` as s B (out, r) and A (r, in), float64; None where it needs the base, or has full rank.

    `tensors` are those of the path, by their names on disk; more than two where restarts have merged something besides.
    """
    if not method(spec.method).low_rank or len(tensors) != 2:
        return None
    a, b = (tensor for _, tensor in sorted(tensors.items()))  # ..._A before ..._B, whatever the kind of layer
    return spec.scale_of(path) * b.double().flatten(1), a.double().flatten(1)
