"""What the name of a column means, in English and Spanish: "respuesta_agente" is an answer.

The last word of an English name decides, and the first word of a Spanish one:
`customer_text`, `texto_cliente`.
"""

import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ANSWER, PROMPT, CONTEXT, SYSTEM, TEXT = "answer", "prompt", "context", "system", "text"
LABEL, SCORE, CHOSEN, REJECTED = "label", "score", "chosen", "rejected"
REASONING, TOOLS, WEIGHT, MEDIA, TOKENS = "reasoning", "tools", "weight", "media", "tokens"
CHOICES = "choices"
NONE, UNKNOWN = "none", "unknown"  # without a meaning for training; a name without known words

WORDS_FILE = Path(__file__).parent / "column_names.yaml"
_FULL_NAMES = {  # names that mean something else than their words
    "parallel_tool_calls": NONE,
    "input_ids": TOKENS,
    "attention_mask": TOKENS,
    "token_type_ids": TOKENS,
    "label_ids": TOKENS,
    "src": PROMPT,
    "tgt": ANSWER,
    "ref": ANSWER,
    "reference": ANSWER,
    "ground_truth": ANSWER,
    "images": MEDIA,
    "a": UNKNOWN,
    "p": UNKNOWN,
    "source": NONE,
    "original": NONE,
    "end_user": NONE,
    "class_id": LABEL,
    "label_id": LABEL,
    "score": SCORE,
    "puntuacion": SCORE,
    "language_model": NONE,
    "set": NONE,
}
_WORDS: dict[str, str] = yaml.safe_load(WORDS_FILE.read_text(encoding="utf-8"))
_NOTHING, _NOTHING_FIRST = (frozenset(_WORDS.pop(name).split()) for name in (NONE, "none_first"))
_ROLES = {word: role for role, words in _WORDS.items() for word in words.split()}
# a word of a weak role only means that there is text, or a person: other words of a name decide
_WEAK = (TEXT, PROMPT, CONTEXT)


@cache
def split_name(name: str) -> tuple[str, ...]:
    """Return the words of a column's name: lower case, without accents and plural endings."""
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", plain)
    return tuple(_singular(word) for word in re.findall(r"[a-z]+|\d+", plain.lower()))


def _singular(word: str) -> str:
    if word in _ROLES or word in _NOTHING:
        return word
    for ending in ("es", "s"):
        stem = word.removesuffix(ending)
        if stem != word and (stem in _ROLES or stem in _NOTHING):
            return stem
    stem = word.removesuffix("ies") + "y"
    return stem if word.endswith("ies") and stem in _ROLES else word


@cache
def meaning_of(name: str) -> str:
    """Return the meaning of a column's name, one of the words above, or `UNKNOWN`.

    Raises nothing: the values of the column have to confirm what its name promises.
    """
    words = split_name(name)
    known = _FULL_NAMES.get("_".join(words)) or _FULL_NAMES.get(name.lower())
    if known is not None:
        return known
    if not words:
        return UNKNOWN
    named = [word for word in words if not word.isdigit()]
    if not named:
        return UNKNOWN
    if len(named) > 1 and (named[-1] in _NOTHING or named[0] in _NOTHING_FIRST):
        strong = [_ROLES[w] for w in named[:-1] if _ROLES.get(w, TEXT) not in _WEAK]
        if named[-1] in ("name", "nombre") and _ROLES.get(named[0]) == LABEL:
            return LABEL
        person = named[-1] in ("customer", "client", "agent", "cliente", "agente")
        weak = [_ROLES[w] for w in named[:-1] if w in _ROLES]
        return next(iter(strong or weak), NONE) if person else NONE
    roles = [_ROLES[word] for word in reversed(named) if word in _ROLES]
    strong_roles = [role for role in roles if role not in _WEAK]
    for first in (SYSTEM, CHOSEN, REJECTED, REASONING):  # before all other words of the name
        if first in strong_roles:
            return first
    if strong_roles:
        return strong_roles[0]
    if roles:
        return next((role for role in roles if role != TEXT), TEXT)
    return NONE if any(word in _NOTHING for word in named) else UNKNOWN


MEANINGS = {
    TOOLS: "tools or calls of them",
    REASONING: "reasoning before an answer",
    WEIGHT: "a weight or a mask of the loss",
    MEDIA: "pictures or sound",
    TOKENS: "token ids",
    SYSTEM: "a system message",
    CHOSEN: "a better answer",
    REJECTED: "a worse answer",
    ANSWER: "an answer",
    PROMPT: "a prompt",
    CONTEXT: "a part of a prompt",
    TEXT: "a second text",
    CHOICES: "the choices of a question",
}
LABEL_NAMES = {"label", "labels", "kto_tag"}
WORDED = {ANSWER, PROMPT, CONTEXT, TEXT}  # names that also occur for short remarks
NEUTRAL = {1, "1", "1.0", "true"}  # a weight or mask under which all is trained alike


_EMPTY_JSON = ("[]", "{}", "null")  # cells of a table without tools


def refused_meaning(name: str, value: Any) -> str | None:
    """Return what a column means that must not stay unread; None where it may."""
    last = name.rpartition(".")[2]
    role = meaning_of(last)
    if _is_spans(value):
        return "labels of parts of a text"
    if last.lower() in LABEL_NAMES:
        return "a label"
    if role == WEIGHT and (isinstance(value, (dict, list)) or value not in NEUTRAL):
        return MEANINGS[WEIGHT]
    if role == WEIGHT or role not in MEANINGS or value in _EMPTY_JSON:
        return None
    if role in WORDED and not _has_words(value):
        return None
    if isinstance(value, (bool, int, float)):
        return None
    return MEANINGS[role]


def _is_spans(value: Any) -> bool:
    """Whether a value marks parts of a text: a list of objects with a start and an end."""
    ends = {"start", "end"}, {"begin", "end"}, {"start_offset", "end_offset"}
    items = value if isinstance(value, list) else []
    return any(isinstance(item, dict) and item.keys() >= some for item in items for some in ends)


def _has_words(value: Any) -> bool:
    """Whether some text in a value has several words."""
    if isinstance(value, dict):
        return any(map(_has_words, value.values()))
    if isinstance(value, list):
        return any(map(_has_words, value))
    return isinstance(value, str) and " " in value.strip()
