"""Graders as OpenAI's API describes them: a JSON object that scores an answer with a number.

    {"type": "string_check", "name": "same", "input": "{{ sample.output_text }}",
     "reference": "{{ item.answer }}", "operation": "eq"}
    {"type": "multi", "name": "both", "graders": {"same": {...}, "close": {...}},
     "calculate_output": "same + 0.3 * close"}

    string_check       eq, ne, like (input contains reference), ilike (like, ignoring case): 1 or 0
    text_similarity    fuzzy_match (edit distance, by rapidfuzz), bleu (sacrebleu), gleu (nltk),
                       rouge_1 to rouge_5, rouge_l: 0 to 1
    python             the code's own grade(sample, item); only where allowed, as it can do anything
    multi              a formula over the scores of other graders: + - * / ^, min, max, abs, floor,
                       ceil, exp, sqrt, log

`item` is the row of the data, `sample` the answer: output_text, and output_json where it is JSON.
An answer that lacks what a template reads scores 0. Nothing here needs torch.
"""

import ast
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, DataError, SettingsError, TrainingError, did_you_mean
from afina.objectives.grader_formulas import FUNCTIONS, make_formula
from afina.objectives.grader_metrics import TEXT_SIMILARITIES

GRADER_FIELDS = {
    "string_check": {"input", "reference", "operation"},
    "text_similarity": {"input", "reference", "evaluation_metric"},
    "python": {"source"},
    "multi": {"graders", "calculate_output"},
}
NO_MODEL_GRADERS = (
    "afina has no graders by a language model; "
    "the run of a reward model can be a reward function of afina train"
)
UNSUPPORTED_GRADERS = {
    "score_model": NO_MODEL_GRADERS,
    "label_model": NO_MODEL_GRADERS,
    "meteor": "meteor needs a dictionary of synonyms, which afina does not include",
    "cosine": "cosine needs a model of embeddings, which afina does not include",
}
OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}
PATH = re.compile(r"\s*(item|sample)((?:\.[^\s.\[\]{}]+|\[\d+\])+)\s*")
MAX_FILLED_LENGTH = 4_000_000  # characters of a template with its values

Scope = Mapping[str, Any]  # {"item": {...}, "sample": {...}}


class _MissingValueError(Exception):
    """The answer or the row lacks what a template reads."""


