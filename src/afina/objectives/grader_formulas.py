"""Formulas of `multi` graders: arithmetic over scores of other graders, not executed as code."""

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

from afina.errors import SettingsError, did_you_mean

FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
VARIADIC_FUNCTIONS = ("min", "max")  # two or more arguments; the others have one
MAX_FORMULA_LENGTH = 500  # characters


def make_formula(
    text: Any, names: Mapping[str, Any], where: str
) -> Callable[[Mapping[str, float]], float]:
    """Return a formula over `names` as a function of their values; raises `SettingsError`.

    Only arithmetic is accepted. The syntax tree is evaluated node by node and never executed; all
    values are floats, so that no power takes long.
    """
    if not isinstance(text, str) or not 0 < len(text) <= MAX_FORMULA_LENGTH:
        raise SettingsError(
            f"expected a formula of up to {MAX_FORMULA_LENGTH} characters", where=where
        )
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        _check(tree, names, where)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise SettingsError("the formula cannot be read", where=where, why=str(error)) from None
    return lambda numbers: float(_value(tree, numbers))


OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: a,
}


def _check(node: ast.expr, names: Mapping[str, Any], where: str) -> None:
    """Raise `SettingsError` for anything but arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        float(node.value)  # type: ignore[arg-type]  # an integer may be too large
    elif isinstance(node, ast.Name):
        if node.id not in names:
            raise SettingsError(
                f"no grader {node.id!r}", where=where, hint=did_you_mean(node.id, names)
            )
    elif isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in OPERATORS:
        for part in _parts(node):
            _check(part, names, where)
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in FUNCTIONS
        and not node.keywords
    ):
        if (len(node.args) < 2) if node.func.id in VARIADIC_FUNCTIONS else len(node.args) != 1:
            raise SettingsError(f"{node.func.id} has the wrong number of arguments", where=where)
        for part in node.args:
            _check(part, names, where)
    else:
        hint = "numbers, names of graders, + - * / ^, and " + ", ".join(FUNCTIONS)
        raise SettingsError(
            f"not allowed in a formula: {ast.unparse(node)[:60]}", where=where, hint=hint
        )


def _parts(node: ast.BinOp | ast.UnaryOp) -> list[ast.expr]:
    return [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]


def _value(node: ast.expr, numbers: Mapping[str, float]) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return float(FUNCTIONS[node.func.id](*(_value(part, numbers) for part in node.args)))
    assert isinstance(node, ast.BinOp | ast.UnaryOp)
    return OPERATORS[type(node.op)](*(_value(part, numbers) for part in _parts(node)))
