"""Formats of the adapter methods' files: PEFT type, names and shapes of the tensors of a module.

The file `adapters/formats.json` is generated from the method classes (`make formats`), so that
adapters can be checked without importing torch or the code of a method. Another package names its
own file by an entry point whose value is a module and the file's name in it:

    [project.entry-points."afina.formats"]
    vera = "afina_vera:formats.json"

A shape rule is an expression of sizes, `(rank, channels, *kernel)`; two joined by `or`; or one per
a condition, `(1, outputs, *ones) if kernel else (outputs,)`. The sizes of a module are

    inputs, outputs    width of its matrix: for convolutions inputs = channels x kernel
    channels           input channels of a convolution, else `inputs`
    kernel, ones       kernel sizes of a convolution, and as many ones; else empty
    rank               rank of the adapter at the module

with the functions `isqrt` and `even` (the even number that is equal or one less, at least 2).
"""

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

from afina.errors import AfinaError, SettingsError

PEFT_LORA = "LORA"
BASE_TENSORS = ("weight", "bias")  # of modules that are saved in full
# what an adapter of any method may have: a restarted run's update, trained tokens, PEFT's base copy
EXTRA_TENSORS = ("accumulated.weight", "token_adapter.trainable_tokens_delta", "base_layer.weight")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModuleSizes:
    """Sizes of an adapted module, as shape rules name them."""

    inputs: int
    outputs: int
    rank: int
    channels: int
    kernel: Shape = ()

    @classmethod
    def from_weight(cls, weight: Shape, rank: int) -> "ModuleSizes":
        """Return the sizes of a module whose weight is (outputs, channels, *kernel)."""
        outputs, channels, *kernel = weight
        return cls(channels * math.prod(kernel), outputs, rank, channels, tuple(kernel))

    def names(self) -> dict[str, Any]:
        """Return the values of the names of a shape rule."""
        return vars(self) | {"ones": tuple(1 for _ in self.kernel)}


@dataclass(frozen=True)
class AdapterFormat:
    """What the files of one adapter method hold.

    Attributes:
        method: Name of the method.
        peft_type: `peft_type` of adapter_config.json.
        peft_fields: Fields of a PEFT LoraConfig that distinguish the method; None: not in PEFT.
        replaces_base: Whether tensors are trained copies of the base's, under its names and shapes.
        tensors: Shape rule of each tensor of a module, by its name after the module's path.
        embedding_names: Names of the same tensors at an embedding, where they differ.
        aliases: Other names under which a tensor is found.
        low_rank: Names of the tensors A (rank, inputs) and B (outputs, rank), where these are
            stored as they are used; else empty.
    """

    method: str
    peft_type: str
    peft_fields: Mapping[str, Any] | None = None
    replaces_base: bool = False
    tensors: Mapping[str, str] = field(default_factory=dict)
    embedding_names: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    low_rank: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, method: str, values: Mapping[str, Any]) -> "AdapterFormat":
        """Return the format that `to_json` wrote."""
        return cls(method, **{**values, "low_rank": tuple(values.get("low_rank", ()))})

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = {name: value for name, value in vars(self).items() if name != "method"}
        return values | {"low_rank": list(self.low_rank)}

    def tensor_sets(self) -> tuple[frozenset[str], ...]:
        """Return the sets of tensor names of a module: at a matrix, and at an embedding."""
        at_embedding = {self.embedding_names.get(name, name) for name in self.tensors}
        return tuple({frozenset(self.tensors): 0, frozenset(at_embedding): 0})

    def canonical_name(self, name: str) -> str:
        """Return the name in `tensors`, given it, an alias, or the name at embeddings."""
        name = self.aliases.get(name, name)
        return next((own for own, other in self.embedding_names.items() if other == name), name)

    def shapes(self, name: str, sizes: ModuleSizes) -> list[Shape]:
        """Return the shapes that the tensor `name` may have at a module of these sizes."""
        return evaluate_shapes(self.tensors[self.canonical_name(name)], sizes)


