"""Entities in tags, and their scores: an entity is right where its type and both ends are.

B-PER I-PER O B-LOC -> (PER, 0, 2), (LOC, 3, 4)      also IOB1, BIOES and BILOU

As seqeval and conlleval count: an entity goes on where I or E (L) follows B or I of the same type;
any other tag but O begins one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

OUTSIDE = "O"
_ENTITY_TAG = re.compile(r"([BIESLU])-(.+)")
_ENDS, _ONLY = "EL", "SU"  # prefixes of the last word of an entity, and of one of a single word


class Entity(NamedTuple):
    """A type, and the words from `start` to before `end`."""

    type: str
    start: int
    end: int


def are_entity_tags(tags: Iterable[str]) -> bool:
    """Return whether tags are O and prefixed types, with at least one type."""
    others = [tag for tag in tags if tag != OUTSIDE]
    return bool(others) and all(map(_ENTITY_TAG.fullmatch, others))


def find_entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of a text in order."""
    found: list[Entity] = []
    last_prefix, last_type = OUTSIDE, ""
    for index, tag in enumerate(tags):
        match = _ENTITY_TAG.fullmatch(tag)
        prefix, type_ = (match[1], match[2]) if match else (OUTSIDE, "")
        goes_on = last_prefix in "BI" and prefix in "I" + _ENDS and type_ == last_type
        if goes_on:
            found[-1] = found[-1]._replace(end=index + 1)
        elif prefix != OUTSIDE:
            found.append(Entity(type_, index, index + 1))
        last_prefix, last_type = prefix, type_
    return found


def tag_scores(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> Any:
    """Return the scores of tagged texts in percent: of words, and of entities where tags have them.

    `entities` has precision, recall, F1 and the number of entities of each type.
    """
    pairs = [
        (p, e)
        for given, known in zip(predicted, expected, strict=True)
        for p, e in zip(given, known, strict=True)
    ]
    scores: dict[str, Any] = {
        "word_accuracy": 100.0 * sum(p == e for p, e in pairs) / max(1, len(pairs))
    }
    if not are_entity_tags({e for _, e in pairs}):
        return scores
    given, known, right = Counter[str](), Counter[str](), Counter[str]()
    for tags, true_tags in zip(predicted, expected, strict=True):
        one, two = set(find_entities(tags)), set(find_entities(true_tags))
        for counter, entities in ((given, one), (known, two), (right, one & two)):
            counter.update(entity.type for entity in entities)
    types = sorted(given | known)
    return (
        scores
        | _f1(right.total(), given.total(), known.total())
        | {"entities": {t: _f1(right[t], given[t], known[t]) | {"count": known[t]} for t in types}}
    )


def _f1(right: int, given: int, known: int) -> dict[str, float]:
    return {
        "precision": 100.0 * right / given if given else 0.0,
        "recall": 100.0 * right / known if known else 0.0,
        "f1": 200.0 * right / (given + known) if given + known else 0.0,
    }
