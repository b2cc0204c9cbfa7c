"""What a delta is: D_k in the one equation, at one layer.

    y[t] = y0[t] + sum over k of w_k[t] * D_k(x[t], y0[t])

A method is one file in this folder with one class. It says how many numbers it learns (`count`), how they start
(`__init__`: the model must be unchanged), what it adds (`forward`), what a weight becomes that has taken it in
(`merged`), under which names its tensors lie on disk (`keys`), and what a pass costs (`cost`). No other file knows its
name. A method that can merge and restart also says how it begins anew (`restart`), and calls `carried` and
`with_carried`.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from afina.delta.layers import Layer
from afina.errors import SettingsError, nearest


@dataclass(frozen=True)
class Spec:
    """What an adapter is, apart from its tensors: together with them it is the adapter's identity.

    `targets` are the resolved paths of the adapted modules; `ranks` and `alphas` hold those that differ, by path.
    """

    method: str
    targets: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    scaling: str = "lora"  # or "rslora"
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    modules: tuple[str, ...] = ()  # whole small modules that the adapter owns (heads, norms): PEFT's modules_to_save
    invocation: tuple[int, ...] = ()  # aLoRA: tokens from whose last occurrence on the adapter acts
    tokens: Mapping[str, int] = field(default_factory=dict)  # tokens with rows of their own, and their numbers
    options: Mapping[str, Any] = field(default_factory=dict)  # what only one method knows, e.g. MoRA's operator

    def rank_of(self, path: str) -> int:
        """Rank at the module `path`."""
        return self.ranks.get(path, self.rank)

    def scale_of(self, path: str) -> float:
        """Factor of the update at the module `path`: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        rank, alpha = self.rank_of(path), self.alphas.get(path, self.alpha)
        return alpha / (rank**0.5 if self.scaling == "rslora" else rank)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        lists = {"targets": list(self.targets), "modules": list(self.modules), "invocation": list(self.invocation)}
        return asdict(self) | lists

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Spec":
        """The spec that `as_dict` wrote."""
        tuples = {name: tuple(values.get(name, ())) for name in ("targets", "modules", "invocation")}
        return cls(**{**values, **tuples})


@dataclass(frozen=True)
class Cost:
    """What a delta costs at one layer, for the plan: a token in numbers kept and multiply-adds, besides those of the base."""

    keeps_input: bool  # whether the backward pass needs x; layers that read the same x share it
    keeps: int  # further numbers kept for the backward pass, a token
    products: float  # multiply-adds forward, a token; the backward pass has twice as many
    once: float = 0.0  # multiply-adds with the written-out weight in each pass, however many tokens there are
    works: float = 0.0  # numbers that live while it works, a token, besides inputs and outputs and what is kept


class Delta(nn.Module):
    """One adapter's part at one layer. Subclasses live one a file in this folder, and are found there.

    Inputs x come as the layer reads them (`layer.project` and `layer.rows` make vectors of them), outputs y0 always
    with their features last, so a method needs to know matrices only.
    """

    keys: Mapping[str, str]  # parameter name -> name on disk, after the module's path
    shapes: Mapping[str, tuple[int, ...]] = {}
    peft: ClassVar[Mapping[str, Any] | None] = None  # what tells the method in a LoraConfig of PEFT; None: not known there
    options: ClassVar[tuple[str, ...]] = ()  # names that it reads in `Spec.options`
    constants: ClassVar[tuple[str, ...]] = ()  # methods without arguments whose value the gradient takes as constant
    low_rank: ClassVar[bool] = False  # True where scale * b a x, of these attributes, is all it adds (dropout, restarts aside)
    square: ClassVar[bool] = False  # True where scale * unfold(m fold(x)), of its `form` and `m`, is all it adds (likewise)
    replaces: ClassVar[bool] = False  # True where the output is the delta's own and the base need not run
    chosen: ClassVar[bool] = True  # False: no method of its own, but a part that an adapter of any method may have
    kinds: ClassVar[str] = "matrix"  # "matrix": layers with one weight matrix; "any": every module with parameters

    def __init__(self, layer: Layer, spec: Spec, generator: torch.Generator) -> None:
        """Parameters, float32, that leave the layer's output unchanged; random numbers come from `generator` (CPU)."""
        super().__init__()
        self.layer = layer
        self.accumulated: Tensor | None  # (out, in) float32: what earlier restarts merged
        self.register_buffer("accumulated", None)
        self.restarts = int(spec.options.get("restarts", 0))  # how many there were
        if self.restarts and type(self).restart is not Delta.restart:
            self.accumulated = torch.zeros(layer.out_features, layer.in_features, device=layer.device)

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """y0 + weight * D(x, y0): x the layer's input, y0 = W x + bias (..., out), not to be written into."""
        raise TypeError(f"{type(self).__name__} must say what it adds")

    def merged(self, weight: Tensor) -> Tensor:
        """The matrix (out, in), float32 or wider, of the layer that has taken this delta in."""
        raise TypeError(f"{type(self).__name__} must say what a merged weight is")

    def restart(self, generator: torch.Generator) -> None:
        """Set the parameters back to where they start, once `accumulated` holds what they said (see restart.py)."""
        raise SettingsError(f"{type(self).__name__} cannot merge and restart", where="restart_every", hint="--method lora")

    def carried(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """y0 and, weighted, what earlier restarts merged: (..., out)."""
        if self.accumulated is None:
            return y0
        return y0 + weight * self.layer.project(x, self.accumulated.to(y0.dtype))

    def with_carried(self, matrix: Tensor) -> Tensor:
        """The matrix (out, in) and what earlier restarts merged."""
        return matrix if self.accumulated is None else matrix + self.accumulated.to(matrix)

    @classmethod
    def count(cls, layer: Layer, spec: Spec) -> int:
        """How many numbers this delta learns at `layer`, by its formula."""
        raise TypeError(f"{cls.__name__} must say how many numbers it learns")

    @classmethod
    def cost(cls, layer: Layer, spec: Spec, device: str) -> Cost:
        """What it costs at `layer` on a kind of device; unless a method says better, its input and output are kept."""
        return Cost(True, layer.in_features + layer.out_features, float(cls.count(layer, spec)))


def check_options(kind: type[Delta], spec: Spec) -> None:
    """Raise `SettingsError` where an option is none that the method `kind` reads."""
    known = (*kind.options, "restart_every", "restarts")
    for name in spec.options:
        if name not in known:
            raise SettingsError(f"{spec.method} has no option {name!r}", where="options", hint=nearest(name, known[:-1]))


def methods() -> dict[str, type[Delta]]:
    """Every method by name: the files of this folder that define a `Delta`."""
    found: dict[str, type[Delta]] = {}
    package = importlib.import_module("afina.delta")
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"afina.delta.{module_info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Delta)
                and value.__module__ == module.__name__
                and value is not Delta
                and value.chosen
            ):
                found[module_info.name] = value
    return found


def method(name: str) -> type[Delta]:
    """The class of the method `name`; raises `SettingsError` naming the nearest one."""
    found = methods()
    if name not in found:
        raise SettingsError(f"unknown method {name!r}", where="method", hint=nearest(name, [*found, "freeze"]))
    return found[name]
