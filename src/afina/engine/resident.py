"""An adapter in memory: where its numbers lie in the pool, and how the layers find them.

    file     | A1 B1 A2 B2 ... |      one stretch of numbers, in the file's own order
    pool     | A1 B1'A2 B2'... |      the same stretch on a run of pages, B transposed (low rank); others as in the file
    layers   Adapted.served[hash] = two views    while a request wants it; an idle adapter is nothing but its numbers

Adapters of one spec share one `Layout`: which of the file's tensors belongs to which layer, worked out once.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afina.base.model import Base
from afina.base.safety import check_file, read_header, tensors_hash
from afina.delta.adapted import Adapted, Thin
from afina.delta.attach import Adapter, attach, detach, frozen_module, seat, take_seat
from afina.delta.contract import Delta, Spec, method
from afina.delta.files import PREFIX, WEIGHTS, adopt, identity_of
from afina.delta.layers import Layer
from afina.errors import AdapterError, BaseError

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Place:
    """A layer's A and B in the stretch of numbers: where each starts; rank, inputs, outputs, scale."""

    path: str
    a: int
    b: int
    rank: int
    inputs: int
    outputs: int
    scale: float


@dataclass(frozen=True)
class Layout:
    """How adapters of one spec lie in their files: dtype, offset of the data, numbers; `places` where all are low-rank."""

    spec: Spec
    dtype: torch.dtype
    offset: int
    numbers: int
    entries: Mapping[str, Any]
    places: tuple[Place, ...] | None

    @cached_property
    def alike(self) -> list[tuple[int, int, int, int, int]]:
        """The B of one shape that lie at equal distances, as those of one projection in all blocks mostly do.

        Each is (where the first starts, distance, how many, rank, outputs): an adapter comes in by a few large copies.
        """
        found: list[tuple[int, int, int, int, int]] = []
        last = ""
        for place in sorted(self.places or (), key=lambda p: (p.path.rpartition(".")[2], p.rank, p.outputs, p.b)):
            begin, step, count, *shape = found[-1] if found else (0, 0, 0, 0, 0)
            distance = place.b - begin if count == 1 else step
            name = place.path.rpartition(".")[2]
            if name == last and shape == [place.rank, place.outputs] and place.b == begin + count * distance:
                found[-1] = (begin, distance, count + 1, place.rank, place.outputs)
            else:
                found.append((place.b, 0, 1, place.rank, place.outputs))
            last = name
        return found

    def hash_of(self, numbers: Tensor) -> str:
        """Identity of an adapter with these numbers (all, in the file's order and dtype)."""
        raw = numbers.view(torch.uint8).numpy().data
        digests = {}
        for name, entry in self.entries.items():
            digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
            digest.update(raw[slice(*entry["data_offsets"])])
            digests[name] = digest.hexdigest()
        return identity_of(tensors_hash(digests), self.spec.as_dict())

    def numbers_in(self, dtype: torch.dtype) -> int:
        """How many numbers of `dtype` an adapter takes up in the pool."""
        return self.numbers if self.places is not None else -(-self.numbers * self.dtype.itemsize // dtype.itemsize)


class Layouts:
    """The layouts seen so far; most adapters of a base share a few."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._known: dict[str, Layout] = {}

    def of(self, folder: Path, spec: Spec) -> Layout:
        """The layout of the adapter in `folder`; raises `AdapterError` where it does not fit the base or cannot be served."""
        file = folder / WEIGHTS
        try:
            check_file(file)
            offset, header = read_header(file)
        except BaseError as error:
            raise AdapterError(error.what, where=error.where, why=error.why, hint="copy the adapter again") from error
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        key = json.dumps([spec.as_dict(), entries], sort_keys=True)
        if key not in self._known:
            self._known[key] = self._make(spec, entries, offset, str(file))
        known = self._known[key]
        return known if known.offset == offset else replace(known, offset=offset)

    def _make(self, spec: Spec, entries: dict[str, Any], offset: int, where: str) -> Layout:
        types = {entry["dtype"] for entry in entries.values()}
        if len(types) != 1 or (dtype := TYPES.get(next(iter(types)))) is None:
            raise AdapterError(f"tensors of types {', '.join(sorted(types))}", where=where, why="served are F32, BF16 or F16")
        spans = sorted(entry["data_offsets"] for entry in entries.values())
        if any(one[1] != next_[0] for one, next_ in pairwise(spans)):
            raise AdapterError("tensors overlap, or leave holes", where=where, hint="save the adapter again")
        self._check_servable(spec, where)
        numbers = spans[-1][1] // dtype.itemsize
        return Layout(spec, dtype, offset, numbers, entries, self._places(spec, entries, dtype.itemsize, where))

    def _check_servable(self, spec: Spec, where: str) -> None:
        if method(spec.method).replaces or spec.modules:
            why = "a trained layer takes the base's place, and cannot act beside others"
            raise AdapterError("this adapter cannot be served", where=where, why=why, hint="afina extract makes a lora of it")
        vocabulary = len(self.base.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        if new := [name for name, number in spec.tokens.items() if number >= vocabulary]:
            why = "the base has no rows for them, and new ones would show in everybody's answers"
            raise AdapterError(f"tokens of its own: {', '.join(new)}", where=where, why=why, hint="afina merge")

    def _places(self, spec: Spec, entries: dict[str, Any], size: int, where: str) -> tuple[Place, ...] | None:
        """Where A and B of each layer lie; None where the method is more than low rank."""
        kind = method(spec.method)
        if not kind.low_rank or spec.tokens or spec.options.get("restarts"):
            return None
        places, generator = [], torch.Generator()
        left = set(entries)
        for path in spec.targets:
            layer = Layer(path, frozen_module(self.base.model, path))
            if not layer.is_matrix or isinstance(layer.module, nn.Embedding) or layer.channels_first:
                return None
            delta: Delta = kind(layer, spec, generator)
            at = {}
            for name in ("a", "b"):
                key = f"{PREFIX}{path}.{delta.keys[name]}"
                shape = list(getattr(delta, name).shape)
                if key not in left or entries[key]["shape"] != shape:
                    found = entries[key]["shape"] if key in entries else "missing"
                    raise AdapterError(f"{key}: {found}", where=where, why=f"this base and configuration want {shape}")
                left.remove(key)
                at[name] = entries[key]["data_offsets"][0] // size
            rank = spec.rank_of(path)
            places.append(Place(path, at["a"], at["b"], rank, layer.in_features, layer.out_features, spec.scale_of(path)))
        if left:
            raise AdapterError(f"a tensor without a place: {min(left)}", where=where)
        return tuple(places)


class Resident:
    """One adapter's numbers on a run of pages, and its presence in the layers while it is wanted."""

    def __init__(self, name: str, layout: Layout, start: int, pages: int, memory: Tensor) -> None:
        self.name, self.layout, self.start, self.pages, self.memory = name, layout, start, pages, memory
        self.pins = 0  # running sequences that need it
        self.used = 0.0  # when it was last wanted, seconds of the monotonic clock
        self.merged = False
        self._adapter: Adapter | None = None
        self._present = False

    def fill(self, raw: Tensor) -> None:
        """Take the file's stretch of numbers `raw` (numbers), in the file's dtype."""
        if self.layout.places is None:
            self.memory.view(torch.uint8)[: raw.numel() * raw.itemsize].copy_(raw.view(torch.uint8))
            return
        self.memory.copy_(raw)
        for begin, step, count, rank, outputs in self.layout.alike:
            stretches = self.memory.as_strided((count, rank * outputs), (step, 1), self.memory.storage_offset() + begin)
            turned = stretches.unflatten(1, (outputs, rank)).mT.contiguous()
            stretches.copy_(turned.flatten(1))

    def enter(self, base: Base) -> None:
        """Let the layers see it."""
        if self._present:
            return
        self._present = True
        if self.layout.places is None:
            self._adapter = attach(base.model, base.board, self.name, self.layout.spec)
            flat = self.memory.view(torch.uint8)[: self.layout.numbers * self.layout.dtype.itemsize].view(self.layout.dtype)
            adopt(self._adapter, self._tensors(flat), self.name)
            self._adapter.train(False)
            return
        for place in self.layout.places:
            a = self.memory[place.a : place.a + place.rank * place.inputs].view(place.rank, place.inputs)
            b = self.memory[place.b : place.b + place.rank * place.outputs].view(place.rank, place.outputs)
            seat_of(base, place.path).served[self.name] = Thin(a, b, place.scale)

    def _tensors(self, flat: Tensor) -> dict[str, Tensor]:
        size, tensors = self.layout.dtype.itemsize, {}
        for name, entry in self.layout.entries.items():
            begin, end = (at // size for at in entry["data_offsets"])
            tensors[name] = flat[begin:end].view(entry["shape"])
        return tensors

    def leave(self, base: Base, evicted: bool = False) -> None:
        """The layers see it no more. One of modules (dora, mora) stays until it is evicted: putting it back is dear."""
        if not self._present or (self._adapter is not None and not evicted):
            return
        self._present = False
        if self._adapter is not None:
            detach(base.model, self._adapter)
            self._adapter = None
            return
        for place in self.layout.places or ():
            del seat_of(base, place.path).served[self.name]


def seat_of(base: Base, path: str) -> Adapted:
    """The place for adapters at the module `path`; it is made at the first call, and stays."""
    place = seat(base.model, path) or take_seat(base.model, Layer(path, frozen_module(base.model, path)), base.board)
    assert isinstance(place, Adapted)
    return place


def read_numbers(file: Path, layout: Layout) -> Tensor:
    """The file's stretch of numbers, in its own dtype, on the host."""
    data = bytearray(layout.numbers * layout.dtype.itemsize)
    with file.open("rb") as stream:
        stream.seek(layout.offset)
        if stream.readinto(data) != len(data):
            raise AdapterError("the file is shorter than it was", where=str(file), hint="load the adapter again")
    return torch.frombuffer(data, dtype=layout.dtype)
