"""Modules with adapters: what replaces a frozen module of the model while adapters are attached.

    y = base(x) + sum of the outputs of the adapters that the forward context names

There are two paths. `FusedAdapters` computes in one call what kernels can; the reference calls each
remaining adapter layer on its tokens.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afina.adapters.fused import FusedAdapters
from afina.adapters.segments import ForwardContext, Segment, Segments
from afina.adapters.serving_layers import LoRAView, MergedLinear
from afina.adapters.target_module import TargetModule
from afina.errors import SettingsError
from afina.kernels.dispatch import bypasses_dispatcher


class ModuleWithAdapters(nn.Module):
    """A frozen module and its adapter layers; the forward context names the active ones.

    Attributes:
        base: The frozen module.
        deltas: Adapter layers by the adapter's name.
        serving_layers: Those that the serving engine has added, by the adapter's hash.
    """

    def __init__(self, layer: TargetModule, context: ForwardContext) -> None:
        super().__init__()
        self.base = layer.module
        self.deltas = nn.ModuleDict()
        self.serving_layers: dict[str, LoRAView | MergedLinear] = {}
        self.layer, self._context = layer, context
        self._kept: FusedAdapters | None = None

    @property
    def weight(self) -> Tensor:
        """The weight in use, frozen or fully trained: some models read their modules' weights."""
        return self._in_use("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias in use."""
        return self._in_use("bias")

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.layer.out_features

    def _in_use(self, attribute: str) -> Any:
        names = [name for name, _ in self._context.segments.global_adapters]
        layers = [layer for name in names if (layer := self.adapter_layer(name)) is not None]
        replacing = [layer for layer in layers if layer.replaces_base]
        return getattr(replacing[0] if replacing else self.base, attribute)

    def adapter_layer(self, name: str) -> Any:
        """Return the layer of the adapter `name` at this module, or None."""
        return self.serving_layers.get(name) or self.deltas._modules.get(name)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """Return the base's output plus the outputs of the active adapters.

        Args:
            x: `(..., in)`, a packed batch or rows that are one when flattened.
            others: Further inputs of modules that are not linear (experts, learned positions).
            named: Further inputs by name.

        Raises:
            SettingsError: an adapter that replaces the module is not active alone on all tokens.
        """
        segments = self._context.segments
        if not segments.global_adapters and not segments.spans:
            return self.base(x, *others, **named)
        if not segments.spans and len(segments.global_adapters) == 1:
            name, weight = segments.global_adapters[0]
            layer = self.adapter_layer(name)
            if layer is None:
                return self.base(x, *others, **named)
            if layer.replaces_base:
                return layer(x, x, weight, *others, **named)
        fused = self._fused(segments, x)
        if fused is not None and fused.includes_base:
            return fused.linear(x)
        y = self.base(x, *others, **named)
        if fused is None or not fused.is_complete:
            names = frozenset() if fused is None else fused.names
            y = self._add_reference(x, y, segments, names, bool(others or named))
        return y if fused is None else fused.add(y, x)

    def _fused(self, segments: Segments, x: Tensor) -> FusedAdapters | None:
        """Return what kernels compute, kept for later passes where nothing is trained.

        Segments are the same in all modules of a forward pass, and mostly in the next decode step.
        """
        if self.layer.channels_first:
            return None
        if segments.unit == "row":
            if x.shape[0] < max((span.end for span in segments.spans), default=0):
                return None  # one row for all: positions that are broadcast
            segments = segments.in_tokens(x.shape[1:-1].numel())
        if not bypasses_dispatcher():
            return FusedAdapters.prepare(self, segments, x)
        kept = self._kept
        if kept is None or not kept.is_valid_for(segments, x):
            self._kept = kept = FusedAdapters.prepare(self, segments, x)
        return kept

    def _add_reference(
        self,
        x: Tensor,
        y: Tensor,
        segments: Segments,
        fused: frozenset[str],
        has_more_inputs: bool,
    ) -> Tensor:
        """Return y plus the outputs of the adapters that are not `fused`, layer by layer.

        Raises:
            SettingsError: a layer that replaces the module is active next to another, or reads
                `has_more_inputs`, which no span selects.
        """
        on_all_tokens = [
            (layer, weight)
            for name, weight in segments.global_adapters
            if name not in fused and (layer := self.adapter_layer(name)) is not None
        ]
        spans = [
            span
            for span in segments.spans
            if span.adapter not in fused and self.adapter_layer(span.adapter) is not None
        ]
        if not on_all_tokens and not spans:
            return y
        replacing = [span for span in spans if self.adapter_layer(span.adapter).replaces_base]
        if any(layer.replaces_base for layer, _ in on_all_tokens) or (
            replacing and (on_all_tokens or has_more_inputs or _overlap(spans))
        ):
            what = "an adapter that replaces a module must be active alone, on all tokens"
            raise SettingsError(what, where=self.layer.path)
        y = y0 = self.layer.channels_last(y)
        for layer, weight in on_all_tokens:
            # each reads the base's output; the first sum needs no second pass over it
            y = layer(x, y0, weight) if y is y0 else y + (layer(x, y0, weight) - y0)
        adding = [span for span in spans if span not in replacing]
        if adding:
            y = self._add_spans(x, y0, y, adding, segments.unit == "token")
        y = self.layer.restore_layout(y)
        return self._replace_spans(x, y, replacing, segments.unit == "token") if replacing else y

    def _add_spans(
        self, x: Tensor, y0: Tensor, y: Tensor, spans: list[Segment], is_packed: bool
    ) -> Tensor:
        """Return a copy of y plus each adapter's output on its tokens, or rows of a padded batch.

        All spans of an adapter are gathered: it runs once, however many sequences it serves.
        """
        inputs = _flat_inputs(x) if is_packed else x
        before, out = (y0.flatten(0, -2), y.flatten(0, -2)) if is_packed else (y0, y)
        for (name, weight), index in token_indices(spans, x.device).items():
            part = before[index]
            added = self.adapter_layer(name)(inputs[index], part, weight) - part
            out = out.index_add(0, index, added)
        return out.view(y.shape)

    def _replace_spans(self, x: Tensor, y: Tensor, spans: list[Segment], is_packed: bool) -> Tensor:
        """Return y with the outputs of the layers that replace the base's on their spans.

        Classifiers have one output per class: narrower outputs are filled up with zeros.
        """
        inputs, out = (_flat_inputs(x), y.flatten(0, -2)) if is_packed else (x, y)
        found = [
            (index, self.adapter_layer(name)(inputs[index], inputs[index], weight))
            for (name, weight), index in token_indices(spans, x.device).items()
        ]
        width = max(out.shape[-1], *(part.shape[-1] for _, part in found))
        out = F.pad(out, (0, width - out.shape[-1]))
        for index, part in found:
            part = F.pad(part, (0, width - part.shape[-1])).to(out.dtype)
            out = out.index_copy(0, index, part)
        return out.view(*y.shape[:-1], width)


def _flat_inputs(x: Tensor) -> Tensor:
    """Return inputs of a packed batch by token: vectors, or ids."""
    return x.flatten(0, -2 if x.is_floating_point() else -1)


def token_indices(spans: list[Segment], device: torch.device) -> dict[tuple[str, float], Tensor]:
    """Return the tokens, or rows, of each adapter and weight."""
    ranges: dict[tuple[str, float], list[Tensor]] = {}
    for span in spans:
        tokens = torch.arange(span.start, span.end, device=device)
        ranges.setdefault((span.adapter, span.weight), []).append(tokens)
    return {key: torch.cat(parts) for key, parts in ranges.items()}


def _overlap(spans: list[Segment]) -> bool:
    """Return whether two spans share a token."""
    ordered = sorted(spans, key=lambda span: span.start)
    return any(second.start < first.end for first, second in pairwise(ordered))


class ParameterWithAdapters(nn.Module):
    """Parametrization of a parameter: the frozen one, or the active adapter's trained one.

    Attributes:
        deltas: Adapter layers by the adapter's name.
        order: Names of the owner's parameters in their order, which detaching restores.
    """

    def __init__(self, context: ForwardContext, order: list[str]) -> None:
        super().__init__()
        self.deltas = nn.ModuleDict()
        self._context, self.order = context, order

    def forward(self, frozen: Tensor) -> Tensor:
        """Return the parameter in use, in its own shape.

        Raises:
            SettingsError: an adapter that replaces it is not active alone on all tokens.
        """
        segments = self._context.segments
        active = [pair for pair in segments.global_adapters if pair[0] in self.deltas]
        if any(span.adapter in self.deltas for span in segments.spans) or (
            active and len(segments.global_adapters) > 1
        ):
            what = "an adapter that replaces a parameter must be active alone, on all tokens"
            raise SettingsError(what)
        if not active:
            return frozen
        name, weight = active[0]
        return self.deltas[name](frozen, frozen, weight)
