"""Arguments of the calls in a training script, read from its syntax tree; nothing is run."""

import ast
import builtins
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.errors import SettingsError

CONFIGS = re.compile(r"(\w+Config|TrainingArguments)")
LORA_CALLS = ("LoraConfig", "get_peft_model")
TRAINERS = ("SFT", "DPO", "KTO", "ORPO", "Reward", "GRPO", "RLOO")
# arguments that are objects of the script, not settings
OBJECTS = (
    "model", "ref_model", "tokenizer", "processing_class", "args", "train_dataset", "eval_dataset",
    "peft_config", "data_collator", "formatting_func", "callbacks", "compute_metrics", "optimizers",
    "quantization_config",
)  # fmt: skip
ROW_CALLS = ("map", "filter", "select", "standardize_sharegpt", "standardize_data_formats",
             "to_sharegpt")  # fmt: skip
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
MAX_CONSTANT = 2**40  # of a product


@dataclass
class PythonKeys:
    """What the calls of a script set: keys, unread keys with their source, and names of calls."""

    keys: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)
    row_calls: dict[str, str] = field(default_factory=dict)  # calls that change rows: their source
    trainer: str | None = None


def python_keys(file: Path, source: str) -> PythonKeys:
    """Return the keys in a script's calls of PEFT, TRL, transformers, Unsloth and datasets.

    Raises:
        SettingsError: It is no Python.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        where = f"{file}:{error.lineno}"
        raise SettingsError("not valid Python", where=where, why=error.msg) from None
    found, constants = PythonKeys(), _constants(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.modules.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            _read_call(node, constants, found)
    return found


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Return the names that the script assigns one constant to."""
    found: dict[str, Any] = {}
    changed: set[str] = set()
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Name):
                known, value = _value(node.value, found)  # type: ignore[attr-defined]
                if not known or (target.id in found and found[target.id] != value):
                    changed.add(target.id)
                else:
                    found[target.id] = value
    return {name: value for name, value in found.items() if name not in changed}


def _read_call(node: ast.Call, constants: dict[str, Any], found: PythonKeys) -> None:
    name = _name(node.func)
    found.calls.add(name)
    if name in ROW_CALLS and (isinstance(node.func, ast.Attribute) or name not in dir(builtins)):
        found.row_calls.setdefault(f"rows.{name}", ast.unparse(node))
    if any(keyword.arg == "formatting_func" for keyword in node.keywords):
        found.row_calls["rows.formatting_func"] = ast.unparse(node.func)
    trainer = next((kind for kind in TRAINERS if name in (f"{kind}Trainer", f"{kind}Config")), None)
    if trainer is not None:
        found.trainer = trainer.lower()
    if name == "load_dataset":
        _read_data(node, constants, found)
    elif name == "get_chat_template":
        _take(found, "chat_template", _argument(node, 1, "chat_template"), constants)
    elif name == "BitsAndBytesConfig":
        _take_all(node, constants, found)
    elif name == "from_pretrained":
        model = node.args[0] if node.args else None
        owner = _name(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if owner.startswith(("Fast", "AutoModel")):
            key = "model_name" if owner.startswith("Fast") else "model_name_or_path"
            _take(found, key, model, constants)
            _take_all(node, constants, found)
    elif name in LORA_CALLS or trainer is not None or CONFIGS.fullmatch(name):
        if name.endswith("Trainer") and isinstance(model := _argument(node, 0, "model"), ast.expr):
            known, value = _value(model, constants)
            if known and isinstance(value, str):
                found.keys.setdefault("model_name_or_path", value)
        _take_all(node, constants, found)


def _read_data(node: ast.Call, constants: dict[str, Any], found: PythonKeys) -> None:
    """Read the first load_dataset of a script."""
    if "dataset_name" in found.keys:
        return
    files = _argument(node, -1, "data_files")
    known, names = (False, None) if files is None else _value(files, constants)
    if known:
        value = names.get("train") if isinstance(names, dict) else names
        found.keys["dataset_name"] = value[0] if isinstance(value, list) else value
        return
    _take(found, "dataset_name", _argument(node, 0, "path"), constants)
    _take(found, "dataset_config", _argument(node, 1, "name"), constants)
    _take(found, "dataset_train_split", _argument(node, -1, "split"), constants)


def _argument(node: ast.Call, position: int, name: str) -> ast.expr | None:
    """Return an argument of a call by its name or its position; -1 is none."""
    by_name = (keyword.value for keyword in node.keywords if keyword.arg == name)
    given = node.args[position] if 0 <= position < len(node.args) else None
    return next(by_name, given)


def _take_all(node: ast.Call, constants: dict[str, Any], found: PythonKeys) -> None:
    for keyword in node.keywords:
        if keyword.arg and keyword.arg not in OBJECTS:
            _take(found, keyword.arg, keyword.value, constants)


def _take(found: PythonKeys, key: str, node: ast.expr | None, constants: dict[str, Any]) -> None:
    if node is None:
        return
    known, value = _value(node, constants)
    if known:
        found.keys[key] = value
        found.unread.pop(key, None)
    elif key not in found.keys:
        found.unread[key] = ast.unparse(node)


def _value(node: ast.expr, constants: dict[str, Any]) -> tuple[bool, Any]:
    """Return whether an expression is a constant, and its value.

    Constants, names of constants, lists, tuples, dictionaries, numbers with + - * /, `torch.dtype`
    and functions by their names (as "<name>") are; the precision of the machine is not.
    """
    if isinstance(node, ast.Name) and node.id in constants:
        return True, constants[node.id]
    if isinstance(node, ast.Attribute) and _name(node.value) == "torch":
        return True, f"torch.{node.attr}"
    if isinstance(node, ast.List | ast.Tuple):
        parts = [_element(element, constants) for element in node.elts]
        return all(known for known, _ in parts), [value for _, value in parts]
    if isinstance(node, ast.Dict):
        keys = [_value(key, constants) if key else (False, None) for key in node.keys]
        values = [_value(value, constants) for value in node.values]
        known = all(one for one, _ in (*keys, *values))
        return known, {k: v for (_, k), (_, v) in zip(keys, values)} if known else None
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return _calculated(node, constants)
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False, None


def _element(node: ast.expr, constants: dict[str, Any]) -> tuple[bool, Any]:
    """Return an element of a list; a function is its name between angle brackets."""
    known, value = _value(node, constants)
    return (True, f"<{node.id}>") if not known and isinstance(node, ast.Name) else (known, value)


def _calculated(node: ast.BinOp, constants: dict[str, Any]) -> tuple[bool, Any]:
    left, right = _value(node.left, constants), _value(node.right, constants)
    numbers = [value for known, value in (left, right) if known and isinstance(value, int | float)]
    if len(numbers) < 2 or max(map(abs, numbers)) > MAX_CONSTANT:
        return False, None
    try:
        return True, OPERATORS[type(node.op)](*numbers)
    except ArithmeticError:
        return False, None


def _name(node: ast.expr) -> str:
    """Return the last name of a dotted expression."""
    return next(_names(node), "")


def _names(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Call):
        yield _name(node.func)