@dataclass(frozen=True)
class Grader:
    """A parsed grader.

    Attributes:
        name: Its name.
        definition: The JSON object that describes it.
        score: Returns its score, and those of its parts by name.
        templates: Templates that it fills, those of its parts included.
    """

    name: str
    definition: Mapping[str, Any]
    score: Callable[[Scope], tuple[float, dict[str, float]]]
    templates: tuple["GraderTemplate", ...]

    @property
    def content(self) -> str:
        """Hash of the definition; equal for equal graders."""
        return hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()

    @property
    def is_code(self) -> bool:
        """Whether it, or one of its parts, runs Python code from its definition."""
        return any(part.get("type") == "python" for part in _walk(self.definition))

    def grade(self, answer: str, item: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
        """Return the score of an answer to the row `item`, and those of its parts.

        Raises:
            TrainingError: the score is not finite, a formula has no value, or the grader's code
                failed.
        """
        sample: dict[str, Any] = {"output_text": answer}
        with suppress(ValueError, RecursionError):  # not JSON
            sample["output_json"] = json.loads(answer)
        number, parts = self.score({"item": item, "sample": sample})
        if not math.isfinite(number):
            why = f"{number}; answer {answer[:80]!r}"
            raise TrainingError("a reward has to be a finite number", where=self.name, why=why)
        return number, parts

    def check(self, item: Mapping[str, Any], where: str) -> None:
        """Raise `DataError` where a row lacks a field that the templates read."""
        for template in self.templates:
            template.check(item, where)


@dataclass(frozen=True)
class GraderTemplate:
    """A text with {{ item.x }} and {{ sample.output_text }} in it."""

    text: str
    paths: tuple[tuple[str | int, ...], ...]

    @classmethod
    def of(cls, text: Any, where: str) -> "GraderTemplate":
        """Return the template of a text; raises `SettingsError` for an unknown variable."""
        if not isinstance(text, str):
            raise SettingsError("expected a text", where=where)
        paths = []
        for variable in _split(text)[1]:
            found = PATH.fullmatch(variable)
            if found is None or (
                found[1] == "sample" and not re.match(r"\.(output_text$|output_json\b)", found[2])
            ):
                hint = "{{ item.NAME }}, {{ sample.output_text }} or {{ sample.output_json.NAME }}"
                what = f"unknown variable {variable.strip()[:60]!r}"
                raise SettingsError(what, where=where, hint=hint)
            steps = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", found[2])
            paths.append((found[1], *(name or int(number) for name, number in steps)))
        return cls(text, tuple(paths))

    def fill(self, scope: Scope) -> str:
        """Return the text with the values of its variables; other types than text as JSON."""
        filled, length = [], 0
        for part, path in zip_longest(_split(self.text)[0], self.paths):
            filled.append(part)
            filled += [] if path is None else [_as_text(_look(scope, path))]
            length += sum(map(len, filled[-2:]))
            if length > MAX_FILLED_LENGTH:
                what = f"a filled template has more than {MAX_FILLED_LENGTH:,} characters"
                raise DataError(what)
        return "".join(filled)

    def check(self, item: Mapping[str, Any], where: str) -> None:
        """Raise `DataError` where a row lacks a field that the template reads."""
        for path in self.paths:
            if path[0] == "item":
                try:
                    _look({"item": item}, path)
                except _MissingValueError:
                    name = ".".join(map(str, path[1:]))
                    what = "the grader reads a field that the row does not have"
                    raise DataError(what, where=f"{where}:{name}") from None


def _split(text: str) -> tuple[list[str], list[str]]:
    """Return the texts around the variables `{{ ... }}` of a template, and the variables.

    Time grows with the length of the text only, also where braces are never closed.
    """
    texts, variables, start = [], [], 0
    while (begin := text.find("{{", start)) >= 0 and (end := text.find("}}", begin + 2)) >= 0:
        texts.append(text[start:begin])
        variables.append(text[begin + 2 : end])
        start = end + 2
    return [*texts, text[start:]], variables


def _look(scope: Scope, path: tuple[str | int, ...]) -> Any:
    value: Any = scope
    for step in path:
        if not isinstance(value, list if isinstance(step, int) else Mapping):
            raise _MissingValueError
        try:
            value = value[step]  # type: ignore[index]
        except LookupError:
            raise _MissingValueError from None
    return value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_grader(path: Path, allow_python: bool) -> Grader:
    """Return the grader of a JSON file; raises `SettingsError`."""
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the grader: {error.strerror}", where=str(path)) from None
    except ValueError as error:
        raise SettingsError("the grader is not JSON", where=str(path), why=str(error)) from None
    return parse_grader(definition, allow_python)


def parse_grader(
    definition: Any, allow_python: bool, where: str = "grader", within: bool = False
) -> Grader:
    """Return the grader that a JSON object describes.

    Args:
        definition: The object.
        allow_python: Whether graders of type python may run their code.
        where: Where the object is, for error messages.
        within: Whether it is part of another grader; such a part has no parts itself.

    Raises:
        SettingsError: a type, field or name is unknown, missing or not allowed.
    """
    if not isinstance(definition, Mapping):
        raise SettingsError("expected an object with a type and a name", where=where)
    kind, name = definition.get("type"), definition.get("name")
    if kind in UNSUPPORTED_GRADERS:
        raise SettingsError(
            f"{kind} is not supported",
            where=where,
            why=UNSUPPORTED_GRADERS[str(kind)],
            hint=", ".join(GRADER_FIELDS),
        )
    if kind not in GRADER_FIELDS or (within and kind == "multi"):
        raise SettingsError(
            f"type cannot be {str(kind)[:40]!r}",
            where=where,
            hint=did_you_mean(str(kind), GRADER_FIELDS),
        )
    if not isinstance(name, str) or not 0 < len(name) <= 100:
        raise SettingsError("a grader needs a name of 1 to 100 characters", where=where)
    required = GRADER_FIELDS[str(kind)]
    for field in definition:
        if field not in required | {"type", "name"} and not (
            field == "image_tag" and definition[field] is None
        ):
            raise SettingsError(
                f"{kind} has no field {field!r}", where=where, hint=did_you_mean(field, required)
            )
    for field in sorted(required - set(definition)):
        raise SettingsError(f"{field} is missing", where=where)
    make = {
        "string_check": _string_check,
        "text_similarity": _similarity,
        "python": _python,
        "multi": _multi,
    }
    return make[str(kind)](definition, name, where, allow_python)


def _compared(
    definition: Mapping[str, Any], name: str, where: str, compare: Callable[[str, str], float]
) -> Grader:
    """Return a grader that compares two texts; an answer that lacks one of them scores 0."""
    templates = tuple(
        GraderTemplate.of(definition[field], f"{where}.{field}") for field in ("input", "reference")
    )

    def score(scope: Scope) -> tuple[float, dict[str, float]]:
        try:
            text, reference = (template.fill(scope) for template in templates)
        except _MissingValueError:
            return 0.0, {}
        return float(compare(text, reference)), {}

    return Grader(name, definition, score, templates)


def _string_check(definition: Mapping[str, Any], name: str, where: str, _: bool) -> Grader:
    if definition["operation"] not in OPERATIONS:
        hint = did_you_mean(str(definition["operation"]), OPERATIONS)
        raise SettingsError(
            f"operation cannot be {str(definition['operation'])[:40]!r}", where=where, hint=hint
        )
    return _compared(definition, name, where, OPERATIONS[definition["operation"]])


def _similarity(definition: Mapping[str, Any], name: str, where: str, _: bool) -> Grader:
    metric = str(definition["evaluation_metric"])
    if metric in UNSUPPORTED_GRADERS:
        raise SettingsError(
            f"{metric} is not supported",
            where=where,
            why=UNSUPPORTED_GRADERS[metric],
            hint=", ".join(TEXT_SIMILARITIES),
        )
    if metric not in TEXT_SIMILARITIES:
        raise SettingsError(
            f"evaluation_metric cannot be {metric[:40]!r}",
            where=where,
            hint=did_you_mean(metric, TEXT_SIMILARITIES),
        )
    TEXT_SIMILARITIES[metric]("a word", "a word")  # imports its package before a long run
    return _compared(definition, name, where, TEXT_SIMILARITIES[metric])


def _python(definition: Mapping[str, Any], name: str, where: str, allow_python: bool) -> Grader:
    """Return the grader of a source with grade(sample, item), which runs with the first answer."""
    if not allow_python:
        what = "Python in a grader is not run here"
        why = "such code can do anything that this process can"
        raise SettingsError(what, where=where, why=why, hint="allow_python_graders: true")
    source = definition["source"]
    try:
        tree = ast.parse(source)
        code = compile(tree, f"<{name}>", "exec")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise SettingsError("the source is not valid Python", where=where, why=str(error)) from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "grade" for node in tree.body):
        raise SettingsError(
            "the source has no function `grade`", where=where, hint="def grade(sample, item):"
        )
    space: dict[str, Any] = {}

    def score(scope: Scope) -> tuple[float, dict[str, float]]:
        try:
            if not space:
                space["__name__"] = "grader"
                exec(code, space)
            return float(space["grade"](dict(scope["sample"]), dict(scope["item"]))), {}
        except Exception as error:  # any error of the grader's own code
            why = f"{type(error).__name__}: {error}; answer {scope['sample']['output_text'][:80]!r}"
            raise TrainingError("the grader's code failed", where=name, why=why) from error

    return Grader(name, definition, score, ())


