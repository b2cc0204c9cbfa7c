"""An adapter in the pool: where its elements are, and how the layers find them.

    file     | A1 B1 A2 B2 ... |      the elements in the file's own order
    pool     | A1 B1'A2 B2'... |      the same in contiguous blocks, B transposed (low rank only)
    layers   ModuleWithAdapters.serving_layers[hash] = two views    while a request needs it

Adapters of one configuration share one `AdapterLayout`: which tensor belongs to which layer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from afina.adapters.attach import (
    Adapter,
    attach,
    create_layers,
    detach,
    find_wrapper,
    frozen_module,
    insert_wrapper,
)
from afina.adapters.base import AdapterLayer
from afina.adapters.loading import (
    assign_state,
    check_frozen_copy,
    check_modules,
    frozen_copies,
    matching_views,
)
from afina.adapters.modules import ModuleWithAdapters
from afina.adapters.registry import get_method
from afina.adapters.serving_layers import LoRAView
from afina.adapters.target_module import TargetModule
from afina.errors import AdapterError
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import PREFIX, AdapterFolder
from afina.io.hashing import adapter_hash, combine_tensor_hashes, start_tensor_hash
from afina.io.safetensors import TensorEntry, read_span
from afina.models.causal_lm import CausalLM
from afina.models.frozen import FrozenModel

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class LoRAOffsets:
    """Offsets of a layer's A and B among the elements of an adapter; rank, sizes and scale."""

    path: str
    a: int
    b: int
    rank: int
    inputs: int
    outputs: int
    scale: float


