"""What stands in a frozen module's place: the module, and the deltas that act on it as the switchboard says.

forward    y0 = W x, then every acting delta's part: one by one, or all of a kind that a kernel knows at once (`Lean`)
training   deltas are modules                 serving   low-rank ones are two views into the engine's pool (`Thin`)
"""

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from afina.adapters.segments import ForwardContext, Segment, Segments
from afina.adapters.target_module import TargetModule
from afina.errors import SettingsError
from afina.kernels import lora as lowrank
from afina.kernels import mora as square
from afina.kernels.dispatch import bypasses_dispatcher, kernels
from afina.kernels.fused_linear import AdapterGroup, linear_with_adapters
from afina.models.fast_llama import LINEAR_TYPES, FastLinear
from afina.models.nf4 import NF4Linear

# PyTorch's products of one adapter beat the kernel beyond both: many tokens, and no small rank
FUSED_MAX_TOKENS, FUSED_MAX_RANK = 128, 16


class LoRAView:
    """A low-rank delta of one layer as the serving engine holds it: views into its pool of pages, and no module.

    A (r, in) and B transposed (r, out) are of the base's dtype. Thousands come and go, so that each is only this.
    """

    __slots__ = ("a", "bt", "scale")
    replaces_base, fused_kernel, _inference_cache = False, "lora", None

    def __init__(self, a: Tensor, bt: Tensor, scale: float) -> None:
        self.a, self.bt, self.scale = a, bt, scale

    @property
    def b(self) -> Tensor:
        """B (out, r)."""
        return self.bt.T

    def inference_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B transposed, which are in the base's dtype already."""
        return self.a, self.bt

    def __call__(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """y0 + weight * scale * B A x."""
        return y0 + weight * self.scale * ((x @ self.a.T) @ self.bt)


class MergedLinear:
    """A layer's weight with an adapter taken in, beside the frozen one: it acts alone and everywhere."""

    __slots__ = ("layer",)
    replaces_base, fused_kernel = True, None

    @property
    def weight(self) -> Tensor:
        """The merged matrix (out, in)."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias."""
        return self.layer.bias

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    @classmethod
    @torch.no_grad()
    def of(cls, layer: TargetModule, thin: LoRAView) -> "MergedLinear":
        """The layer's matrix W + scale * B A, added up in float32 and rounded once to the dtype of A."""
        bias: Any = getattr(layer.module, "bias", None)
        made = FastLinear(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = (
            layer.weight.float()
            .addmm(thin.b.float(), thin.a.float(), alpha=thin.scale)
            .to(thin.a.dtype)
        )
        made.weight, made.bias = nn.Parameter(weight, requires_grad=False), bias
        return cls(made)

    def __call__(self, x: Tensor, y0: Tensor, weight: float, *others: Any, **named: Any) -> Tensor:
        """The merged layer's output."""
        return self.layer(x)


class ModuleWithAdapters(nn.Module):
    """A frozen module and the deltas that act on it; the switchboard says which ones in each forward."""

    def __init__(self, layer: TargetModule, board: ForwardContext) -> None:
        super().__init__()
        self.base = layer.module
        self.deltas = nn.ModuleDict()
        self.serving_layers: dict[
            str, LoRAView | MergedLinear
        ] = {}  # those that the serving engine has put here
        self.layer, self._board = layer, board
        self._kept: FusedAdapters | None = None

    @property
    def weight(self) -> Tensor:
        """The weight in use, frozen or fully trained: some models look at their layers' weights directly."""
        return self._in_use("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias in use."""
        return self._in_use("bias")

    def _in_use(self, name: str) -> Any:
        trained = [
            d
            for name, _ in self._board.segments.global_adapters
            if (d := self.adapter_layer(name)) is not None and d.replaces_base
        ]
        return getattr(trained[0] if trained else self.base, name)

    def adapter_layer(self, name: str) -> Any:
        """What the adapter `name` has here; None where it has nothing."""
        return self.serving_layers.get(name) or self.deltas._modules.get(name)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """y0 plus each acting adapter's part; x (..., in) is the flat run, or rows that make one when flattened.

        `others` and `named` are what modules that are no plain layer (experts, learned positions) take besides.
        """
        segments = self._board.segments
        if not segments.global_adapters and not segments.spans:
            return self.base(x, *others, **named)
        if not segments.spans and len(segments.global_adapters) == 1:
            delta, weight = (
                self.adapter_layer(segments.global_adapters[0][0]),
                segments.global_adapters[0][1],
            )
            if delta is None:
                return self.base(x, *others, **named)
            if delta.replaces_base:
                return delta(x, x, weight, *others, **named)
        lean = self._lean(segments, x) if bypasses_dispatcher() else None
        if lean is not None and lean.alone:
            return lean.add(self.base(x, *others, **named), x)
        if lean is None and (rows := self._grouped_alone(segments, x)):
            return self._adapted(x, rows)
        apart = () if lean is None else lean.names  # what acts below, in one product
        acting = [
            (d, weight)
            for n, weight in segments.global_adapters
            if n not in apart and (d := self.adapter_layer(n)) is not None
        ]
        rows = [
            row
            for row in segments.spans
            if row.adapter not in apart and self.adapter_layer(row.adapter) is not None
        ]
        if any(delta.replaces_base for delta, _ in acting) or any(
            self.adapter_layer(row.adapter).replaces_base for row in rows
        ):
            raise SettingsError("a fully fine-tuned layer acts alone and everywhere", where="route")
        y = self.base(x, *others, **named)
        if acting or rows:
            y = y0 = self.layer.channels_last(y)
            for (
                delta,
                weight,
            ) in acting:  # each sees the base's output; the first one's sum needs no second pass
                y = delta(x, y0, weight) if y is y0 else y + (delta(x, y0, weight) - y0)
            if rows:
                y = self._add_rows(x, y0, y, rows, segments.unit)
            y = self.layer.restore_layout(y)
        return y if lean is None else lean.add(y, x)

    def _grouped_alone(self, segments: Segments, x: Tensor) -> list[Segment]:
        """The rows of what acts, where kernels know all of it, the base is plain and frozen, and gradients are wanted."""
        base: Any = self.base
        if (
            type(base) not in (*LINEAR_TYPES, NF4Linear)
            or segments.unit != "token"
            or not torch.is_grad_enabled()
        ):
            return []
        held = (
            []
            if isinstance(base, NF4Linear)
            else [p for p in (base.weight, base.bias) if p is not None]
        )
        if torch.compiler.is_compiling() or any(p.requires_grad for p in held):
            return []
        if x.ndim < 2 or not kernels.uses_cpp(x, *held):
            return []
        rows = [
            row
            for row in _rows(segments, x.shape[:-1].numel())
            if self.adapter_layer(row.adapter) is not None
        ]
        return (
            rows if all(prefers_fused(self.adapter_layer(row.adapter), row) for row in rows) else []
        )

    def _adapted(self, x: Tensor, rows: list[Segment]) -> Tensor:
        """The base's product and the parts of `rows`, as one operation."""
        base: Any = self.base

        def back(grad: Tensor) -> Tensor:
            return grad @ (
                base.dequantize(grad.dtype) if isinstance(base, NF4Linear) else base.weight
            )

        return linear_with_adapters(x, base, back, _groups(rows, self.adapter_layer))

    def _lean(self, segments: Segments, x: Tensor) -> "FusedAdapters | None":
        """One product for all low-rank deltas that act, where nothing is learned.

        It is kept: a table is the same in all layers of a forward, and mostly in the next step of decoding.
        """
        kept = self._kept
        if kept is None or not kept.is_valid_for(segments, x):
            self._kept = kept = (
                None if self.layer.channels_first else FusedAdapters.prepare(segments, x, self)
            )
        return kept

    def _add_rows(self, x: Tensor, y0: Tensor, y: Tensor, rows: list[Segment], unit: str) -> Tensor:
        """Add each adapter's part to a copy of y, on its tokens (features last) or on its rows of the batch.

        The rows of an adapter are gathered, so that it does one product however many sequences it serves.
        """
        flat = unit == "token"
        if (
            flat
            and x.is_floating_point()
            and not self.layer.channels_first
            and kernels.has_kernel(x, y)
        ):
            y = self._add_groups(
                x, y, [row for row in rows if has_fused_kernel(self.adapter_layer(row.adapter))]
            )
            if not (
                rows := [
                    row for row in rows if not has_fused_kernel(self.adapter_layer(row.adapter))
                ]
            ):
                return y
        inputs = x.flatten(0, -2 if x.is_floating_point() else -1) if flat else x
        before, out = (y0.flatten(0, -2), y.flatten(0, -2).clone()) if flat else (y0, y.clone())
        groups: dict[tuple[str, float], list[Tensor]] = {}
        for row in rows:
            groups.setdefault((row.adapter, row.weight), []).append(
                torch.arange(row.start, row.end, device=x.device)
            )
        for (name, weight), ranges in groups.items():
            index = torch.cat(ranges)
            part = before[index]
            out = out.index_add(
                0, index, self.adapter_layer(name)(inputs[index], part, weight) - part
            )
        return out.view(y.shape)

    def _add_groups(self, x: Tensor, y: Tensor, rows: list[Segment]) -> Tensor:
        """The same for what kernels know, which copy y once a kind."""
        flat, run = y.flatten(0, -2), x.flatten(0, -2)
        for group in _groups(rows, self.adapter_layer):
            flat = group.apply(flat, run)
        return flat.view(y.shape)


class FusedAdapters:
    """The products of the deltas that act in one layer and that kernels know, ready for it, and what they hold for."""

    def __init__(
        self, segments: Segments, x: Tensor, adapted: ModuleWithAdapters, rows: list[Segment]
    ) -> None:
        named = dict.fromkeys(
            [
                *(name for name, _ in segments.global_adapters),
                *(row.adapter for row in segments.spans),
            ]
        )
        self._segments, self._shape, self._dtype = segments, x.shape, x.dtype
        self._find, self._named, self._found = (
            adapted.adapter_layer,
            list(named),
            [adapted.adapter_layer(name) for name in named],
        )
        acting: dict[str, Any] = {row.adapter: adapted.adapter_layer(row.adapter) for row in rows}
        self.names = list(acting)
        self.alone = all(
            found is None or name in acting for name, found in zip(named, self._found, strict=True)
        )
        self._products = _prepared(x, adapted.layer.out_features, rows, adapted.adapter_layer)
        learned = [
            delta for delta in acting.values() if not isinstance(delta, LoRAView)
        ]  # a served one stays as it is
        self._learned, self._made = learned, [delta._inference_cache for delta in learned]
        self._sources = [t for delta in learned for t in delta.parameters() if not t.is_inference()]
        self._versions = [t._version for t in self._sources]

    @classmethod
    def prepare(
        cls, segments: Segments, x: Tensor, adapted: ModuleWithAdapters
    ) -> "FusedAdapters | None":
        """The products for what acts on x; None where kernels know nothing of it, or PyTorch's own are faster."""
        if (
            segments.unit != "token"
            or not x.is_floating_point()
            or x.ndim < 2
            or not kernels.uses_cpp(x)
        ):
            return None
        rows = [
            row
            for row in _rows(segments, x.shape[:-1].numel())
            if prefers_fused(adapted.adapter_layer(row.adapter), row)
        ]
        return cls(segments, x, adapted, rows) if rows else None

    def is_valid_for(self, segments: Segments, x: Tensor) -> bool:
        """Whether it still holds; an equal table of the next step takes the place of the last one."""
        if segments is not self._segments:
            if segments != self._segments:
                return False
            self._segments = segments
        return (
            x.shape == self._shape
            and x.dtype == self._dtype
            and all(map(is_, map(self._find, self._named), self._found))
            and all(map(is_, [delta._inference_cache for delta in self._learned], self._made))
            and [t._version for t in self._sources] == self._versions
        )

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y, to which the deltas are added in place."""
        y = y if y.dtype == x.dtype and y.is_contiguous() else y.to(x.dtype).contiguous()
        for product in self._products:
            product.add(y, x)
        return y


def _rows(segments: Segments, tokens: int) -> list[Segment]:
    """All that acts, as rows."""
    return [
        *(Segment(0, tokens, name, weight) for name, weight in segments.global_adapters),
        *segments.spans,
    ]


def prefers_fused(delta: Any, row: Segment) -> bool:
    """Whether a kernel knows the delta, and is faster on this row than PyTorch's products are."""
    return has_fused_kernel(delta) and (
        delta.fused_kernel == "mora"
        or row.end - row.start <= FUSED_MAX_TOKENS or len(delta.a) <= FUSED_MAX_RANK
    )


def has_fused_kernel(delta: Any) -> bool:
    """Whether what the delta adds now is what a kernel does for many at once, and nothing else; False for none."""
    if delta is None or delta.fused_kernel is None:
        return False
    return isinstance(delta, LoRAView) or (
        delta.restart_delta is None and not (delta.dropout and delta.training)
    )


Find = Callable[[str], Any]


def _of_kind(
    rows: list[Segment], find: Find, kernel: str
) -> tuple[list[lowrank.SegmentRow], list[Any]]:
    """The rows of one kind of deltas as its kernel takes them, and the deltas that they number."""
    deltas = {row.adapter: find(row.adapter) for row in rows if find(row.adapter).fused_kernel == kernel}
    names = list(deltas)
    mine = [row for row in rows if row.adapter in deltas]
    return [
        (r.start, r.end, names.index(r.adapter), r.weight * deltas[r.adapter].scale) for r in mine
    ], list(deltas.values())


def _groups(rows: list[Segment], find: Find) -> list[AdapterGroup]:
    """What acts, each kind as its kernel takes it."""
    groups: list[AdapterGroup] = []
    thin, thins = _of_kind(rows, find, "lora")
    if thin:
        groups.append(lowrank.LoRAGroup(thin, [d.a for d in thins], [d.b for d in thins]))
    wide, squares = _of_kind(rows, find, "mora")
    if wide:
        groups.append(square.MoRAGroup(wide, [d.layout for d in squares], [d.m for d in squares]))
    return groups


def _prepared(
    x: Tensor, out: int, rows: list[Segment], find: Find
) -> list[lowrank.FusedLoRA | square.FusedMoRA]:
    """The same for inference."""
    made: list[lowrank.FusedLoRA | square.FusedMoRA] = []
    thin, thins = _of_kind(rows, find, "lora")
    if thin:
        made.append(
            lowrank.FusedLoRA(
                x.shape[:-1].numel(),
                thin,
                *zip(*[d.inference_weights(x.dtype) for d in thins], strict=True),
            )
        )
    wide, squares = _of_kind(rows, find, "mora")
    if wide:
        made.append(
            square.FusedMoRA(
                x, out, wide, [d.layout for d in squares], [d.units(x.dtype) for d in squares]
            )
        )
    return made


class ParameterWithAdapters(nn.Module):
    """What stands for a loose parameter where it is used: the frozen one, or the trained one of the adapter that acts."""

    def __init__(self, board: ForwardContext, order: list[str]) -> None:
        super().__init__()
        self.deltas = nn.ModuleDict()
        self._board, self.order = (
            board,
            order,
        )  # the owner's parameters in their order, for the way back

    def forward(self, frozen: Tensor) -> Tensor:
        """The parameter in use, in its own shape."""
        segments = self._board.segments
        acting = [
            (self.deltas[name], weight)
            for name, weight in segments.global_adapters
            if name in self.deltas
        ]
        if any(row.adapter in self.deltas for row in segments.spans) or (
            acting and len(segments.global_adapters) > 1
        ):
            raise SettingsError(
                "a fully fine-tuned parameter acts alone and everywhere", where="route"
            )
        return acting[0][0](frozen, frozen, acting[0][1]) if acting else frozen
