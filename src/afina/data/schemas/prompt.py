"""Prompts to answer, each optionally with a reference answer that a reward function can read.

plain text          one prompt per line
prompt              {"prompt": ..., "completion" (or "output", "reference"): ...}
chats               {"messages": [...]}; a last answer is the reference
Alpaca              {"instruction": ..., "input": ..., "output": ...}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.data.columns import ColumnMapping, RawRecord, usable_text
from afina.data.schemas.base import Schema, register_schema
from afina.data.schemas.messages import (
    Prompt,
    as_messages,
    parse_prompt,
    parse_tools,
    text_of,
)
from afina.errors import DataError

ITEM = "item"  # in files that afina writes: the record from which the row was read


@dataclass(frozen=True)
class PromptRow:
    """A prompt, a text to continue or messages, and the reference answer where there is one.

    `item` is the record as the file has it: a grader can read any of its fields.
    """

    where: str
    prompt: Prompt
    reference: str | None = None
    item: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """The prompt as text: itself, a single message's content, or the chat with its roles."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return text_of(self.prompt[0])
        return "\n".join(f"{message['role']}: {text_of(message)}" for message in self.prompt)

    def record(self, with_item: bool = False) -> dict[str, Any]:
        """Return the row as a record that `read_table` reads again as this row."""
        record: dict[str, Any] = {
            "prompt": self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        }
        if self.tools:
            record["tools"] = list(self.tools)
        if self.reference is not None:
            record["reference"] = self.reference
        if with_item:
            record[ITEM] = dict(self.item)
        return record


@register_schema("prompt")
class PromptSchema(Schema[PromptRow]):
    """Prompts for reinforcement learning and annotation."""

    name = "prompt"
    fields = (
        "messages",
        "prompt",
        "completion",
        "output",
        "reference",
        "instruction",
        "input",
        "system",
        "history",
        "tools",
    )
    aliases = {
        "messages": ("conversations", "input.messages"),
        "tools": ("functions", "input.tools"),
    }
    text_is_lines = True
    keeps_record = True  # a reward function can read any column

    def is_header(self, fields: set[str]) -> bool:
        """Return whether a CSV header names the prompt."""
        return "prompt" in fields

    def recognizes(self, records: Sequence[RawRecord]) -> str | None:
        """Return None: rows with a prompt can be rows of another schema as well."""
        return None

    def find_format(self, path: Path, mapping: ColumnMapping) -> str:
        """Return "prompts"."""
        return "prompts"

    def parse(self, record: RawRecord) -> PromptRow:
        """Return the prompt of a record; raises `DataError` with file:line:field."""
        if not any(record.has_column(name) for name in ("messages", "prompt", "instruction")):
            hint = "prompt, messages, or plain text with one prompt per line"
            raise DataError("no prompt", where=record.where, hint=hint)
        prompt, reference = parse_prompt(record), None
        while isinstance(prompt, tuple) and prompt and prompt[-1]["role"] == "assistant":
            reference, prompt = text_of(prompt[-1]), prompt[:-1]
        if not prompt:
            raise DataError("no prompt", where=record.where, why="there is nothing to answer")
        answer = next((n for n in ("reference", "output", "completion") if record.has(n)), None)
        if answer is not None:
            reference = usable_text(record.get(answer), record.field_location(answer))
        tools = parse_tools(record)
        if tools:  # a template writes them before messages
            prompt = as_messages(prompt, "user")
        return PromptRow(record.where, prompt, reference, _item(record), tools)


def _item(record: RawRecord) -> Mapping[str, Any]:
    """Return the record, or the one within it where afina wrote the file."""
    item = record.raw.get(ITEM)
    is_own = isinstance(item, dict) and record.raw.keys() <= {"prompt", "reference", "tools", ITEM}
    if not (is_own and item):
        return record.raw
    record.columns_read.add(ITEM)
    return item
