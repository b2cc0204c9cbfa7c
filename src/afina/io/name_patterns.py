"""PEFT's patterns for layers (`rank_pattern`, `alpha_pattern`), matched so that a stranger's cannot take for ever.

A pattern fits the end of a path, from a dot on; the first that fits wins. Those without a repetition (nearly all) have a
length, and are looked up by the path's last characters; a dot that is not escaped stands for any. The few others, with one
repetition each, are matched by Python's regular expressions.
"""

import re
from collections.abc import Mapping
from typing import Any

REPEATS = (".*", r"\d+")
PLAIN = re.compile(
    r"\^?(\.\*|\\d\+|[\w\-]|\\?\.)+\$?"
)  # names, dots, .* and \d+: no groups, so nothing to nest
LITERAL = re.compile(r"([\w\-]|\\?\.)+")
MOST_WILD, MOST_FORMS, LONGEST = (
    8,
    512,
    256,
)  # in one table: wild patterns, forms of others; characters of a pattern

Form = tuple[
    int, tuple[int, ...]
]  # of a pattern without repetitions: its length, and where it takes any character


def is_plain_pattern(text: Any, repeats: int = 2) -> bool:
    """Whether a pattern is of a form that cannot make the matching explode: names, with `repeats` of .* and \\d+ at most."""
    if not isinstance(text, str) or len(text) > LONGEST or PLAIN.fullmatch(text) is None:
        return False
    return sum(text.count(each) for each in REPEATS) <= repeats


def are_plain_patterns(told: Mapping[str, Any]) -> bool:
    """Whether a table of patterns may be matched against all layers: many paths of a few forms, few others."""
    literal = {text for text in told if LITERAL.fullmatch(text)}
    few = (
        len(told) - len(literal) <= MOST_WILD
        and len({_form(text)[0] for text in literal}) <= MOST_FORMS
    )
    return few and all(is_plain_pattern(text, 1) for text in told)


def _form(text: str) -> tuple[Form, str]:
    """The form of a pattern without repetitions, and its characters (a dot where it takes any)."""
    characters = re.findall(r"\\?.", text)
    wild = tuple(at for at, character in enumerate(characters) if character == ".")
    return (len(characters), wild), "".join(character[-1] for character in characters)


class Patterns:
    """A table of checked patterns with their values."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self._forms: dict[Form, dict[str, tuple[int, Any]]] = {}
        self._wild: list[tuple[int, re.Pattern[str], Any]] = []
        for number, (text, value) in enumerate(told.items()):
            if LITERAL.fullmatch(text):
                form, characters = _form(text)
                self._forms.setdefault(form, {}).setdefault(characters, (number, value))
            else:
                self._wild.append((number, re.compile(rf"(.*\.)?({text})$"), value))

    def of(self, path: str, otherwise: Any) -> Any:
        """The value of the first pattern that fits the end of `path`."""
        fitting = [(number, value) for number, pattern, value in self._wild if pattern.match(path)]
        for (length, wild), table in self._forms.items():
            if len(path) == length or (len(path) > length and path[-length - 1] == "."):
                end = list(path[len(path) - length :])
                for at in wild:
                    end[at] = "."
                if (found := table.get("".join(end))) is not None:
                    fitting.append(found)
        return min(fitting, key=lambda found: found[0])[1] if fitting else otherwise
