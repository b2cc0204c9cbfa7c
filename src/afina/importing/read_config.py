"""Read a configuration: YAML, JSON, a command line in a script, or a notebook or Python file."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from afina.errors import SettingsError
from afina.importing.python_calls import python_keys
from afina.importing.tool_table import TOOLS, tool_table
from afina.settings import read_yaml

TRL_COMMAND = re.compile(r"(?:trl\s+|\b)(sft|dpo|kto|orpo|reward|grpo|rloo)(?:\.py)?\b")
FACTORY_COMMAND = re.compile(r"llamafactory-cli\s+train|src/train\.py")
TRANSFORMERS_RATE = 5e-5  # of TrainingArguments without a learning_rate
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
MLX_COMMAND = re.compile(r"mlx_lm[. ]lora")


@dataclass(frozen=True)
class OtherConfig:
    """The keys of another trainer's configuration.

    Attributes:
        tool: Name of its table.
        keys: The keys with plain values.
        trainer: Kind of trainer, where the file names it: sft, dpo, ...
        unread: Keys of a Python file whose values are not constants, with their source.
        row_calls: Calls of a Python file that change rows, with their source.
    """

    tool: str
    keys: dict[str, Any]
    trainer: str | None = None
    unread: dict[str, str] = field(default_factory=dict)
    row_calls: dict[str, str] = field(default_factory=dict)


def read_config(file: Path, tool: str | None) -> OtherConfig:
    """Read a configuration of `tool`, which is detected by its keys where it is None.

    Raises:
        SettingsError: The file cannot be read, or is of no known tool.
    """
    if file.suffix in (".py", ".ipynb"):
        source = notebook_source(file) if file.suffix == ".ipynb" else read_text(file)
        return _from_python(file, source, tool)
    if file.suffix in (".sh", ".txt", ".bash"):
        return _from_command(file, tool)
    keys = read_json(file) if file.suffix == ".json" else read_yaml(file)
    keys = {key: _number(value) for key, value in keys.items()}
    return OtherConfig(tool or _detect(file, keys), keys)


def read_text(file: Path) -> str:
    """Return the text of a file; raise `SettingsError` where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SettingsError("cannot read the file", where=str(file), why=why) from None


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object; raise `SettingsError` on anything else."""
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise SettingsError("not valid JSON", where=str(file), why=str(error)) from None
    if not isinstance(content, dict):
        raise SettingsError("expected a JSON object", where=str(file))
    return content


def notebook_source(file: Path) -> str:
    """Return the Python of a notebook's code cells, without lines of the shell and magics."""
    cells = read_json(file).get("cells", [])
    sources = ["".join(one.get("source", "")) for one in cells if one.get("cell_type") == "code"]
    lines = "\n".join(source for source in sources if not source.startswith("%%")).split("\n")
    return "\n".join("pass" if re.match(r"\s*[!%]", line) else line for line in lines)


def _detect(file: Path, keys: Mapping[str, Any]) -> str:
    for name in TOOLS:
        if tool_table(name).is_sign(keys):
            return name
    titles = ", ".join(tool_table(name).title for name in TOOLS)
    known = {name: len(keys.keys() & tool_table(name).known) for name in TOOLS}
    best = max(known, key=lambda name: known[name])
    raise SettingsError(
        "no configuration of a known tool",
        where=str(file),
        why=f"none of its keys is what {titles} require",
        hint=f"--tool {best}" if known[best] else None,
    )


def _from_python(file: Path, source: str, tool: str | None) -> OtherConfig:
    found = python_keys(file, source)
    is_unsloth = "unsloth" in found.modules
    name = "unsloth" if is_unsloth or tool == "unsloth" else "trl_python"
    if not found.keys and not found.unread:
        raise SettingsError(
            "no configuration of a known tool",
            where=str(file),
            why="it calls none of LoraConfig, get_peft_model, SFTConfig, TrainingArguments",
        )
    keys = dict(found.keys)
    if found.calls & {"LoraConfig", "get_peft_model"}:
        keys.setdefault("use_peft", True)
    if "TrainingArguments" in found.calls and "learning_rate" not in found.unread:
        keys.setdefault("learning_rate", TRANSFORMERS_RATE)
    if "train_on_responses_only" in found.calls:
        keys.setdefault("assistant_only_loss", True)
    return OtherConfig(name, keys, found.trainer, found.unread, found.row_calls)


def _from_command(file: Path, tool: str | None) -> OtherConfig:
    """Read the first command of a script that starts a known trainer."""
    text = re.sub(r"\\\n", " ", read_text(file))
    for line in text.splitlines():
        trainer = None
        if FACTORY_COMMAND.search(line):
            name = "llama_factory"
        elif MLX_COMMAND.search(line):
            name = "mlx_lm"
        elif match := TRL_COMMAND.search(line):
            name, trainer = "trl", match[1]
        else:
            continue
        keys = command_keys(line)
        if file_name := keys.pop("config", None):
            keys = {**read_yaml(file.parent / str(file_name)), **keys}
        return OtherConfig(tool or name, keys, trainer)
    hint = "a line that starts with trl sft, python sft.py, llamafactory-cli train or mlx_lm.lora"
    raise SettingsError("no command of a known tool", where=str(file), hint=hint)


def command_keys(line: str) -> dict[str, Any]:
    """Return the flags of a command line as keys; a flag without a value is true."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise SettingsError("not a command line", why=str(error)) from None
    keys: dict[str, Any] = {}
    last: str | None = None
    for word in words:
        if word.startswith("--"):
            last, equals, value = word[2:].partition("=")
            last = last.replace("-", "_")
            keys[last] = _plain(value) if equals else True
        elif last is not None:
            before, value = keys[last], _plain(word)
            keys[last] = value if before is True else [*_as_list(before), value]
    return keys


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(text: str) -> Any:
    """Return the value of a flag's text."""
    try:
        return _number(yaml.safe_load(text))
    except yaml.YAMLError:
        return text


def _number(value: Any) -> Any:
    """Return 2e-5, which YAML reads as text, as the number that these tools take it for."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value
