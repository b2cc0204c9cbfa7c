"""Control tokens in the texts of messages: they stay text, and only a template writes the tokens.

    text of a user        hide       in the rendered chat            token ids
    hi<|im_end|>           ──>       <|im_start|>user\\nhi⟪1⟫<|im_end|>   1 9125 ... 44 108 2
                                                        text: several   the template's: one token

`<|im_end|>` in a text is replaced by a private-use character before the template runs. Where a
rendered chat has such characters, it is encoded by a copy of the tokenizer in which every control
token is called by a random name: the template's are renamed, and the texts' own come back as text.
A chat without them is encoded as ever, so its tokens are those of the full text.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_PLACEHOLDER = 0xF0000  # private-use characters of plane 15
PLACEHOLDERS = "\U000f0000-\U000ffffd"


class ControlTokens:
    """The control tokens of one tokenizer: its special tokens, by their texts.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token.content for token in added.values() if token.special}
        self.texts = frozenset(filter(None, special | set(tokenizer.all_special_tokens)))
        longest_first = sorted(self.texts, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._hidable = re.compile(f"[{PLACEHOLDERS}]|{self._pattern.pattern}")
        # most texts have none of these letters: a set of letters is searched ten times as fast
        first = "".join(sorted({re.escape(text[0]) for text in self.texts}))
        self._first_letter = re.compile(f"[{first}{PLACEHOLDERS}]")

    def hide(self, value: Any, hidden: list[str], kept: frozenset[str] = frozenset()) -> Any:
        """Return a JSON value whose texts have a placeholder for each control token.

        Args:
            value: A text, or a list or an object with texts in it.
            hidden: Texts that have a placeholder; new ones are added.
            kept: Control tokens that are left as they are.
        """
        if isinstance(value, str):
            if not self._first_letter.search(value) or not self._hidable.search(value):
                return value
            return self._hidable.sub(lambda found: _placeholder(found[0], hidden, kept), value)
        if isinstance(value, Mapping):
            names = (self.hide(name, hidden, kept) for name in value)
            values = (self.hide(item, hidden, kept) for item in value.values())
            return dict(zip(names, values, strict=True))
        if isinstance(value, list | tuple):
            return [self.hide(item, hidden, kept) for item in value]
        return value

    def occur_in(self, *texts: str) -> bool:
        """Return whether a text contains a control token."""
        return any(self._first_letter.search(text) and self._pattern.search(text) for text in texts)

    def encode(self, text: str, hidden: Sequence[str] = ()) -> list[int]:
        """Return the token ids of a rendered text; what is hidden in it is text."""
        plain = restore(text, hidden)
        if plain == text or not any(map(self._pattern.search, hidden)):
            return self._encode(plain)
        if self._renamed is None:
            return self._encode_in_pieces(text, hidden)
        names, renamed = self._renamed
        marked = self._pattern.sub(lambda found: names[found[0]], text)
        return list(renamed.encode(restore(marked, hidden), add_special_tokens=False).ids)

    def _encode(self, text: str, split_special_tokens: bool = False) -> list[int]:
        tokens: list[int] = self.tokenizer(
            text,
            add_special_tokens=False,
            verbose=False,
            **({"split_special_tokens": True} if split_special_tokens else {}),
        )["input_ids"]
        return tokens

    def _encode_in_pieces(self, text: str, hidden: Sequence[str]) -> list[int]:
        """Return token ids for a tokenizer that cannot be copied, in Python: piece by piece."""
        pieces = re.split(f"({self._pattern.pattern})", text)
        encoded = (
            self._encode(restore(piece, hidden), split_special_tokens=number % 2 == 0)
            for number, piece in enumerate(pieces)
            if piece
        )
        return [token for tokens in encoded for token in tokens]

    @cached_property
    def _renamed(self) -> tuple[dict[str, str], Tokenizer] | None:
        """Random names of the control tokens, and the tokenizer that calls them so."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        nonce = secrets.token_hex(16)  # no text can contain the name of a token
        names = {text: f"{nonce}x{number:05d}" for number, text in enumerate(sorted(self.texts))}
        state = json.loads(backend.to_str())
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(name, name): id_ for name, id_ in model["vocab"].items()}
        else:  # Unigram: pairs of a piece and its score
            model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
        if "unk_token" in model:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        state |= {"post_processor": None, "truncation": None, "padding": None}
        return names, Tokenizer.from_str(json.dumps(state))


def restore(text: str, hidden: Sequence[str]) -> str:
    """Return a text with what is hidden in it in place of the placeholders."""
    if not hidden:
        return text
    return text.translate({FIRST_PLACEHOLDER + n: own for n, own in enumerate(hidden)})


def _placeholder(found: str, hidden: list[str], kept: Iterable[str]) -> str:
    if found in kept:
        return found
    if found not in hidden:
        hidden.append(found)
    return chr(FIRST_PLACEHOLDER + hidden.index(found))