def _multi(definition: Mapping[str, Any], name: str, where: str, allow_python: bool) -> Grader:
    given = definition["graders"]
    if isinstance(given, Mapping) and isinstance(given.get("type"), str):
        given = {given.get("name"): given}  # a single grader, as OpenAI's client writes it
    if not isinstance(given, Mapping) or not 0 < len(given) <= 32:
        raise SettingsError("expected 1 to 32 graders by name", where=f"{where}.graders")
    for key in given:
        if not isinstance(key, str) or not key.isidentifier() or key in FUNCTIONS:
            hint = "letters, digits and _, and not the name of a function of formulas"
            raise SettingsError(
                f"a formula cannot name {str(key)[:40]!r}", where=f"{where}.graders", hint=hint
            )
    parts = {
        key: parse_grader(one, allow_python, f"{where}.graders.{key}", True)
        for key, one in given.items()
    }
    formula = make_formula(definition["calculate_output"], parts, f"{where}.calculate_output")

    def score(scope: Scope) -> tuple[float, dict[str, float]]:
        numbers = {key: part.score(scope)[0] for key, part in parts.items()}
        try:
            found = formula(numbers)
        except (ArithmeticError, ValueError, TypeError) as error:  # TypeError: complex numbers
            why = f"{error}; at {numbers}"
            raise TrainingError("the formula has no value", where=name, why=why) from error
        return found, numbers

    templates = tuple(template for part in parts.values() for template in part.templates)
    return Grader(name, definition, score, templates)


def _walk(definition: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a grader's definition and those of all its parts."""
    if isinstance(definition, Mapping):
        yield definition
        for value in definition.values():
            yield from _walk(value)


def main() -> int:
    """Grade one answer in a subprocess, from JSON on standard input to JSON on standard output."""
    request = json.load(sys.stdin)
    try:
        grader = parse_grader(request["grader"], allow_python=True)
        reward, parts = grader.grade(request["answer"], request["item"])
    except AfinaError as error:
        reasons = "; ".join(part for part in (error.what, error.why) if part)
        print(reasons.replace("\n", " "), file=sys.stderr)
        return 1
    print("\n" + json.dumps({"reward": reward, "parts": parts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
