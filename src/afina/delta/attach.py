"""Attach adapters to a model and take them off again, leaving it as it was.

Attaching replaces the targeted modules, openly and in this one file, by `Adapted` ones that hold the frozen
module and the deltas of any number of adapters. Detaching puts the very same modules back.
"""

from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from afina.base.fast import PLAIN
from afina.base.nf4 import NF4Linear
from afina.delta.contract import Delta, Spec, check_options, method
from afina.delta.layers import Layer, Loose
from afina.delta.tokens import Tokens
from afina.errors import AdapterError, SettingsError
from afina.kernels.lowrank import Prepared, adapted_linear, grouped_lowrank
from afina.kernels.native import direct, kernels
from afina.route.invocation import Route
from afina.segments import Segment, Segments, Switchboard

# PyTorch's products of one adapter beat the kernel beyond both: many tokens, and no small rank
LONG, THIN = 128, 16


class Adapted(nn.Module):
    """A frozen module and the deltas that act on it; the switchboard says which ones in each forward."""

    def __init__(self, layer: Layer, board: Switchboard) -> None:
        super().__init__()
        self.base = layer.module
        self.deltas = nn.ModuleDict()
        self._layer, self._board = layer, board
        self._kept: _Lean | None = None

    @property
    def weight(self) -> Tensor:
        """The weight in use, frozen or fully trained: some models look at their layers' weights directly."""
        return self._in_use("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias in use."""
        return self._in_use("bias")

    def _in_use(self, name: str) -> Any:
        trained = [self._delta(a) for a, _ in self._board.current.everywhere if a in self.deltas and self._delta(a).replaces]
        return getattr(trained[0] if trained else self.base, name)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """y0 plus each acting adapter's part; x (..., in) is the flat run, or rows that make one when flattened.

        `others` and `named` are what modules that are no plain layer (experts, learned positions) take besides.
        """
        segments = self._board.current
        if not segments.everywhere and not segments.rows:
            return self.base(x, *others, **named)
        lean = self._lean(segments, x) if direct() else None
        if lean is not None and lean.alone:
            return lean.add(self.base(x, *others, **named), x)
        if lean is None and (rows := self._thin_alone(segments, x)):
            return self._adapted(x, rows)
        apart = () if lean is None else lean.names  # what acts below, in one product
        acting = [(self._delta(n), weight) for n, weight in segments.everywhere if n in self.deltas and n not in apart]
        rows = [row for row in segments.rows if row.adapter in self.deltas and row.adapter not in apart]
        if any(delta.replaces for delta, _ in acting) or any(self._delta(row.adapter).replaces for row in rows):
            if rows or len(segments.everywhere) > 1:
                raise SettingsError("a fully fine-tuned layer acts alone and everywhere", where="route")
            return acting[0][0](x, x, acting[0][1], *others, **named)
        y = self.base(x, *others, **named)
        if acting or rows:
            y = y0 = self._layer.to_rows(y)
            for delta, weight in acting:  # each sees the base's output; the first one's sum needs no second pass
                y = delta(x, y0, weight) if y is y0 else y + (delta(x, y0, weight) - y0)
            if rows:
                y = self._add_rows(x, y0, y, rows, segments.unit)
            y = self._layer.from_rows(y)
        return y if lean is None else lean.add(y, x)

    def _thin_alone(self, segments: Segments, x: Tensor) -> list[Segment]:
        """The rows of what acts, where all of it is low-rank, the base plain and frozen, and gradients are wanted."""
        base: Any = self.base
        if type(base) not in (*PLAIN, NF4Linear) or segments.unit != "token" or not torch.is_grad_enabled():
            return []
        held = [] if isinstance(base, NF4Linear) else [p for p in (base.weight, base.bias) if p is not None]
        if torch.compiler.is_compiling() or x.ndim < 2 or not kernels.take(x, *held) or any(p.requires_grad for p in held):
            return []
        rows = [row for row in _rows(segments, x.shape[:-1].numel()) if row.adapter in self.deltas]
        deltas = {row.adapter: self._delta(row.adapter) for row in rows}
        suits = all(map(_is_thin, deltas.values())) and all(_suits(deltas[row.adapter], row) for row in rows)
        return rows if suits else []

    def _adapted(self, x: Tensor, rows: list[Segment]) -> Tensor:
        """The base's product and the parts of `rows`, as one operation."""
        base: Any = self.base
        deltas: dict[str, Any] = {row.adapter: self.deltas[row.adapter] for row in rows}
        names = list(deltas)
        table = [(row.start, row.end, names.index(row.adapter), row.weight * deltas[row.adapter].scale) for row in rows]
        a, b = [delta.a for delta in deltas.values()], [delta.b for delta in deltas.values()]

        def back(grad: Tensor) -> Tensor:
            return grad @ (base.dequantize(grad.dtype) if isinstance(base, NF4Linear) else base.weight)

        return adapted_linear(x, base, back, table, a, b)

    def _lean(self, segments: Segments, x: Tensor) -> "_Lean | None":
        """One product for all low-rank deltas that act, where nothing is learned.

        It is kept: a table is the same in all layers of a forward, and mostly in the next step of decoding.
        """
        kept = self._kept
        if kept is None or not kept.is_for(segments, x, self.deltas._modules):
            self._kept = kept = None if self._layer.channels_first else _Lean.prepare(segments, x, self.deltas)
        return kept

    def _delta(self, name: str) -> Delta:
        delta = self.deltas[name]
        assert isinstance(delta, Delta)
        return delta

    def _add_rows(self, x: Tensor, y0: Tensor, y: Tensor, rows: list[Segment], unit: str) -> Tensor:
        """Add each adapter's part to a copy of y, on its tokens (features last) or on its rows of the batch.

        The rows of an adapter are gathered, so that it does one product however many sequences it serves.
        """
        flat = unit == "token"
        if flat and x.is_floating_point() and not self._layer.channels_first and kernels.take(x, y):
            deltas = {row.adapter: self._delta(row.adapter) for row in rows}
            if all(map(_is_thin, deltas.values())):
                return self._add_thin(x, y, rows, deltas)
        inputs = x.flatten(0, -2 if x.is_floating_point() else -1) if flat else x
        before, out = (y0.flatten(0, -2), y.flatten(0, -2).clone()) if flat else (y0, y.clone())
        groups: dict[tuple[str, float], list[Tensor]] = {}
        for row in rows:
            groups.setdefault((row.adapter, row.weight), []).append(torch.arange(row.start, row.end, device=x.device))
        for (name, weight), ranges in groups.items():
            index = torch.cat(ranges)
            part = before[index]
            out = out.index_add(0, index, self._delta(name)(inputs[index], part, weight) - part)
        return out.view(y.shape)

    @staticmethod
    def _add_thin(x: Tensor, y: Tensor, rows: list[Segment], deltas: dict[str, Any]) -> Tensor:
        """The same in one product, where all that acts is low-rank."""
        names = list(deltas)
        table = [(row.start, row.end, names.index(row.adapter), row.weight * deltas[row.adapter].scale) for row in rows]
        a, b = [delta.a for delta in deltas.values()], [delta.b for delta in deltas.values()]
        return grouped_lowrank(y.flatten(0, -2), x.flatten(0, -2), table, a, b).view(y.shape)


class _Lean:
    """The product of the low-rank deltas that act in one layer, ready for it, and what it holds for."""

    def __init__(self, segments: Segments, x: Tensor, deltas: nn.ModuleDict, rows: list[Segment]) -> None:
        named = dict.fromkeys([*(name for name, _ in segments.everywhere), *(row.adapter for row in segments.rows)])
        self._segments, self._shape, self._dtype = segments, x.shape, x.dtype
        self._named, self._deltas = list(named), [deltas._modules.get(name) for name in named]
        acting: dict[str, Any] = {row.adapter: deltas[row.adapter] for row in rows}
        self.names = list(acting)
        self.alone = not named.keys() & deltas.keys() - acting.keys()  # whether nothing else acts here
        matrices = [delta.thin(x.dtype) for delta in acting.values()]
        self._acting, self._made = list(acting.values()), [delta.made for delta in acting.values()]
        self._sources = [t for delta in acting.values() for t in (delta.a, delta.b) if not t.is_inference()]
        self._versions = [t._version for t in self._sources]
        table = [(row.start, row.end, self.names.index(row.adapter), row.weight * acting[row.adapter].scale) for row in rows]
        self._product = Prepared(x.shape[:-1].numel(), table, *zip(*matrices, strict=True))

    @classmethod
    def prepare(cls, segments: Segments, x: Tensor, deltas: nn.ModuleDict) -> "_Lean | None":
        """The product for what acts on x; None where nothing is low-rank, or PyTorch's own products are faster."""
        if segments.unit != "token" or not x.is_floating_point() or x.ndim < 2 or not kernels.take(x):
            return None
        rows = [row for row in _rows(segments, x.shape[:-1].numel()) if row.adapter in deltas]
        rows = [row for row in rows if _is_thin(deltas[row.adapter]) and _suits(deltas[row.adapter], row)]
        return cls(segments, x, deltas, rows) if rows else None

    def is_for(self, segments: Segments, x: Tensor, deltas: dict[str, Any]) -> bool:
        """Whether it still holds; an equal table of the next step takes the place of the last one."""
        if segments is not self._segments:
            if segments != self._segments:
                return False
            self._segments = segments
        return (
            x.shape == self._shape
            and x.dtype == self._dtype
            and all(map(is_, map(deltas.get, self._named), self._deltas))
            and all(map(is_, [delta.made for delta in self._acting], self._made))
            and [t._version for t in self._sources] == self._versions
        )

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y, to which the deltas are added in place."""
        y = y if y.dtype == x.dtype and y.is_contiguous() else y.to(x.dtype).contiguous()
        return self._product.add(y, x)


def _rows(segments: Segments, tokens: int) -> list[Segment]:
    """All that acts, as rows."""
    return [*(Segment(0, tokens, name, weight) for name, weight in segments.everywhere), *segments.rows]


def _suits(delta: Any, row: Segment) -> bool:
    """Whether the kernel is faster on this row than PyTorch's products are."""
    return row.end - row.start <= LONG or len(delta.a) <= THIN


def _is_thin(delta: Any) -> bool:
    """Whether the delta adds scale * B A x now, and nothing else."""
    return delta.low_rank and delta.accumulated is None and not (delta.dropout and delta.training)


class AdaptedParameter(nn.Module):
    """What stands for a loose parameter where it is used: the frozen one, or the trained one of the adapter that acts."""

    def __init__(self, board: Switchboard, order: list[str]) -> None:
        super().__init__()
        self.deltas = nn.ModuleDict()
        self._board, self.order = board, order  # the owner's parameters in their order, for the way back

    def forward(self, frozen: Tensor) -> Tensor:
        """The parameter in use, in its own shape."""
        segments = self._board.current
        acting = [(self.deltas[name], weight) for name, weight in segments.everywhere if name in self.deltas]
        if any(row.adapter in self.deltas for row in segments.rows) or (acting and len(segments.everywhere) > 1):
            raise SettingsError("a fully fine-tuned parameter acts alone and everywhere", where="route")
        return acting[0][0](frozen, frozen, acting[0][1]) if acting else frozen


class Adapter:
    """An adapter attached to a model: its name, its spec, and its deltas by module path."""

    def __init__(self, name: str, spec: Spec, deltas: dict[str, Delta]) -> None:
        self.name, self.spec, self.deltas = name, spec, deltas

    @property
    def route(self) -> Route:
        """How the adapter acts when it is on."""
        return Route(self.name, self.spec.invocation)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("module path.parameter", parameter), each tied parameter once, in the order of the model."""
        seen: set[int] = set()
        for path, delta in self.deltas.items():
            for name, parameter in delta.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [parameter for _, parameter in self.named_parameters()]

    def count(self) -> int:
        """How many numbers the adapter learns."""
        return sum(p.numel() for p in self.parameters())

    def train(self, mode: bool = True) -> None:
        """Turn dropout on the adapter's path on or off."""
        for delta in self.deltas.values():
            delta.train(mode)


def frozen_module(model: nn.Module, path: str) -> nn.Module:
    """The base's own module at `path`, also where adapters sit on it; a loose parameter as a module."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return Loose(_loose(model, path))
    return module.base if isinstance(module, Adapted) else module


def _loose(model: nn.Module, path: str) -> nn.Parameter:
    """The base's own parameter at `path`."""
    parent, _, name = path.rpartition(".")
    try:
        owner: Any = model.get_submodule(parent)
        own = owner.parametrizations[name].original if parametrize.is_parametrized(owner, name) else getattr(owner, name)
    except AttributeError:
        own = None
    if not isinstance(own, nn.Parameter):
        raise AdapterError("the base has no such layer", where=path, why="the adapter is for another model")
    return own


def seat(model: nn.Module, path: str) -> Adapted | AdaptedParameter | None:
    """Where the deltas at `path` sit; None where there are none."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        owner: Any = model.get_submodule(path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        return owner.parametrizations[name][0] if parametrize.is_parametrized(owner, name) else None
    return module if isinstance(module, Adapted) else None


def _take_seat(model: nn.Module, layer: Layer, board: Switchboard) -> Adapted | AdaptedParameter:
    """A new place for deltas, put into the model: instead of a module, or over a loose parameter."""
    if not isinstance(layer.module, Loose):
        _put(model, layer.path, made := Adapted(layer, board))
        return made
    parent, _, name = layer.path.rpartition(".")
    owner = model.get_submodule(parent)
    over = AdaptedParameter(board, list(owner._parameters))
    parametrize.register_parametrization(owner, name, over)
    return over


def _leave_seat(model: nn.Module, path: str, place: Adapted | AdaptedParameter) -> None:
    """The way back: the very same module or parameter, in its old place."""
    if isinstance(place, Adapted):
        return _put(model, path, place.base)
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
    for known in [n for n in place.order if n in owner._parameters]:
        owner._parameters[known] = owner._parameters.pop(known)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def attach(model: nn.Module, board: Switchboard, name: str, spec: Spec, seed: int = 0) -> Adapter:
    """Put a new adapter on `model`; until the board routes to it, nothing changes.

    Deltas start from `seed`, in the order of the targets. Raises `AdapterError` where the name is taken or a layer
    is not of a kind that the method can act on.
    """
    kind = method(spec.method)
    check_options(kind, spec)
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Delta] = {}
    tied: dict[int, nn.Parameter] = {}
    vocabulary = vocabulary_layers(model) if spec.tokens else []
    for path in [*spec.targets, *spec.modules, *vocabulary]:
        layer = Layer(path, frozen_module(model, path))
        own = Tokens if path in vocabulary else method("full") if path in spec.modules else kind
        if own.kinds == "matrix" and not layer.is_matrix:
            raise AdapterError(f"{spec.method} cannot act on a {type(layer.module).__name__}", where=path)
        if (at := seat(model, path)) is not None and name in at.deltas:
            raise AdapterError(f"an adapter named {name!r} is attached already", where=path)
        if path in deltas:
            why = "the rows of the new tokens would be adapted twice"
            raise AdapterError("this layer is a target already", where=path, why=why, hint="leave it out of --targets")
        deltas[path] = own(layer, spec, generator)
        if deltas[path].replaces or path in vocabulary:
            _keep_ties(layer, deltas[path], tied)
    for path, delta in deltas.items():
        place = seat(model, path) or _take_seat(model, delta.layer, board)
        place.deltas[name] = delta
    return Adapter(name, spec, deltas)


def _keep_ties(layer: Layer, delta: Delta, tied: dict[int, nn.Parameter]) -> None:
    """Parameters that are one in the base are one in the trained copy."""
    originals = dict(layer.module.named_parameters(recurse=False))
    for name, own in list(delta.named_parameters(recurse=False)):
        if id(originals[name]) in tied:
            delta.share(name, tied[id(originals[name])])  # type: ignore[operator]
        else:
            tied[id(originals[name])] = own


def vocabulary_layers(model: Any) -> list[str]:
    """Paths of the embedding and of the output layer, tied or not."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [path for path, module in model.named_modules() if any(module is layer for layer in wanted)]


def detach(model: nn.Module, adapter: Adapter) -> None:
    """Take an adapter off; modules without any get back their place, untouched."""
    for path in adapter.deltas:
        place = seat(model, path)
        assert place is not None
        del place.deltas[adapter.name]
        if not place.deltas:
            _leave_seat(model, path, place)
