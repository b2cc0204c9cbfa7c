"""Language of what a command prints: sentences are looked up in a catalogue where they are printed.

    translations/es/*.yaml    "trainable parameters: {} of {}": "parámetros entrenables: {} de {}"

A key is the English sentence as the source has it, with `{}` for each value of its f-string; so a
printed sentence is found by its fixed parts, and no call site knows about languages. A twin takes
the values in the same order, or by number where their order differs:

    {}  {0}      a number is written as in the language, anything else as it is
    {:n}  {0:n}  the value is a number, which may have a unit: other sentences do not match
    {:w}  {0:w}  the value is one word, which is copied: other sentences do not match
    {:v}  {0:v}  the value is copied: a command, a text of the user
    {:t}  {0:t}  the value is a sentence or noun of the catalogue
    {:l}  {0:l}  the value is a list of such, with commas between them

A sentence without a twin is printed in English. JSON, files and exceptions are always in English.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path

import yaml

from afina.errors import AfinaError, SettingsError

FOLDER = Path(__file__).with_name("translations")
ENGLISH = "en"
LANGUAGES = (ENGLISH, *sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir()))
VARIABLE = "AFINA_LANG"
GAP = re.compile(r"\{(\d*)(?::([lntvw]))?\}")  # of a twin
BULLET = re.compile(r"(\s*(?:- )?)(.*?)(\s*)", re.DOTALL)
DIGITS = r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?"
NUMBER = re.compile(rf"({DIGITS})( ?)(%|[A-Za-z]*)")
VALUES = {"n": rf"({DIGITS} ?(?:%|[A-Za-z]*))", "w": r"(\S*)"}  # of a gap; else anything
SEPARATORS = {"es": str.maketrans(",.", ".,")}
PERCENT = {"es": " %"}

_language: str | None = None


class Verbatim(str):
    """Text of a user or a model in a result: it is printed as it is in every language."""


def language() -> str:
    """Return the language of printed text: that of the command, else of AFINA_LANG, else English.

    A locale such as "es_ES.UTF-8" counts as its language; an unknown one as English.
    """
    if _language is not None:
        return _language
    name = re.split(r"[-_.]", os.environ.get(VARIABLE, ENGLISH))[0].lower()
    return name if name in LANGUAGES else ENGLISH


@contextmanager
def use_language(name: str | None) -> Iterator[None]:
    """Print in a language until the end of the block; with None, in that of AFINA_LANG.

    Raises:
        SettingsError: There is no catalogue of that language.
    """
    global _language
    if name is not None and name not in LANGUAGES:
        known = ", ".join(LANGUAGES)
        raise SettingsError(f"unknown language {name!r}", where="--lang", hint=f"known: {known}")
    before, _language = _language, name
    try:
        yield
    finally:
        _language = before


class Catalogue:
    """Sentences of one language, by their English form.

    Args:
        name: The language.
        sentences: Twins by key.
    """

    def __init__(self, name: str, sentences: Mapping[str, str]) -> None:
        self.name, self.sentences = name, sentences
        with_gaps = sorted((key for key in sentences if "{}" in key), key=_fixed_length)
        self._patterns = [
            (_pattern(key, sentences[key]), sentences[key]) for key in reversed(with_gaps)
        ]

    def translate(self, text: str) -> str | None:
        """Return the twin of a sentence with its values, or a number; None where there is none."""
        if (twin := self.sentences.get(text)) is not None:
            return twin
        for pattern, twin in self._patterns:  # the one with the longest fixed parts first
            if found := pattern.fullmatch(text):
                return self._fill(twin, found.groups())
        return self.number(text)

    def _fill(self, twin: str, values: tuple[str, ...]) -> str:
        numbers = iter(range(len(values)))

        def value(gap: re.Match[str]) -> str:
            text = values[int(gap[1]) if gap[1] else next(numbers)]
            if gap[2] in ("v", "w"):
                return text
            if gap[2] == "t":
                return self.line(text)
            if gap[2] == "l":
                return ", ".join(map(self.line, text.split(", ")))
            return self.number(text) or text

        return GAP.sub(value, twin)

    def number(self, text: str) -> str | None:
        """Return a number, which may have a unit, as the language writes it."""
        if not (found := NUMBER.fullmatch(text)):
            return None
        number = found[1].translate(SEPARATORS.get(self.name, {}))
        return number + (PERCENT.get(self.name, "%") if found[3] == "%" else found[2] + found[3])

    def line(self, text: str) -> str:
        """Return a text in the language; space and a bullet around it stay."""
        before, inner, after = BULLET.fullmatch(text).groups()  # type: ignore[union-attr]
        return f"{before}{self.translate(inner) or inner}{after}"


def _fixed_length(key: str) -> int:
    return len(key.replace("{}", ""))


def _pattern(key: str, twin: str) -> re.Pattern[str]:
    """Return the pattern of the English sentences that a key stands for."""
    gaps = [(gap[1], gap[2]) for gap in GAP.finditer(twin)]
    kinds = {int(name) if name else index: kind for index, (name, kind) in enumerate(gaps)}
    fixed = [re.escape(part) for part in key.split("{}")]
    values = (VALUES.get(kinds.get(index, ""), "(.*?)") for index in range(len(fixed) - 1))
    return re.compile(
        "".join(chain.from_iterable(zip(fixed, [*values, ""], strict=True))), re.DOTALL
    )


@cache
def catalogue(name: str) -> Catalogue:
    """Return the catalogue of a language, of all files in its folder."""
    sentences: dict[str, str] = {}
    for file in sorted((FOLDER / name).glob("*.yaml")):
        sentences |= yaml.safe_load(file.read_text(encoding="utf-8"))
    return Catalogue(name, sentences)


def translate(text: str) -> str:
    """Return a text in the language of printed text; `Verbatim` and unknown text as it is."""
    if isinstance(text, Verbatim) or language() == ENGLISH:
        return text
    return catalogue(language()).line(text)


def translate_error(error: AfinaError) -> str:
    """Return an error in the language of printed text; locations and labels as in `str(error)`."""
    if language() == ENGLISH:
        return str(error)
    what = translate(error.what)
    lines = [f"{error.where}: {what}" if error.where else what]
    for label, text in (("why:", error.why), ("next:", error.hint)):
        if text:
            lines.append(f"  {translate(label)} {translate(text)}")
    return "\n".join(lines)
