"""Streaming detokenization: complete characters only, and nothing of a stop string.

tokens   |  Ġca | f | Ã | ©  | Ġy  | ...        é is two tokens: the first is no character
text     |   ca | f |   | é  |  y  | ...
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # SentencePiece's fallback: one byte per token
INCOMPLETE_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text of one completion, token by token: `add` and `end`, joined, are the decoding of all.

    After a complete string of `stop`, `stopped` is true and no more text is returned; the text
    before it is, and nothing of it. Of several stop strings, the first that is complete counts,
    whatever tokens it is in.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stop: "Sequence[str]" = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self.stopped, self._skip_special = False, skip_special_tokens
        self._tokenizer = tokenizer
        self._stop = [StopMatcher(string) for string in stop if string]
        # tokens whose text was returned, which the decoder needs as context for the next ones
        self._before: list[int] = []
        self._new: list[int] = []
        self._pending = ""  # text that may begin a stop string

    def add(self, token: int) -> str:
        """Return the text that is certain after `token`."""
        self._new.append(token)
        if BYTE_TOKEN.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return ""  # the decoder decides over a complete run of bytes
        text = self._new_text()
        if (
            not text
            or text.endswith(INCOMPLETE_CHARACTER)
            or (len(self._new) > 1 and not self.decode([token]))
        ):
            return ""  # the last: a special token between bytes
        self._before, self._new = self._new, []
        return self._certain(text)

    def end(self) -> str:
        """Return the rest of the text, after the last token."""
        text = self._certain(self._new_text())
        rest, self._pending = self._pending, ""
        return text + rest

    def _new_text(self) -> str:
        """Return what the new tokens add to the text of those before."""
        return (
            self.decode(self._before + self._new)[len(self.decode(self._before)) :]
            if self._new
            else ""
        )

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens`, whatever came before."""
        if not tokens:
            return ""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special))

    def _certain(self, text: str) -> str:
        """Return what of the pending text and `text` is certain."""
        if self.stopped:
            return ""
        known, text = len(self._pending), self._pending + text
        for at in range(known, len(text)):
            ends = [at + 1 - len(stop.text) for stop in self._stop if stop.accept(text[at])]
            if ends:  # the first that is complete; of several, the one that begins first
                self.stopped, self._pending = True, ""
                return text[: min(ends)]
        pending = max((stop.matched for stop in self._stop), default=0)
        self._pending = text[len(text) - pending :]
        return text[: len(text) - pending]


class StopMatcher:
    """Search of one stop string in a stream of characters, in constant time per character.

    References:
        Knuth, Morris, Pratt 1977, "Fast pattern matching in strings".

    Attributes:
        matched: length of the longest beginning of the string that ends the stream so far.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._shorter = [0] * len(text)  # longest proper beginning that ends text[: i + 1]
        for at in range(1, len(text)):
            self._shorter[at] = self._extend(self._shorter[at - 1], text[at])

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)

    def accept(self, character: str) -> bool:
        """Append a character; return whether the string is complete now."""
        self.matched = self._extend(self.matched, character)
        if self.matched < len(self.text):
            return False
        self.matched = self._shorter[-1]
        return True


def detokenize(
    tokenizer: "PreTrainedTokenizerBase", tokens: "Sequence[int]", stop: "Sequence[str]" = ()
) -> str:
    """Return the text of a completion, up to the first stop string."""
    text = Detokenizer(tokenizer, stop)
    return "".join([*map(text.add, tokens), text.end()])
