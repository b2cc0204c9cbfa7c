"""Tokens in, text out as it appears: whole characters only, and nothing of a stop string.

tokens   |  Ġca | f | Ã | ©  | Ġy  | ...        the é is two tokens: the first alone is no character
text     |   ca | f |   | é  |  y  | ...
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(
    r"<0x[0-9A-Fa-f]{2}>"
)  # SentencePiece's tokens of one byte, for what is not in its vocabulary
BROKEN = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one answer, as its tokens come: what `add` and `end` return, joined, is the decoding of them all.

    Once a string of `stop` is whole, `stopped` is true and no text comes any more; what comes before it has come, and
    nothing of it. Where several are found, it is the one that was whole first, whatever pieces it came in.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: "Sequence[str]" = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(string for string in stop if string)
        self._before: list[
            int
        ] = []  # tokens whose text has come, and which the decoder must see before the next ones
        self._new: list[int] = []
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that is certain now that `token` came."""
        self._new.append(token)
        if BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return ""  # whether a run of bytes is text is decided over the whole run, as the decoder does
        text = self._fresh()
        if not text or text.endswith(BROKEN) or (len(self._new) > 1 and not self.decode([token])):
            return ""  # the last: a special token, which the decoder takes out from between bytes
        self._before, self._new = self._new, []
        return self._certain(text)

    def end(self) -> str:
        """The rest, after the last token."""
        text = self._certain(self._fresh())
        rest, self._held = self._held, ""
        return text + rest

    def _fresh(self) -> str:
        """The text of the new tokens: what they add to that of the ones before."""
        return (
            self.decode(self._before + self._new)[len(self.decode(self._before)) :]
            if self._new
            else ""
        )

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens` without special ones, whatever came before."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def _certain(self, text: str) -> str:
        """What of the held text and `text` can go out."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [
            (place + len(string), place)
            for string in self._stop
            if (place := text.find(string)) >= 0
        ]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        longest = max((len(string) for string in self._stop), default=1)
        held = next(
            (
                n
                for n in range(min(longest - 1, len(text)), 0, -1)
                if any(s.startswith(text[-n:]) for s in self._stop)
            ),
            0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def detokenize(
    tokenizer: "PreTrainedTokenizerBase", tokens: "Sequence[int]", stop: "Sequence[str]" = ()
) -> str:
    """The text of a whole answer, up to the first stop string."""
    text = Detokenizer(tokenizer, stop)
    return "".join([*map(text.add, tokens), text.end()])
