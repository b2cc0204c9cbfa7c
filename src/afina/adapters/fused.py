"""The fused path of an adapted module: all adapter layers that a kernel computes, in one call.

    prepare (which layers, their rows, the packed weights) -> linear, or add to the base's output

The other path is the reference, `AdapterLayer.forward` layer by layer (`afina.adapters.modules`).
Both give the same sum, and nothing else depends on which of them runs.
"""

from collections.abc import Sequence
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from afina.adapters.segments import Segment, Segments
from afina.kernels.adapter_group import AdapterGroup
from afina.kernels.dispatch import bypasses_dispatcher, kernels
from afina.kernels.fused_linear import linear_with_adapters
from afina.kernels.lora import LoRAGroup
from afina.kernels.mora import MoRAGroup
from afina.models.fast_llama import LINEAR_TYPES
from afina.models.nf4 import NF4Linear

GROUPS: dict[str, type[AdapterGroup]] = {"lora": LoRAGroup, "mora": MoRAGroup}


class AdaptedModule(Protocol):
    """What the fused path reads of a module with adapters."""

    base: nn.Module

    @property
    def out_features(self) -> int:
        """Width of the output."""

    def adapter_layer(self, name: str) -> Any:
        """Return the layer of the adapter `name`, or None."""


class FusedAdapters:
    """The adapter layers of one forward pass at one module that kernels compute.

    Attributes:
        names: The adapters whose layers these are.
        is_complete: Whether no other adapter of the forward pass has a layer at the module.
        includes_base: Whether `linear` runs, and computes the base's product too.
    """

    def __init__(
        self,
        adapted: AdaptedModule,
        segments: Segments,
        x: Tensor,
        rows: list[Segment],
        is_in_place: bool,
        differentiates_base: bool,
    ) -> None:
        self._adapted, self._segments = adapted, segments
        self._shape, self._dtype = x.shape, x.dtype
        named = [name for name, _ in segments.global_adapters]
        self._active = list(dict.fromkeys([*named, *(span.adapter for span in segments.spans)]))
        self._found = [adapted.adapter_layer(name) for name in self._active]
        layers = {row.adapter: adapted.adapter_layer(row.adapter) for row in rows}
        self.names = frozenset(layers)
        self.is_complete = all(
            layer is None or name in layers
            for name, layer in zip(self._active, self._found, strict=True)
        )
        self.includes_base = self.is_complete and differentiates_base
        self._groups, self._is_in_place = _groups(rows, layers), is_in_place
        if is_in_place:
            self._keep(x)

    @classmethod
    def prepare(
        cls, adapted: AdaptedModule, segments: Segments, x: Tensor
    ) -> "FusedAdapters | None":
        """Return what kernels compute of the forward pass of `x`; None where that is nothing."""
        if segments.unit != "token" or not x.is_floating_point() or x.ndim < 2:
            return None
        if not kernels.has_kernel(x):
            return None
        is_in_place = bypasses_dispatcher() and kernels.uses_cpp(x)
        differentiates_base = not is_in_place and _differentiates_base(adapted.base, x)
        rows = [span for span in segments.spans if can_fuse(adapted.adapter_layer(span.adapter))]
        if is_in_place or differentiates_base:  # elsewhere it would cost a copy of the output
            num_tokens = x.shape[:-1].numel()
            rows += [
                Segment(0, num_tokens, name, weight)
                for name, weight in segments.global_adapters
                if can_fuse(adapted.adapter_layer(name))
            ]
        if not rows:
            return None
        return cls(adapted, segments, x, rows, is_in_place, differentiates_base)

    def _keep(self, x: Tensor) -> None:
        """Prepare the kernels for further forward passes, and record their sources."""
        self._kernels = []
        for group in self._groups:
            weights = [layer.inference_weights(x.dtype) for layer in group.layers]
            self._kernels.append(group.prepare(x, self._adapted.out_features, weights))
        layers = [layer for group in self._groups for layer in group.layers]
        # views of the serving engine do not change while they are in use
        self._layers = [layer for layer in layers if isinstance(layer, nn.Module)]
        self._caches = [layer._inference_cache for layer in self._layers]
        sources = [t for layer in self._layers for t in layer.parameters()]
        self._sources = [t for t in sources if not t.is_inference()]
        self._versions = [t._version for t in self._sources]

    def is_valid_for(self, segments: Segments, x: Tensor) -> bool:
        """Return whether this still holds; equal segments of a later step replace the last ones."""
        if segments is not self._segments:
            if segments != self._segments:
                return False
            self._segments = segments
        return (
            x.shape == self._shape
            and x.dtype == self._dtype
            and all(map(is_, map(self._adapted.adapter_layer, self._active), self._found))
            and all(map(is_, [layer._inference_cache for layer in self._layers], self._caches))
            and [t._version for t in self._sources] == self._versions
        )

    def linear(self, x: Tensor) -> Tensor:
        """Return the output of the base and of the adapters, as one operation."""
        base: Any = self._adapted.base

        def grad_product(grad: Tensor) -> Tensor:
            weight = base.dequantize(grad.dtype) if isinstance(base, NF4Linear) else base.weight
            return grad @ weight

        return linear_with_adapters(x, base, grad_product, self._groups)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the base's output y `(..., out)` plus the adapters' outputs; y may be reused."""
        if self._is_in_place:
            y = y if y.dtype == x.dtype and y.is_contiguous() else y.to(x.dtype).contiguous()
            for kernel in self._kernels:
                kernel.add(y, x)
            return y
        flat_y, flat_x = y.flatten(0, -2), x.flatten(0, -2)
        for group in self._groups:
            flat_y = group.apply(flat_y, flat_x)
        return flat_y.view(y.shape)


def can_fuse(layer: Any) -> bool:
    """Return whether a kernel computes all that the adapter layer adds now; False for None."""
    return layer is not None and layer.can_fuse


def _differentiates_base(base: Any, x: Tensor) -> bool:
    """Return whether base and adapters are one operation: gradients, and a frozen linear base."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if type(base) is NF4Linear:
        return kernels.uses_cpp(x)
    if type(base) not in LINEAR_TYPES:
        return False
    weights = [p for p in (base.weight, base.bias) if p is not None]
    return kernels.uses_cpp(x, *weights) and not any(p.requires_grad for p in weights)


def _groups(rows: Sequence[Segment], layers: dict[str, Any]) -> list[AdapterGroup]:
    """Return the rows by kernel, as it takes them."""
    groups = []
    for kernel, group in GROUPS.items():
        own = {name: layer for name, layer in layers.items() if layer.fused_kernel == kernel}
        if own:
            index = {name: number for number, name in enumerate(own)}
            table = [
                (row.start, row.end, index[row.adapter], row.weight * own[row.adapter].scale)
                for row in rows
                if row.adapter in own
            ]
            groups.append(group(table, list(own.values())))
    return groups