@cache
def adapter_formats() -> Mapping[str, AdapterFormat]:
    """Return the format of every installed method by name, sorted.

    Raises:
        SettingsError: the file of another package cannot be read, or has a registered name.
    """
    own = json.loads((files("afina") / "adapters" / "formats.json").read_text(encoding="utf-8"))
    found = {name: AdapterFormat.from_json(name, values) for name, values in own.items()}
    for point in entry_points(group="afina.formats"):
        module, _, file = point.value.partition(":")
        where = f"entry point {point.name} = {point.value} of afina.formats"
        try:
            values = json.loads((files(module) / file).read_text(encoding="utf-8"))
            others = {name: AdapterFormat.from_json(name, each) for name, each in values.items()}
        except Exception as error:  # any error of files that are not ours
            raise SettingsError("cannot be read", where=where, why=str(error)) from error
        if taken := sorted(others.keys() & found.keys()):
            raise SettingsError(f"method {taken[0]!r} is registered twice", where=where)
        found |= others
    return dict(sorted(found.items()))


def registered_types() -> Mapping[str, str | None]:
    """Return the method of each `peft_type`; None where fields of the configuration decide."""
    types: dict[str, str | None] = {PEFT_LORA: None, "AFINA_LORA": "lora"}  # the latter: restarted
    found = adapter_formats().values()
    return types | {each.peft_type: each.method for each in found if each.peft_type != PEFT_LORA}


def tensor_name_pattern() -> re.Pattern[str]:
    """Return the pattern of a tensor's name: a module's path and the name of one of its parts."""
    found = adapter_formats().values()
    parts = {*EXTRA_TENSORS, *BASE_TENSORS}
    for each in found:
        parts |= {*each.tensors, *each.embedding_names.values(), *each.aliases}
    return _name_pattern(frozenset(parts))


@cache
def _name_pattern(parts: frozenset[str]) -> re.Pattern[str]:
    choices = "|".join(re.escape(part) for part in sorted(parts))
    path = r"(?P<path>[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*?)"
    return re.compile(rf"(base_model\.model\.)?{path}\.(?P<part>{choices})")


# ---- shape rules

_FUNCTIONS: Mapping[str, Callable[[int], int]] = {
    "isqrt": math.isqrt,
    "even": lambda value: max(2, value - value % 2),
}
_OPERATORS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


class ShapeRuleError(AfinaError):
    """A shape rule that is not an expression of sizes."""


def evaluate_shapes(rule: str, sizes: ModuleSizes) -> list[Shape]:
    """Return the shapes that `rule` gives for a module of these sizes, most have one.

    Raises:
        ShapeRuleError: the rule has a part that is not described in this module's docstring.
    """
    names = sizes.names()
    tree = _parse(rule)
    options = tree.values if isinstance(tree, ast.BoolOp) else [tree]
    return [tuple(_dimensions(_chosen(option, names), names, rule)) for option in options]


@cache
def _parse(rule: str) -> ast.expr:
    try:
        return ast.parse(rule, mode="eval").body
    except SyntaxError as error:
        raise ShapeRuleError(f"no shape rule: {rule!r}", why=str(error)) from error


def _chosen(tree: ast.expr, names: Mapping[str, Any]) -> ast.expr:
    """Return the branch of a conditional rule; the condition is a name."""
    if not isinstance(tree, ast.IfExp):
        return tree
    return tree.body if names.get(ast.unparse(tree.test)) else tree.orelse


def _dimensions(tree: ast.expr, names: Mapping[str, Any], rule: str) -> Iterator[int]:
    if not isinstance(tree, ast.Tuple):
        raise ShapeRuleError(f"no shape: {ast.unparse(tree)!r}", why=f"in the rule {rule!r}")
    for element in tree.elts:
        if isinstance(element, ast.Starred):
            yield from names[ast.unparse(element.value)]
        else:
            yield _value(element, names, rule)


def _value(tree: ast.expr, names: Mapping[str, Any], rule: str) -> int:
    match tree:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in names:
            return int(names[name])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, names, rule), _value(right, names, rule))
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_value(argument, names, rule))
    raise ShapeRuleError(f"no size: {ast.unparse(tree)!r}", why=f"in the rule {rule!r}")
