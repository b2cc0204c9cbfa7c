"""One record of a data file becomes one `Row`: what each format demands of a record.

    openai-chat         messages: [{role, content}, ...]
    sharegpt            conversations: [{from, value}, ...], system (optional)
    alpaca              instruction, output, and perhaps input, system, history
    prompt-completion   prompt, completion
    text                text

Names are ours after `columns` was applied; errors name the file's own columns.
"""

import json
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from afina.errors import DataError, did_you_mean

FIELDS = (
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
)

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}

Message = dict[str, str]


@dataclass(frozen=True)
class SFTRow:
    """One row of data: a chat (`messages`), a `prompt` with its `completion`, or a `text`; `where` it came from."""

    where: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class RawRecord:
    """A record as read: `values` by our field names; `columns` says what the file calls them; `raw` is as in the file."""

    where: str
    values: Mapping[str, Any]
    columns: Mapping[str, str]
    raw: Mapping[str, Any] = field(default_factory=dict)

    def field_location(self, field: str) -> str:
        """file:line:field, the field as the file calls it."""
        return f"{self.where}:{self.columns.get(field, field)}"

    def text(self, field: str) -> str:
        """The text of a field that must not be empty; raises `DataError`."""
        return usable_text(self.values.get(field), self.field_location(field))

    def optional(self, field: str) -> str:
        """The text of a field that may be missing or empty; raises `DataError` when it is no text."""
        value = self.values.get(field)
        return (
            ""
            if value is None
            else usable_text(value, self.field_location(field), may_be_empty=True)
        )


def kind_of(value: Any) -> str:
    """What a value of JSON is called in an error."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def usable_text(value: Any, where: str, may_be_empty: bool = False) -> str:
    """`value` if it is text that can be used; raises `DataError`."""
    if value is None:
        raise DataError("the field is missing", where=where)
    if not isinstance(value, str):
        raise DataError(f"expected text, found {kind_of(value)}", where=where)
    if not may_be_empty and not value.strip():
        raise DataError("the field is empty", where=where)
    try:
        value.encode()
    except (
        UnicodeEncodeError
    ) as error:  # JSON may hold half of a surrogate pair, which no tokenizer accepts
        raise DataError("not valid Unicode", where=where, why=str(error)) from None
    return value


def _calls(turn: Mapping[str, Any], where: str) -> str:
    """The tool calls of an assistant turn as JSON text; empty when it makes none."""
    legacy = turn.get("function_call")
    calls = turn.get("tool_calls") or ([{"function": legacy}] if legacy else [])
    if not isinstance(calls, list):
        raise DataError(
            f"expected a list of calls, found {kind_of(calls)}", where=f"{where}.tool_calls"
        )
    plain = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool call needs a function with a name", where=f"{where}.tool_calls")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI writes the arguments as JSON inside JSON
            with suppress(ValueError):
                arguments = json.loads(arguments)
        plain.append({"name": function["name"], "arguments": arguments})
    return json.dumps(plain, ensure_ascii=False) if plain else ""


def _content(turn: Mapping[str, Any], key: str, where: str) -> str:
    """A turn's content as text: a string, a list of text parts, or its tool calls; may be empty."""
    value, calls = turn.get(key), _calls(turn, where)
    if isinstance(value, list):
        for n, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                raise DataError("only parts of type text can be used", where=f"{where}.{key}[{n}]")
        value = "".join(
            usable_text(part.get("text"), f"{where}.{key}[{n}].text", True)
            for n, part in enumerate(value)
        )
    if value is None and calls:
        return calls
    text = usable_text(value, f"{where}.{key}", may_be_empty=True)
    return f"{text}\n{calls}" if text and calls else text or calls