@dataclass(frozen=True)
class AdapterLayout:
    """Layout of the files of one configuration: dtype, offset of the data, number of elements.

    `lora_offsets` has the offsets of each layer where the method is low-rank only.
    """

    config: AdapterConfig
    dtype: torch.dtype
    offset: int
    numbers: int
    entries: Mapping[str, TensorEntry]  # offsets from the start of the data
    lora_offsets: tuple[LoRAOffsets, ...] | None
    frozen: Mapping[str, str] = field(default_factory=dict)  # copies of base weights: name to path

    @cached_property
    def contiguous_groups(self) -> list[tuple[int, int, int, int, int]]:
        """Groups of B of one shape at equal distances, so that loading is a few large copies.

        Each is (first offset, distance, count, rank, outputs); mostly one projection in all layers.
        """
        found: list[tuple[int, int, int, int, int]] = []
        last = ""
        for layer in sorted(
            self.lora_offsets or (),
            key=lambda p: (p.path.rpartition(".")[2], p.rank, p.outputs, p.b),
        ):
            begin, step, count, *shape = found[-1] if found else (0, 0, 0, 0, 0)
            distance = layer.b - begin if count == 1 else step
            name = layer.path.rpartition(".")[2]
            if (
                name == last
                and shape == [layer.rank, layer.outputs]
                and layer.b == begin + count * distance
            ):
                found[-1] = (begin, distance, count + 1, layer.rank, layer.outputs)
            else:
                found.append((layer.b, 0, 1, layer.rank, layer.outputs))
            last = name
        return found

    def hash_of(self, numbers: Tensor) -> str:
        """Return the hash of an adapter with these elements, in the file's order and dtype."""
        raw = numbers.view(torch.uint8).numpy().data
        digests = {}
        for name, entry in self.entries.items():
            digest = start_tensor_hash(entry)
            digest.update(raw[entry.begin : entry.end])
            digests[name] = digest.hexdigest()
        return adapter_hash(combine_tensor_hashes(digests), self.config.canonical())

    def tensors(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of the tensors by name, without copies of base weights.

        Args:
            flat: the elements in the file's order and dtype, `(numel,)`.
        """
        size, tensors = self.dtype.itemsize, {}
        for name, entry in self.entries.items():
            if name not in self.frozen:
                elements = flat[entry.begin // size : entry.end // size]
                tensors[name] = elements.view(entry.shape)
        return tensors

    def numbers_in(self, dtype: torch.dtype) -> int:
        """Return how many elements of `dtype` an adapter takes in the pool."""
        return (
            self.numbers
            if self.lora_offsets is not None
            else -(-self.numbers * self.dtype.itemsize // dtype.itemsize)
        )


class AdapterLayoutCache:
    """Layouts by configuration; most adapters of a base share a few."""

    def __init__(self, base: FrozenModel) -> None:
        self.base = base
        self._known: dict[str, AdapterLayout] = {}

    def of(self, folder: AdapterFolder, spec: AdapterConfig) -> AdapterLayout:
        """Return the layout of an adapter on disk.

        Raises:
            AdapterError: the adapter does not fit the base, or cannot be served.
        """
        offset = min(entry.begin for entry in folder.entries.values())
        entries = {
            name: replace(entry, begin=entry.begin - offset, end=entry.end - offset)
            for name, entry in folder.entries.items()
        }
        described = [[e.name, e.dtype, e.shape, e.begin, e.end] for e in entries.values()]
        key = json.dumps([spec.canonical(), described], sort_keys=True)
        if key not in self._known:
            self._known[key] = self._make(spec, entries, offset, str(folder.weights_file))
        known = self._known[key]
        self._check_frozen_copies(folder, known)
        return known if known.offset == offset else replace(known, offset=offset)

    def _check_frozen_copies(self, folder: AdapterFolder, layout: AdapterLayout) -> None:
        """Raise `AdapterError` where a copy of a base's weight is not the base's own."""
        reader = folder.reader()
        for name, path in layout.frozen.items():
            raw = torch.frombuffer(reader.read_bytes(name), dtype=layout.dtype)
            tensor = raw.view(layout.entries[name].shape)
            check_frozen_copy(name, tensor, self.base, path, str(folder.weights_file))

    def _make(
        self, spec: AdapterConfig, entries: dict[str, TensorEntry], offset: int, where: str
    ) -> AdapterLayout:
        types = {entry.dtype for entry in entries.values()}
        dtype = TYPES.get(next(iter(types))) if len(types) == 1 else None
        if dtype is None:
            raise AdapterError(
                f"tensors of types {', '.join(sorted(types))}",
                where=where,
                why="all tensors F32, all BF16 or all F16 can be served",
            )
        self._check_servable(spec, where)
        check_modules(spec, entries, self.base, where)
        frozen = frozen_copies(spec, entries, self.base)
        own = {name: entry for name, entry in entries.items() if name not in frozen}
        lora_offsets = self._lora_offsets(spec, own, dtype.itemsize, where)
        if lora_offsets is None:
            self._check_shapes(spec, own, where)
        numbers = max(entry.end for entry in entries.values()) // dtype.itemsize
        return AdapterLayout(spec, dtype, offset, numbers, entries, lora_offsets, frozen)

    def _check_shapes(
        self, spec: AdapterConfig, entries: dict[str, TensorEntry], where: str
    ) -> None:
        """Raise `AdapterError` where the adapter's layers would have other tensors."""
        layers = create_layers(self.base.model, spec)
        shapes = {name: entry.shape for name, entry in entries.items()}
        matching_views(Adapter("unattached", spec, layers), shapes, where)

    def _check_servable(self, spec: AdapterConfig, where: str) -> None:
        if get_method(spec.method).replaces_base or spec.modules_to_save:
            why = "its layers replace the base's, and cannot be combined with other adapters"
            raise AdapterError(
                "this adapter cannot be served",
                where=where,
                why=why,
                hint="convert it to a lora: afina extract",
            )
        vocabulary = len(self.base.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        if new := [name for name, number in spec.trainable_tokens.items() if number >= vocabulary]:
            why = "the base has no rows for them, and new rows would change all completions"
            raise AdapterError(
                f"tokens of its own: {', '.join(new)}", where=where, why=why, hint="afina merge"
            )

    def _lora_offsets(
        self, spec: AdapterConfig, entries: dict[str, TensorEntry], size: int, where: str
    ) -> tuple[LoRAOffsets, ...] | None:
        """Return the offsets of A and B of each layer; None where not low-rank only."""
        kind = get_method(spec.method)
        if (
            not kind.low_rank_tensors
            or spec.trainable_tokens
            or spec.method_settings.get("restarts")
        ):
            return None
        offsets, generator = [], torch.Generator()
        left = set(entries)
        for path in spec.target_modules:
            layer = TargetModule(path, frozen_module(self.base.model, path))
            if (
                not layer.is_matrix
                or isinstance(layer.module, nn.Embedding)
                or layer.channels_first
            ):
                return None
            delta: AdapterLayer = kind(layer, spec, generator)
            at = {}
            for name in ("a", "b"):
                key = f"{PREFIX}{path}.{delta.names_on_disk(layer)[name]}"
                shape = tuple(getattr(delta, name).shape)
                if key not in left or entries[key].shape != shape:
                    found = entries[key].shape if key in entries else "missing"
                    raise AdapterError(
                        f"{key}: {found}",
                        where=where,
                        why=f"this base and configuration need {shape}",
                    )
                left.remove(key)
                at[name] = entries[key].begin // size
            rank = spec.rank_of(path)
            offsets.append(
                LoRAOffsets(
                    path,
                    at["a"],
                    at["b"],
                    rank,
                    layer.in_features,
                    layer.out_features,
                    spec.scale_of(path),
                )
            )
        if left:
            raise AdapterError(f"a tensor without a module: {min(left)}", where=where)
        return tuple(offsets)


class LoadedAdapter:
    """Elements of one adapter in contiguous blocks, and its layers while a request needs it."""

    def __init__(
        self, name: str, layout: AdapterLayout, start: int, pages: int, memory: Tensor
    ) -> None:
        self.name, self.layout, self.start, self.pages, self.memory = (
            name,
            layout,
            start,
            pages,
            memory,
        )
        self.ref_count = 0  # running sequences that need it
        self.used = 0.0  # when it was last used, seconds of the monotonic clock
        self.merged = False
        self._adapter: Adapter | None = None
        self._present = False

    def copy_from(self, raw: Tensor) -> None:
        """Copy the elements of the file, `raw` `(numel,)` in the file's dtype, into the pool."""
        if self.layout.lora_offsets is None:
            self.memory.view(torch.uint8)[: raw.numel() * raw.itemsize].copy_(raw.view(torch.uint8))
            return
        self.memory.copy_(raw)
        for begin, step, count, rank, outputs in self.layout.contiguous_groups:
            spans = self.memory.as_strided(
                (count, rank * outputs), (step, 1), self.memory.storage_offset() + begin
            )
            transposed = spans.unflatten(1, (outputs, rank)).mT.contiguous()
            spans.copy_(transposed.flatten(1))

    def activate(self, base: CausalLM) -> None:
        """Add it to the layers."""
        if self._present:
            return
        if self.layout.lora_offsets is None:
            adapter = attach(base.model, base.forward_context, self.name, self.layout.config)
            flat = self.memory.view(torch.uint8)[
                : self.layout.numbers * self.layout.dtype.itemsize
            ].view(self.layout.dtype)
            try:
                assign_state(adapter, self.layout.tensors(flat), self.name)
            except BaseException:
                detach(base.model, adapter)
                raise
            adapter.train(False)
            self._adapter, self._present = adapter, True
            return
        self._present = True
        try:
            self._set_views(base, self.layout.lora_offsets)
        except BaseException:
            self.deactivate(base)
            raise

    def _set_views(self, base: CausalLM, layers: Sequence[LoRAOffsets]) -> None:
        """Give each module views of its matrices in the pool."""
        for layer in layers:
            a = self.memory[layer.a : layer.a + layer.rank * layer.inputs].view(
                layer.rank, layer.inputs
            )
            b = self.memory[layer.b : layer.b + layer.rank * layer.outputs].view(
                layer.rank, layer.outputs
            )
            get_or_insert_wrapper(base, layer.path).serving_layers[self.name] = LoRAView(
                a, b, layer.scale
            )

    def deactivate(self, base: CausalLM, evicted: bool = False) -> None:
        """Remove it from the layers; one of modules (dora, mora) stays until it is evicted.

        Attaching modules again would cost more than they take.
        """
        if not self._present or (self._adapter is not None and not evicted):
            return
        self._present = False
        if self._adapter is not None:
            detach(base.model, self._adapter)
            self._adapter = None
            return
        for layer in self.layout.lora_offsets or ():
            get_or_insert_wrapper(base, layer.path).serving_layers.pop(self.name, None)


def get_or_insert_wrapper(base: FrozenModel, path: str) -> ModuleWithAdapters:
    """Return the wrapper of the module at `path`, inserted at the first call."""
    wrapper = find_wrapper(base.model, path) or insert_wrapper(
        base.model, TargetModule(path, frozen_module(base.model, path)), base.forward_context
    )
    assert isinstance(wrapper, ModuleWithAdapters)
    return wrapper


def read_numbers(file: Path, layout: AdapterLayout) -> Tensor:
    """Return the elements of the file in its own dtype, in host memory."""
    end = layout.offset + layout.numbers * layout.dtype.itemsize
    data = read_span(file, layout.offset, end, str(file))
    return torch.frombuffer(data, dtype=layout.dtype)
