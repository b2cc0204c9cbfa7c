"""Rows longer than the longest sequence: their prompt is cut, and their answer is kept.

    system   turn   turn   last question             answer
    kept     earlier ones  beginning [...] end       kept

A text that is continued loses its beginning. Turns that are cut off with answers of their own are
a row of their own, so that every answer is trained, with as much of its history as fits.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from afina.data.schemas import Message, Prompt

CUT_ROLES = ("user", "tool")  # whose texts are cut; a system message is kept
CUT_MARK = " [...] "  # where the middle of a text was
MIN_CUT_LENGTH = 32  # characters that are left of a text at least
MAX_CUT_TRIES = 8  # renderings by which the length of a text is found

Excess = Callable[
    [Prompt], int
]  # the tokens by which a prompt is too long; at most 0 where it fits


@dataclass
class CutRows:
    """Locations of rows that were cut, and of those whose answer was too long by itself."""

    rows: set[str] = field(default_factory=set)
    answers: set[str] = field(default_factory=set)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows that were cut, and of rows whose answer was."""
        return {"truncated_rows": len(self.rows), "truncated_answers": len(self.answers)}


@dataclass(frozen=True)
class CutPrompt:
    """A prompt that was cut, and the turns before it that were cut off."""

    prompt: Prompt
    dropped: tuple[Message, ...] = ()


def cut_prompt(prompt: Prompt, excess: Excess, from_middle: bool = False) -> CutPrompt:
    """Return a prompt without as much of its texts as it is too long by, as far as there is text.

    Args:
        prompt: A text, or messages.
        excess: Returns the tokens by which a prompt is too long.
        from_middle: Whether a text is a question, cut in its middle, and not one to continue.
    """
    if excess(prompt) <= 0:
        return CutPrompt(prompt)
    if isinstance(prompt, str):
        cut = _keep_both_ends if from_middle else _keep_end
        return CutPrompt(_cut_text(prompt, cut, excess))
    messages, dropped = _drop_turns(prompt, excess)
    while excess(messages) > 0:
        texts = [(len(m["content"]), n) for n, m in enumerate(messages) if _can_be_cut(m)]
        if not texts:
            break
        number = max(texts)[1]
        put = partial(_with_content, messages, number)
        fits = partial(_excess_with, excess, put)
        messages = put(_cut_text(messages[number]["content"], _keep_both_ends, fits))
    return CutPrompt(messages, dropped)


def _excess_with(excess: Excess, put: Callable[[str], tuple[Message, ...]], text: str) -> int:
    """Return the excess of the messages with `text` in one of them."""
    return excess(put(text))


def _with_content(messages: tuple[Message, ...], number: int, text: str) -> tuple[Message, ...]:
    """Return messages with another content of one."""
    return (*messages[:number], messages[number] | {"content": text}, *messages[number + 1 :])


def _can_be_cut(message: Message) -> bool:
    content = message.get("content")
    is_text = message["role"] in CUT_ROLES and isinstance(content, str)
    return is_text and len(content or "") > MIN_CUT_LENGTH + len(CUT_MARK)


def _drop_turns(
    messages: tuple[Message, ...], excess: Excess
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return messages without as many of the first turns as needed, and these.

    A turn begins with a message of the user; calls, results and answers stay with it.
    """
    num_opening = next(
        (n for n, m in enumerate(messages) if m["role"] not in ("system", "developer")), 0
    )
    opening, rest = messages[:num_opening], messages[num_opening:]
    starts = [n for n, message in enumerate(rest) if message["role"] == "user" and n]
    if not starts:
        return messages, ()
    first = bisect_left(starts, True, key=lambda n: excess((*opening, *rest[n:])) <= 0)
    start = starts[min(first, len(starts) - 1)]
    return (*opening, *rest[start:]), (*opening, *rest[:start])


def _keep_end(text: str, length: int) -> str:
    return text[len(text) - length :]


def _keep_both_ends(text: str, length: int) -> str:
    first = (length + 1) // 2
    return text[:first] + CUT_MARK + text[len(text) - (length - first) :]


def _cut_text(text: str, cut: Callable[[str, int], str], excess: Callable[[str], int]) -> str:
    """Return the longest cut of a text that fits, or the shortest one where none does.

    The number of tokens grows about evenly with the characters: a few interpolations find it.
    """
    low, high = min(MIN_CUT_LENGTH, len(text)), len(text)
    excess_low, excess_high = excess(cut(text, low)), excess(text)
    for _ in range(MAX_CUT_TRIES):
        if excess_low >= 0 or high - low < 2:
            break
        step = (high - low) * -excess_low / (excess_high - excess_low)
        length = min(max(low + 1, low + int(step)), high - 1)
        found = excess(cut(text, length))
        if found > 0:
            high, excess_high = length, found
        else:
            low, excess_low = length, found
    return cut(text, low)
