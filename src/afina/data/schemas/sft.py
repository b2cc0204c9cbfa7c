"""Rows for supervised fine-tuning and pretraining: a chat, a prompt with its completion, or a text.

openai-chat         messages: [{role, content}, ...]
sharegpt            conversations: [{from, value}, ...], system (optional)
alpaca              instruction, output, and optionally input, system, history
prompt-completion   prompt, completion (or label), system (optional)
input-output        input, output, system (optional)
text                text
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.columns import ColumnMapping, RawRecord, kind_of, usable_text
from afina.data.proposals import ask_for_reading
from afina.data.schemas.base import Schema, register_schema
from afina.data.schemas.messages import (
    Message,
    parse_alpaca_prompt,
    parse_messages,
    parse_tools,
    system_message,
)
from afina.errors import DataError

# formats by their required fields; the first whose fields are all there is the file's
REQUIRED_FIELDS = (
    ("openai-chat", {"messages"}),
    ("alpaca", {"instruction", "output"}),
    ("prompt-completion", {"prompt", "completion"}),
    ("prompt-completion", {"prompt", "label"}),
    ("input-output", {"input", "output"}),
    ("text", {"text"}),
)


@dataclass(frozen=True)
class SFTRow:
    """A chat (`messages`), a `prompt` with its `completion`, or a `text`."""

    where: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()

    def record(self) -> dict[str, Any]:
        """Return the row as a record that `read_table` reads again as this row."""
        if self.messages is not None:
            tools = {"tools": list(self.tools)} if self.tools else {}
            return {"messages": list(self.messages)} | tools
        if self.prompt is not None:
            return {"prompt": self.prompt, "completion": self.completion}
        return {"text": self.text}


def format_with_fields(fields: set[str]) -> str | None:
    """Return the first format whose required fields are all among `fields`; None without one."""
    return next((name for name, required in REQUIRED_FIELDS if required <= fields), None)


@register_schema("sft")
class SFTSchema(Schema[SFTRow]):
    """Chats, prompts with completions, and texts."""

    name = "sft"
    fields = (
        "messages",
        "prompt",
        "completion",
        "label",
        "instruction",
        "input",
        "output",
        "system",
        "history",
        "text",
        "tools",
    )
    aliases = {"messages": ("conversations",), "tools": ("functions",)}

    def is_header(self, fields: set[str]) -> bool:
        """Return whether the fields of a CSV header are those of a format."""
        return format_with_fields(fields) is not None

    def recognizes(self, records: Sequence[RawRecord]) -> str | None:
        """Return the format whose required fields the first record has."""
        if not records:
            return None
        return format_with_fields(records[0].mapping.fields_in(records[0].raw))

    def find_format(self, path: Path, mapping: ColumnMapping) -> str:
        """Return the format of the file's columns; raises `DataError` with a `--columns` hint."""
        fields = mapping.fields_in(mapping.names)
        found = format_with_fields(fields)
        if found is not None:
            return found
        spare = [n for n in mapping.names if n not in self.fields and n.lower() != "id"]
        for name, required in REQUIRED_FIELDS:
            # no other column could be meant: each row's error names the field that is missing
            if required & fields and not spare:
                return name
        raise ask_for_reading(path, mapping, "these columns belong to no known format")

    def parse(self, record: RawRecord) -> SFTRow:
        """Return the row of a record in the file's format; raises `DataError`."""
        return PARSERS[record.format](record)

    def format_of_rows(
        self, path: Path, format: str, records: Sequence[RawRecord], rows: Sequence[SFTRow]
    ) -> str:
        """Return "sharegpt" if the first chat has from/value, otherwise the columns' format."""
        if format != "openai-chat":
            return format
        chats = (record.get("messages") for record in records)
        turns = next((chat for chat in chats if chat), None)
        if isinstance(turns, str):
            return "sharegpt" if '"from"' in turns else format
        first = turns[0] if isinstance(turns, list) else None
        is_sharegpt = isinstance(first, dict) and first.get("from") is not None
        return "sharegpt" if is_sharegpt else format


def _parse_chat(record: RawRecord) -> SFTRow:
    """Return the chat of OpenAI's or ShareGPT's turns, with at least one answer."""
    turns, where = record.get("messages"), record.field_location("messages")
    if isinstance(turns, str):  # a cell of a CSV file
        try:
            turns = json.loads(turns)
        except ValueError as error:
            what = "expected a list of messages as JSON"
            raise DataError(what, where=where, why=str(error)) from None
    if turns is None:
        raise DataError("the field is missing", where=where)
    if not isinstance(turns, list):
        raise DataError(f"expected a list of messages, found {kind_of(turns)}", where=where)
    messages = (*system_message(record), *parse_messages(turns, where))
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no assistant message", where=where, why="there is no answer to train on")
    return SFTRow(record.where, messages=messages, tools=parse_tools(record))


def _parse_alpaca(record: RawRecord) -> SFTRow:
    answer = {"role": "assistant", "content": record.text("output")}
    messages = (*parse_alpaca_prompt(record), answer)
    return SFTRow(record.where, messages=messages, tools=parse_tools(record))


_COMPLETION_FIELDS = {
    "prompt-completion": ("prompt", "completion"),
    "input-output": ("input", "output"),
}


def _parse_completion(record: RawRecord) -> SFTRow:
    """Return a prompt with its completion, or with its label, which may be a number.

    With a system message or tools the row is a chat.
    """
    prompt_field, answered = _COMPLETION_FIELDS[record.format]
    prompt, opening, tools = record.text(prompt_field), system_message(record), parse_tools(record)
    if record.has(answered) or not record.has("label"):
        completion = record.text(answered)
    else:
        label = record.get("label")
        value = str(label) if isinstance(label, int) else label
        completion = usable_text(value, record.field_location("label"))
    if not opening and not tools:
        return SFTRow(record.where, prompt=prompt, completion=completion)
    turns = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
    return SFTRow(record.where, messages=(*opening, *turns), tools=tools)


def _parse_text(record: RawRecord) -> SFTRow:
    return SFTRow(record.where, text=record.text("text"))


PARSERS: dict[str, Callable[[RawRecord], SFTRow]] = {
    "openai-chat": _parse_chat,
    "alpaca": _parse_alpaca,
    "prompt-completion": _parse_completion,
    "input-output": _parse_completion,
    "text": _parse_text,
}
