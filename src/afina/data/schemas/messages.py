"""Chat messages in OpenAI's spelling (role, content) and ShareGPT's (from, value), and prompts."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from afina.data.columns import RawRecord, is_blank, kind_of, usable_text
from afina.errors import DataError, did_you_mean

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

SPEAKER_KEYS = {"role", "from"}
# keys of a turn that `parse_message` reads
TURN_KEYS = SPEAKER_KEYS | {"content", "value", "weight", "tool_calls", "function_call"}

Message = dict[str, str]
Prompt = str | tuple[Message, ...]  # a text to continue, or messages to answer


class HasPrompt(Protocol):
    """A row with a prompt."""

    @property
    def prompt(self) -> Prompt:
        """The prompt, a text or messages."""


def prompt_key(row: HasPrompt) -> str:
    """Return a hash of a row's prompt, which keeps its rows on one side of the train/eval split."""
    return hashlib.sha256(repr(row.prompt).encode()).hexdigest()


def as_messages(prompt: Prompt, role: str) -> tuple[Message, ...]:
    """Return messages; a text becomes one message of `role`."""
    return ({"role": role, "content": prompt},) if isinstance(prompt, str) else prompt


def parse_tool_calls(turn: Mapping[str, Any], where: str) -> str:
    """Return the tool calls of an assistant turn as JSON, "" without any; raises `DataError`."""
    legacy = turn.get("function_call")
    calls = turn.get("tool_calls") or ([{"function": legacy}] if legacy else [])
    where = f"{where}.tool_calls"
    if not isinstance(calls, list):
        raise DataError(f"expected a list of calls, found {kind_of(calls)}", where=where)
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool call needs a function with a name", where=where)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI writes the arguments as JSON inside JSON
            with suppress(ValueError):
                arguments = json.loads(arguments)
        parsed.append({"name": function["name"], "arguments": arguments})
    return json.dumps(parsed, ensure_ascii=False) if parsed else ""


def _parse_content(turn: Mapping[str, Any], key: str, where: str) -> str:
    """Return a turn's content: a text, a list of text parts, or its tool calls; may be empty."""
    value, calls = turn.get(key), parse_tool_calls(turn, where)
    where = f"{where}.{key}"
    if isinstance(value, list):
        value = "".join(_parse_part(part, f"{where}[{n}]") for n, part in enumerate(value))
    if value is None and calls:
        return calls
    text = usable_text(value, where, may_be_empty=True)
    return f"{text}\n{calls}" if text and calls else text or calls


def _parse_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        raise DataError("only parts of type text can be used", where=where)
    return usable_text(part.get("text"), f"{where}.text", may_be_empty=True)


def parse_message(turn: Any, where: str) -> Message | None:
    """Return one message of a chat in either spelling; None for an empty system message.

    Raises:
        DataError: not an object, an unknown role, no content, or a weight other than 0 and 1.
    """
    if not isinstance(turn, dict):
        what = f"expected an object with a role and a content, found {kind_of(turn)}"
        raise DataError(what, where=where)
    is_sharegpt = turn.get("from") is not None
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    name = usable_text(turn.get(role_key), f"{where}.{role_key}")
    if name not in ROLES:
        hint = did_you_mean(name, ROLES)
        raise DataError(f"unknown role {name!r}", where=f"{where}.{role_key}", hint=hint)
    role, content = ROLES[name], _parse_content(turn, content_key, where)
    if role == "system" and not content.strip():
        return None
    if role != "tool" and not content.strip():
        raise DataError("the field is empty", where=f"{where}.{content_key}")
    message = {"role": role, "content": content}
    weight = turn.get("weight")
    if weight is not None and weight not in (0, 1):
        raise DataError("a weight is 0 (not trained on) or 1", where=f"{where}.weight")
    return message | {"weight": "0"} if weight == 0 else message


def unread_turn_keys(record: RawRecord) -> dict[str, Any]:
    """Return the keys of turns that were not read, such as "messages.thinking", with a value."""
    found: dict[str, Any] = {}
    for column in sorted(record.columns_read):
        turns = record.value_of(column)
        for turn in turns if isinstance(turns, list) else [turns]:
            if isinstance(turn, dict) and turn.keys() & SPEAKER_KEYS:
                keys = turn.keys() - TURN_KEYS
                found |= {f"{column}.{key}": turn[key] for key in keys if not is_blank(turn[key])}
    return {name: v for name, v in found.items() if name not in record.mapping.left_out}


def parse_messages(turns: list[Any], where: str) -> list[Message]:
    """Return the messages of a list of turns, without empty system messages; raises `DataError`."""
    messages = [parse_message(turn, f"{where}[{n}]") for n, turn in enumerate(turns)]
    return [message for message in messages if message is not None]


def parse_turns(value: Any, where: str, role: str) -> tuple[Message, ...]:
    """Return a text, one message or a list of messages as messages; a text is the `role`'s."""
    if isinstance(value, str):
        return ({"role": role, "content": usable_text(value, where)},)
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise DataError(f"expected a text or messages, found {kind_of(value)}", where=where)
    return tuple(parse_messages(turns, where))


def system_message(record: RawRecord) -> tuple[Message, ...]:
    """Return the message of the field `system`; none where it is missing or empty."""
    text = record.optional("system").strip()
    return ({"role": "system", "content": text},) if text else ()


def parse_alpaca_prompt(record: RawRecord) -> tuple[Message, ...]:
    """Return Alpaca's prompt: system, earlier turns, then the instruction and its input."""
    messages = list(system_message(record))
    history, where = record.get("history") or [], record.field_location("history")
    if not isinstance(history, list):
        what = f"expected a list of [question, answer] pairs, found {kind_of(history)}"
        raise DataError(what, where=where)
    for n, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("expected a pair: [question, answer]", where=f"{where}[{n}]")
        for role, value in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": usable_text(value, f"{where}[{n}]")})
    instruction, details = record.text("instruction"), record.optional("input")
    content = f"{instruction}\n{details}" if details.strip() else instruction
    return (*messages, {"role": "user", "content": content})


def parse_prompt(record: RawRecord, has_answers: bool = False) -> Prompt:
    """Return the prompt of a row: messages, a text, or Alpaca's instruction.

    A system message comes first; a text stays a text where the row has none. Messages beside a
    prompt and its answers (`has_answers`) are the chat that one of them makes, and no prompt.
    """
    if record.has("messages") and not (has_answers and record.has("prompt")):
        opening = system_message(record)
        turns = parse_turns(record.get("messages"), record.field_location("messages"), "user")
        return (*opening, *turns)
    if not record.has("prompt"):
        return parse_alpaca_prompt(record)
    opening = system_message(record)
    if isinstance(record.get("prompt"), str):
        text = record.text("prompt")
        return (*opening, {"role": "user", "content": text}) if opening else text
    turns = parse_turns(record.get("prompt"), record.field_location("prompt"), "user")
    return (*opening, *turns)
