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
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}

SPEAKER_KEYS = {"role", "from"}
# keys of a message that are handed to the chat template as they are
TEMPLATE_KEYS = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")
# keys of a turn that `parse_message` reads
TURN_KEYS = SPEAKER_KEYS.union(
    TEMPLATE_KEYS, ("content", "value", "weight", "tool_calls", "function_call")
)

Message = dict[str, Any]  # role, content (a text, or None with calls), and other keys of a turn
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


def parse_tool_calls(turn: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the tool calls of an assistant's turn, arguments as objects; raises `DataError`."""
    legacy = turn.get("function_call")
    where = f"{where}.tool_calls"
    calls = turn.get("tool_calls") or ([{"function": legacy}] if legacy else [])
    calls = from_json(calls, where)
    if not isinstance(calls, list):
        raise DataError(f"expected a list of calls, found {kind_of(calls)}", where=where)
    return [_parse_call(call, where) for call in calls]


def _parse_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call as OpenAI writes it: {id, type, function: {name, arguments}}."""
    is_flat = isinstance(call, dict) and "function" not in call and "name" in call
    function = call if is_flat else call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError("a tool call needs a function with a name", where=where)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):  # OpenAI writes the arguments as JSON inside JSON
        with suppress(ValueError):
            arguments = json.loads(arguments or "{}")
    own = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return known | {"type": "function", "function": own}


def from_json(value: Any, where: str) -> Any:
    """Return a value that a table holds as JSON in a text; any other as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError("not valid JSON", where=where, why=str(error)) from None


def parse_tools(record: RawRecord) -> tuple[dict[str, Any], ...]:
    """Return the functions of a row in OpenAI's form; raises `DataError`."""
    if not record.has("tools"):
        return ()
    where = record.field_location("tools")
    tools = from_json(record.get("tools"), where) or []
    if not isinstance(tools, list):
        raise DataError(f"expected a list of functions, found {kind_of(tools)}", where=where)
    for n, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool needs a function with a name", where=f"{where}[{n}]")
    return tuple(
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    )


def _parse_content(turn: Mapping[str, Any], key: str, where: str) -> str | None:
    """Return a turn's content, a text or a list of text parts; None where it has none."""
    value, where = turn.get(key), f"{where}.{key}"
    if isinstance(value, list):
        value = "".join(_parse_part(part, f"{where}[{n}]") for n, part in enumerate(value))
    return None if value is None else usable_text(value, where, may_be_empty=True)


def _parse_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        raise DataError("only parts of type text can be used", where=where)
    return usable_text(part.get("text"), f"{where}.text", may_be_empty=True)


def parse_message(turn: Any, where: str) -> Message | None:
    """Return one message of a chat in either spelling; None for an empty system message.

    Raises:
        DataError: not an object, an unknown role, nothing in it, or a weight other than 0 and 1.
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
    role, calls = ROLES[name], parse_tool_calls(turn, where)
    if name == "function_call":
        called = from_json(turn.get(content_key), f"{where}.{content_key}")
        listed = called if isinstance(called, list) else [called]
        calls, content = [_parse_call(call, f"{where}.{content_key}") for call in listed], None
    else:
        content = _parse_content(turn, content_key, where)
    more = {
        key: usable_text(turn[key], f"{where}.{key}")
        for key in TEMPLATE_KEYS
        if turn.get(key) not in (None, "")
    }
    if role == "system" and not (content or "").strip():
        return None
    if content is None and not calls and not more.keys() - {"name"}:
        raise DataError("the field is missing", where=f"{where}.{content_key}")
    if role != "tool" and not ((content or "").strip() or calls or more.keys() - {"name"}):
        raise DataError("the field is empty", where=f"{where}.{content_key}")
    message: dict[str, Any] = {"role": role, "content": content} | more
    if calls:
        message["tool_calls"] = calls
    weight = turn.get("weight")
    if weight is not None and weight not in (0, 1, "0"):  # eval rows of version 0.1 have the text
        raise DataError("a weight is 0 (not trained on) or 1", where=f"{where}.weight")
    return message | {"weight": 0} if weight in (0, "0") else message


def text_of(message: Message) -> str:
    """Return a message as text: its content, and its calls as JSON."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    texts = [message.get("content") or "", json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(text for text in texts if text)


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

    A system message comes first; a text stays a text where the row has none. Messages in a row
    with a prompt and answers (`has_answers`) are the chat of one of them, and no prompt.
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
