"""Where a chat's answers stand in its text, and what of the chat the template leaves out.

    prompt of answer 1   answer 1       between              answer 2
    <user> hi <bot>      hello <end>    <user> and? <bot>    fine <end>     nothing after it
    . . . . . . . .      x x x x x      . . . . . . . .      x x x x        trained

The prompt of an answer is what generation is given: the messages so far and the opening of an
answer. Many templates write an answer otherwise once more turns follow, or open an answer in a
prompt with something that history does not have; the answer is what follows the part that both
texts share. An answer ends with a token of its own, or with the token that begins the next turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from afina.data.chat_template import (
    ALTERNATIVES,
    PROBE_TEXT,
    Chat,
    ChatTemplate,
    Stop,
    common_length,
)
from afina.data.control_tokens import restore
from afina.data.schemas import Message
from afina.errors import DataError

# transformers hands each of them to a template under the name that the template reads
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
MAX_OPENING = 64  # characters of an answer that a prompt can open, such as <think>
MARK = "mark-of-afina"  # at the end of the last message of a history


@dataclass(frozen=True)
class Answer:
    """One answer of a chat, as texts with placeholders.

    Attributes:
        prompt: What generation is given.
        text: What is trained: the answer with its stop token.
        rest: What the template writes after it.
        stop: The stop token.
    """

    prompt: str
    text: str
    rest: str
    stop: Stop

    @property
    def completion(self) -> str:
        """The answer without its stop token."""
        return self.text.removesuffix(self.stop.text).removesuffix(self.stop.between)


def is_trained(number: int, message: Message) -> bool:
    """Return whether a message of a chat is an answer with a weight that is not 0."""
    weight = message.get("weight")
    return bool(number) and message["role"] == "assistant" and weight not in (0, "0")


def find_answers(template: ChatTemplate, chat: Chat, numbers: Sequence[int]) -> list[Answer]:
    """Return the answers of a chat at these indices, in order.

    Raises:
        DataError: the template rejects the chat, omits a part of it, or does not end an answer.
    """
    answers = [_find_answer(template, chat, number) for number in numbers]
    for number, answer in zip(numbers, answers, strict=True):
        _check_written(template, chat, number, answer)
    return answers


def _find_answer(template: ChatTemplate, chat: Chat, number: int) -> Answer:
    """Return the answer that is message `number`."""
    message = chat.messages[number]
    stop = template.stop_of_calls if message.get("tool_calls") else None
    stop = stop or template.stop
    if template.chat_format.allow_control_tokens and stop.text in str(message.get("content")):
        what = f"the answer contains the stop token {stop.text}"
        hint = "remove it from the answer, or leave out --allow-control-tokens: then it is text"
        raise DataError(what, where=chat.where, hint=hint)
    prompt = template.write(chat, number, True)
    written = template.write(chat, number + 1, False)
    if written.startswith(prompt):
        after = written[len(prompt) :]
    else:
        after = _after_common_part(template, chat, number, prompt, written)
    if stop.is_next_turn:
        own = after[: len(after) - stop.num_dropped] + stop.between
        return Answer(prompt, own + stop.text, "", stop)
    text, found, rest = after.rpartition(stop.text)
    if not found:
        raise template.no_stop_error(restore(after, chat.hidden), chat.where)
    return Answer(prompt, text + found, rest, stop)


def _after_common_part(
    template: ChatTemplate, chat: Chat, number: int, prompt: str, written: str
) -> str:
    """Return what follows the part that the prompt and the written answer share.

    What stands before the end of the history is not compared: some templates move a system message
    or tools to the last question. An invented answer shows where a prompt's opening ends, as the
    answer itself might begin with the same letters.
    """
    invented = {"role": "assistant", "content": PROBE_TEXT}
    probe = template.chat([invented], chat.where).messages[0]
    marked = _marked(chat, number)
    answered = replace(chat, messages=(*marked.messages[:number], chat.messages[number]))
    probed = replace(chat, messages=(*marked.messages[:number], probe))
    tails = [
        template.write(one, num, opens).rpartition(MARK)
        for one, num, opens in (
            (marked, number, True),
            (answered, number + 1, False),
            (probed, number + 1, False),
        )
    ]
    if any(not found for _, found, _ in tails):
        raise _prefix_error(template, chat, prompt, written)
    given, own, other = (tail for _, _, tail in tails)
    shared = common_length(given, own, other)
    opening, after = given[shared:], own[shared:]
    if opening.strip() and opening.strip() in after:
        raise _prefix_error(template, chat, prompt, written)
    return after


def _marked(chat: Chat, number: int) -> Chat:
    """Return the chat with a mark at the end of the message before `number`."""
    message = chat.messages[number - 1]
    content: Any = message.get("content")
    if isinstance(content, list) and content:
        content = [*content[:-1], {**content[-1], "text": f"{content[-1].get('text', '')}{MARK}"}]
    else:
        content = f"{content or ''}{MARK}"
    messages = list(chat.messages)
    messages[number - 1] = message | {"content": content}
    return replace(chat, messages=tuple(messages))


def _prefix_error(template: ChatTemplate, chat: Chat, prompt: str, written: str) -> DataError:
    """Return the error of an answer that does not follow its prompt."""
    at = max(0, common_length(prompt, written) - 20)
    given, found = (restore(text[at : at + 60], chat.hidden) for text in (prompt, written))
    return DataError(
        "a prefix does not render as a prefix: "
        f"{template.name} opens an answer in a way that the answer does not continue",
        where=chat.where,
        why=f"generation is given {given!r}, and the chat has {found!r}",
        hint=f"other --template-kwargs, {ALTERNATIVES} writes each message alike at every position",
    )


# ---- what the template leaves out


def _check_written(template: ChatTemplate, chat: Chat, number: int, answer: Answer) -> None:
    """Raise `DataError` where the answer or its prompt lacks a part of the chat."""
    message = chat.messages[number]
    content = _text_of(message)
    if content and not (_contains(answer.text, content) or _continues(answer, content)):
        raise _left_out(template, chat, number, "content", "a part of it is not in the answer")
    for key in (*REASONING_KEYS, "tool_calls"):
        if message.get(key) and not _contains(answer.text, *_leaves(message[key])):
            _check_used(template, chat, number, key, number + 1)


def check_history(
    template: ChatTemplate, chat: Chat, numbers: Sequence[int], prompt: str
) -> list[str]:
    """Return the keys of a chat that the template leaves out, though nothing is lost by that.

    Args:
        template: The template.
        chat: The chat.
        numbers: Indices of the answers that are trained.
        prompt: The prompt of the last of them.

    Raises:
        DataError: the template omits tools, a message, or a key that is not implied by others.
    """
    if chat.tools and not _contains(prompt, *_leaves(list(chat.tools))):
        without = template.write(replace(chat, tools=()), numbers[-1], True)
        if without == prompt:
            raise _left_out(template, chat, None, "tools")
    unused = []
    for number, message in enumerate(chat.messages[: numbers[-1]]):
        if number not in numbers and not _contains(prompt, _text_of(message)):
            _check_used(template, chat, number, None, numbers[-1])
        for key in ("name", "tool_call_id"):
            if message.get(key) and not _is_used(template, chat, number, key, numbers[-1]):
                _check_implied(template, chat, number, key)
                unused.append(key)
    return unused


def _check_implied(template: ChatTemplate, chat: Chat, number: int, key: str) -> None:
    """Raise `DataError` where an omitted key is not implied by the order of the messages."""
    message = chat.messages[number]
    start = number
    while start and chat.messages[start]["role"] == "tool":
        start -= 1
    calls = chat.messages[start].get("tool_calls") or []
    at = number - start - 1
    if message["role"] == "tool" and at < len(calls):
        call = calls[at]
        own = call["function"]["name"] if key == "name" else call.get("id", message[key])
        if own == message[key]:
            return
    raise _left_out(template, chat, number, key)


def _check_used(
    template: ChatTemplate, chat: Chat, number: int, key: str | None, num_messages: int
) -> None:
    if not _is_used(template, chat, number, key, num_messages):
        raise _left_out(template, chat, number, key)


def _is_used(
    template: ChatTemplate, chat: Chat, number: int, key: str | None, num_messages: int
) -> bool:
    """Return whether the text of the first messages changes without a key, or without a message."""
    if key in ("name", "tool_call_id") and not template.mentions(key):
        return False
    messages = list(chat.messages[:num_messages])
    opens = num_messages > number + 1 or messages[-1]["role"] != "assistant"
    if key is None:
        del messages[number]
    else:
        messages[number] = {name: v for name, v in messages[number].items() if name != key}
    try:
        without = template.write(replace(chat, messages=tuple(messages)), len(messages), opens)
    except DataError:
        return True
    return without != template.write(chat, num_messages, opens)


def _left_out(
    template: ChatTemplate, chat: Chat, number: int | None, key: str | None, why: str | None = None
) -> DataError:
    """Return the error of a part of a chat that the template does not write."""
    if number is None:
        part, where = str(key), f"{chat.where}:{key}"
    else:
        role = chat.messages[number]["role"]
        part = f"message {number + 1} ({role})" if key is None else f"{key} of message {number + 1}"
        where = f"{chat.where}:messages[{number}]" + (f".{key}" if key else "")
    hint = f"{ALTERNATIVES} writes it; or rows without it"
    return DataError(
        f"{template.name} leaves out {part}",
        where=where,
        why=why or "the chat renders the same without it, so it would not be learned",
        hint=hint,
    )


def _text_of(message: Message) -> str:
    content: Any = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _leaves(value: Any) -> list[str]:
    """Return the texts in a JSON value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return []


def _contains(text: str, *parts: str) -> bool:
    """Return whether a text has all parts, whatever white space they have."""
    if all(part.strip() in text for part in parts):
        return True
    joined = "".join(text.split())
    return all("".join(part.split()) in joined for part in parts)


def _continues(answer: Answer, content: str) -> bool:
    """Return whether a prompt already opens a content, whose rest is the answer."""
    prompt, text, own = ("".join(one.split()) for one in (answer.prompt, answer.text, content))
    opened = range(1, min(len(own), MAX_OPENING))
    return any(prompt.endswith(own[:n]) and text.startswith(own[n:]) for n in opened)
