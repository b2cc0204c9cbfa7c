"""A SentencePiece tokenizer in a GGUF file: pieces with scores, bytes for the rest.

llama.cpp joins the two neighbors whose piece has the highest score, the leftmost first;
tokenizer.json has the pairs in the order in which they are joined. The score of a piece is
therefore minus the rank of its first pair. Metaspace adds no space to a text that begins with one,
and llama.cpp does: that text is not compared. What else llama.cpp would make of the probe texts is
compared with the tokenizer.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from afina.data import RETENTION_TEXT

SPACE = "\u2581"  # ▁
PROBES = (
    "  two spaces,\n\na new line\tand a tab \n",
    "¿Dónde está el niño? a las 10:45, 3,5 kg. 日本 🙂",
    "def f(x):\n    return {'a': x**2}  # 12345",
)
PROBE_LINES = 12
UNRANKED = -1e9  # score of a piece that no pair is joined to


def is_sentencepiece(content: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json has SentencePiece's pairs, with bytes for unknown text."""
    model = content["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def space_prefix(content: Mapping[str, Any], has_template: bool) -> bool:
    """Return whether a text gets a space in front, after special tokens too.

    Where transformers adds one at the very beginning only, chats have none: they begin with a
    special token.

    Raises:
        ValueError: A step of the tokenizer is none of SentencePiece's.
    """
    steps = _steps(content.get("normalizer"), "normalizers")
    steps += _steps(content.get("pre_tokenizer"), "pretokenizers")
    found = False
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                found = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}}:
                pass
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}:
                found = scheme == "always" or (scheme == "first" and not has_template)
            case _:
                raise ValueError(f"its step {json.dumps(step)} is none of SentencePiece's")
    return found


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def piece_scores(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the score of each piece that pairs are joined to; the first ones have the highest."""
    ranks: dict[str, float] = {}
    for pair in content["model"]["merges"]:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        ranks.setdefault(left + right, -float(len(ranks)))
    return ranks


def check_pieces(
    tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any], prefix: bool
) -> None:
    """Raise `ValueError` where llama.cpp would split a probe text otherwise, or lacks a byte."""
    ids, scores = content["model"]["vocab"], piece_scores(content)
    if any(f"<0x{byte:02X}>" not in ids for byte in range(256)):
        raise ValueError("it has no token for each byte")
    lines = RETENTION_TEXT.read_text(encoding="utf-8").splitlines()[:PROBE_LINES]
    is_metaspace = "Metaspace" in json.dumps(content.get("pre_tokenizer"))
    begins = is_metaspace and prefix  # a space only there: not after a special token
    start = "" if begins else tokenizer.bos_token or tokenizer.eos_token or ""
    for text in (*PROBES, *filter(None, lines)):
        text = text.lstrip() if is_metaspace else text
        expected = tokenizer(start + text, add_special_tokens=False)["input_ids"]
        given = _join((" " if prefix else "") + text, ids, scores)
        if given != expected[bool(start) :]:
            raise ValueError(f"llama.cpp would split {text!r} otherwise")


def _join(text: str, ids: Mapping[str, int], scores: Mapping[str, float]) -> list[int]:
    """Return the tokens of a text without special ones, as llama.cpp joins them."""
    symbols = list(text.replace(" ", SPACE))
    while True:
        pairs = [left + right for left, right in pairwise(symbols)]
        known = [(-scores.get(pair, UNRANKED), at) for at, pair in enumerate(pairs) if pair in ids]
        if not known:
            break
        _, at = min(known)
        symbols[at : at + 2] = [pairs[at]]
    tokens: list[int] = []
    for symbol in symbols:
        byte_tokens = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        tokens += [ids[symbol]] if symbol in ids else byte_tokens
    return tokens