def read_turn(turn: Any, where: str) -> Message | None:
    """One message of a chat in either spelling; None for an empty system message; raises `DataError`."""
    if not isinstance(turn, dict):
        raise DataError(
            f"expected an object with a role and a content, found {kind_of(turn)}", where=where
        )
    role_key, content_key = (
        ("from", "value") if turn.get("from") is not None else ("role", "content")
    )
    name = usable_text(turn.get(role_key), f"{where}.{role_key}")
    if name not in ROLES:
        raise DataError(
            f"unknown role {name!r}", where=f"{where}.{role_key}", hint=did_you_mean(name, ROLES)
        )
    role, content = ROLES[name], _content(turn, content_key, where)
    if role == "system" and not content.strip():
        return None
    if role != "tool" and not content.strip():
        raise DataError("the field is empty", where=f"{where}.{content_key}")
    message = {"role": role, "content": content}
    weight = turn.get("weight")
    if weight is not None and weight not in (0, 1):
        raise DataError("a weight is 0 (not trained on) or 1", where=f"{where}.weight")
    return message | {"weight": "0"} if weight == 0 else message


def _chat(record: RawRecord) -> SFTRow:
    """OpenAI chat and ShareGPT: a list of turns with at least one answer."""
    turns, place = record.values.get("messages"), record.field_location("messages")
    if isinstance(turns, str):  # a cell of a CSV file
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise DataError(
                "expected a list of messages as JSON", where=place, why=str(error)
            ) from None
    if turns is None:
        raise DataError("the field is missing", where=place)
    if not isinstance(turns, list):
        raise DataError(f"expected a list of messages, found {kind_of(turns)}", where=place)
    messages = [m for n, turn in enumerate(turns) if (m := read_turn(turn, f"{place}[{n}]"))]
    if system := record.optional("system").strip():
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no assistant message", where=place, why="there is no answer to learn from")
    return SFTRow(record.where, messages=tuple(messages))


def read_history(record: RawRecord) -> tuple[Message, ...]:
    """Alpaca's question: system, earlier turns, then the instruction with its input on the next line."""
    messages: list[Message] = []
    if system := record.optional("system").strip():
        messages.append({"role": "system", "content": system})
    history, place = record.values.get("history") or [], record.field_location("history")
    if not isinstance(history, list):
        raise DataError(
            f"expected a list of [question, answer] pairs, found {kind_of(history)}", where=place
        )
    for n, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("expected a pair: [question, answer]", where=f"{place}[{n}]")
        for role, value in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": usable_text(value, f"{place}[{n}]")})
    question, detail = record.text("instruction"), record.optional("input")
    messages.append(
        {"role": "user", "content": f"{question}\n{detail}" if detail.strip() else question}
    )
    return tuple(messages)


def _alpaca(record: RawRecord) -> SFTRow:
    """Alpaca: the question and the output."""
    answer = {"role": "assistant", "content": record.text("output")}
    return SFTRow(record.where, messages=(*read_history(record), answer))


def _completion(record: RawRecord) -> SFTRow:
    """A prompt and its completion, or its label, which may be a number."""
    prompt, label = record.text("prompt"), record.values.get("label")
    if label is None or record.values.get("completion") is not None:
        return SFTRow(record.where, prompt=prompt, completion=record.text("completion"))
    value = str(label) if isinstance(label, int) else label
    return SFTRow(
        record.where, prompt=prompt, completion=usable_text(value, record.field_location("label"))
    )


def _plain(record: RawRecord) -> SFTRow:
    return SFTRow(record.where, text=record.text("text"))


PARSERS: dict[str, Callable[[RawRecord], SFTRow]] = {
    "openai-chat": _chat,
    "sharegpt": _chat,
    "alpaca": _alpaca,
    "prompt-completion": _completion,
    "text": _plain,
}
REQUIRED = (
    ("openai-chat", {"messages"}),
    ("alpaca", {"instruction", "output"}),
    ("prompt-completion", {"prompt", "completion"}),
    ("prompt-completion", {"prompt", "label"}),
    ("text", {"text"}),
)


def recognise(names: Set[str]) -> str | None:
    """The format whose required fields are all among `names`, the first in the order above; None without one."""
    return next((name for name, required in REQUIRED if required <= names), None)
