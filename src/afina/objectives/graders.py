"""Graders as OpenAI's API describes them: a JSON object that says how good an answer is, as a number.

    {"type": "string_check", "name": "same", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
     "operation": "eq"}
    {"type": "multi", "name": "both", "graders": {"same": {...}, "close": {...}}, "calculate_output": "same + 0.3 * close"}

    string_check       eq, ne, like (input contains reference), ilike (the same, whatever the case): 1 or 0
    text_similarity    fuzzy_match (edits, by rapidfuzz), bleu (sacrebleu), gleu (nltk), rouge_1 to rouge_5, rouge_l: 0 to 1
    python             the code's own grade(sample, item); only where it was allowed, for it may do anything
    multi              a formula over the numbers of others: + - * / ^, min, max, abs, floor, ceil, exp, sqrt, log

`item` is the row of the data, `sample` the answer: output_text, and output_json where it is JSON. An answer that is not, or
has not what is asked of it, is worth 0 to the grader that asks. Nothing here needs torch.
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
from functools import lru_cache
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, DataError, SettingsError, TrainingError, did_you_mean

FIELDS = {
    "string_check": {"input", "reference", "operation"},
    "text_similarity": {"input", "reference", "evaluation_metric"},
    "python": {"source"},
    "multi": {"graders", "calculate_output"},
}
NOT_HERE = {
    "score_model": "no model here is asked to judge in words; the run of a reward model can be a reward of afina train",
    "label_model": "no model here is asked to judge in words; the run of a reward model can be a reward of afina train",
    "meteor": "meteor needs a dictionary of synonyms that is not here",
    "cosine": "cosine needs a model of embeddings that is not here",
}
OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
VARIADIC_FUNCTIONS = (
    "min",
    "max",
)  # of these, those that take two values or more; the others take one
VARIABLE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
PATH = re.compile(r"\s*(item|sample)((?:\.[^\s.\[\]{}]+|\[\d+\])+)\s*")
LONGEST = 500  # characters of a formula
Scope = Mapping[str, Any]  # {"item": {...}, "sample": {...}}


class _Unreadable(Exception):
    """The answer has not what a template asks of it."""


@dataclass(frozen=True)
class Grader:
    """A grader that can be asked. `judge` gives its number, and under their names those of its parts."""

    name: str
    definition: Mapping[str, Any]
    judge: Callable[[Scope], tuple[float, dict[str, float]]]
    templates: tuple["GraderTemplate", ...]

    @property
    def content(self) -> str:
        """What tells that it is the same grader."""
        return hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()

    @property
    def is_code(self) -> bool:
        """Whether it runs Python of whoever wrote it."""
        return any(one.get("type") == "python" for one in _all(self.definition))

    def grade(self, answer: str, item: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
        """The number of an answer to the row `item`, and those of its parts; raises `TrainingError` where it has none."""
        sample: dict[str, Any] = {"output_text": answer}
        with suppress(ValueError, RecursionError):  # no JSON
            sample["output_json"] = json.loads(answer)
        number, parts = self.judge({"item": item, "sample": sample})
        if not math.isfinite(number):
            raise TrainingError(
                "a reward has to be a finite number",
                where=self.name,
                why=f"{number}; answer {answer[:80]!r}",
            )
        return number, parts

    def check(self, item: Mapping[str, Any], where: str) -> None:
        """Raise `DataError` where a row has not what the templates ask of it."""
        for template in self.templates:
            template.check(item, where)


@dataclass(frozen=True)
class GraderTemplate:
    """A text with {{ item.x }} and {{ sample.output_text }} in it."""

    text: str
    paths: tuple[tuple[str | int, ...], ...]

    @classmethod
    def of(cls, text: Any, where: str) -> "GraderTemplate":
        """The template; raises `SettingsError` on a variable that there never is."""
        if not isinstance(text, str):
            raise SettingsError("expected a text", where=where)
        paths = []
        for told in VARIABLE.findall(text):
            found = PATH.fullmatch(told)
            if found is None or (
                found[1] == "sample" and not re.match(r"\.(output_text$|output_json\b)", found[2])
            ):
                hint = "{{ item.NAME }}, {{ sample.output_text }} or {{ sample.output_json.NAME }}"
                raise SettingsError(
                    f"no such variable: {told.strip()[:60]!r}", where=where, hint=hint
                )
            steps = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", found[2])
            paths.append((found[1], *(name or int(number) for name, number in steps)))
        return cls(text, tuple(paths))

    def filled(self, scope: Scope) -> str:
        """The text with its variables; what is no text is written as JSON."""
        values = iter([_look(scope, path) for path in self.paths])
        return VARIABLE.sub(lambda _: _as_text(next(values)), self.text)

    def check(self, item: Mapping[str, Any], where: str) -> None:
        """Raise `DataError` where a row has not what is asked of it."""
        for path in self.paths:
            if path[0] == "item":
                try:
                    _look({"item": item}, path)
                except _Unreadable:
                    name = ".".join(map(str, path[1:]))
                    raise DataError(
                        "the grader asks for a field that is not here", where=f"{where}:{name}"
                    ) from None


def _look(scope: Scope, path: tuple[str | int, ...]) -> Any:
    value: Any = scope
    for step in path:
        if not isinstance(value, list if isinstance(step, int) else Mapping):
            raise _Unreadable
        try:
            value = value[step]  # type: ignore[index]
        except LookupError:
            raise _Unreadable from None
    return value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_grader(path: Path, run_python: bool) -> Grader:
    """The grader of a JSON file; raises `SettingsError`."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the grader: {error.strerror}", where=str(path)) from None
    except ValueError as error:
        raise SettingsError("the grader is no JSON", where=str(path), why=str(error)) from None
    return parse_grader(told, run_python)


def parse_grader(
    told: Any, run_python: bool, where: str = "grader", within: bool = False
) -> Grader:
    """The grader that a JSON object describes; raises `SettingsError`, naming what is wrong.

    Code is refused without `run_python`. `within` another one, there is no third level.
    """
    if not isinstance(told, Mapping):
        raise SettingsError("expected an object with a type and a name", where=where)
    kind, name = told.get("type"), told.get("name")
    if kind in NOT_HERE:
        raise SettingsError(
            f"{kind} cannot be had here",
            where=where,
            why=NOT_HERE[str(kind)],
            hint=", ".join(FIELDS),
        )
    if kind not in FIELDS or (within and kind == "multi"):
        raise SettingsError(
            f"type cannot be {str(kind)[:40]!r}", where=where, hint=did_you_mean(str(kind), FIELDS)
        )
    if not isinstance(name, str) or not 0 < len(name) <= 100:
        raise SettingsError("a grader has a name", where=where)
    wanted = FIELDS[str(kind)]
    for field in told:
        if field not in wanted | {"type", "name"} and not (
            field == "image_tag" and told[field] is None
        ):
            raise SettingsError(
                f"{kind} has no field {field!r}", where=where, hint=did_you_mean(field, wanted)
            )
    for field in sorted(wanted - set(told)):
        raise SettingsError(f"{field} is missing", where=where)
    make = {"string_check": _string_check, "text_similarity": _similarity, "multi": _multi}
    if kind == "python":
        if not run_python:
            why = "the code of such a grader may do anything that this process may"
            raise SettingsError(
                "Python in a grader is not run here", where=where, why=why, hint="run_python: true"
            )
        return Grader(name, told, _python(told["source"], name, where), ())
    return make[str(kind)](told, name, where, run_python)


def _texts(told: Mapping[str, Any], where: str) -> tuple[GraderTemplate, GraderTemplate]:
    return GraderTemplate.of(told["input"], f"{where}.input"), GraderTemplate.of(
        told["reference"], f"{where}.reference"
    )


def _compared(
    told: Mapping[str, Any], name: str, where: str, compare: Callable[[str, str], float]
) -> Grader:
    """A grader that compares two texts; an answer from which they cannot be made is worth nothing."""
    templates = _texts(told, where)

    def judge(scope: Scope) -> tuple[float, dict[str, float]]:
        try:
            text, reference = (template.filled(scope) for template in templates)
        except _Unreadable:
            return 0.0, {}
        return float(compare(text, reference)), {}

    return Grader(name, told, judge, templates)


def _string_check(told: Mapping[str, Any], name: str, where: str, _: bool) -> Grader:
    if told["operation"] not in OPERATIONS:
        hint = did_you_mean(str(told["operation"]), OPERATIONS)
        raise SettingsError(
            f"operation cannot be {str(told['operation'])[:40]!r}", where=where, hint=hint
        )
    return _compared(told, name, where, OPERATIONS[told["operation"]])


# ---- similarity


def _similarity(told: Mapping[str, Any], name: str, where: str, _: bool) -> Grader:
    metric = str(told["evaluation_metric"])
    if metric in NOT_HERE:
        raise SettingsError(
            f"{metric} cannot be had here",
            where=where,
            why=NOT_HERE[metric],
            hint=", ".join(METRICS),
        )
    if metric not in METRICS:
        raise SettingsError(
            f"evaluation_metric cannot be {metric[:40]!r}",
            where=where,
            hint=did_you_mean(metric, METRICS),
        )
    return _compared(told, name, where, METRICS[metric])


def _fuzzy(text: str, reference: str) -> float:
    from rapidfuzz.fuzz import ratio

    return ratio(text, reference) / 100.0


def _bleu(text: str, reference: str) -> float:
    from sacrebleu import sentence_bleu

    return sentence_bleu(text, [reference]).score / 100.0


def _gleu(text: str, reference: str) -> float:
    from nltk.translate.gleu_score import sentence_gleu

    return (
        float(sentence_gleu([reference.split()], text.split()))
        if text.split() and reference.split()
        else 0.0
    )


@lru_cache
def _rouge(kind: str) -> Callable[[str, str], float]:
    def compare(text: str, reference: str) -> float:
        return _rouge_scorer(kind).score(reference, text)[kind].fmeasure

    return compare


@lru_cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_Words())


class _Words:
    """rouge-score's own tokenizer keeps only a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())


METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": _fuzzy,
    "bleu": _bleu,
    "gleu": _gleu,
    **{f"rouge_{n}": _rouge(f"rouge{n}") for n in range(1, 6)},
    "rouge_l": _rouge("rougeL"),
}


# ---- code, and formulas


def _python(
    source: Any, name: str, where: str
) -> Callable[[Scope], tuple[float, dict[str, float]]]:
    """grade(sample, item) of the source, which is run when the first answer comes: who checks a grader runs nothing."""
    try:
        tree = ast.parse(source)
        code = compile(tree, f"<{name}>", "exec")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise SettingsError("the source is no Python", where=where, why=str(error)) from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "grade" for node in tree.body):
        raise SettingsError(
            "the source has no function `grade`", where=where, hint="def grade(sample, item):"
        )
    space: dict[str, Any] = {}

    def judge(scope: Scope) -> tuple[float, dict[str, float]]:
        try:
            if not space:
                space["__name__"] = "grader"
                exec(code, space)
            return float(space["grade"](dict(scope["sample"]), dict(scope["item"]))), {}
        except Exception as error:  # likewise
            why = f"{type(error).__name__}: {error}; answer {scope['sample']['output_text'][:80]!r}"
            raise TrainingError("the grader's code failed", where=name, why=why) from error

    return judge


def _multi(told: Mapping[str, Any], name: str, where: str, run_python: bool) -> Grader:
    given = told["graders"]
    if isinstance(given, Mapping) and isinstance(given.get("type"), str):
        given = {given.get("name"): given}  # one alone
    if not isinstance(given, Mapping) or not 0 < len(given) <= 32:
        raise SettingsError("expected graders by their names", where=f"{where}.graders")
    for key in given:
        if not isinstance(key, str) or not key.isidentifier() or key in FUNCTIONS:
            hint = "letters, digits and _, and no function of formulas"
            raise SettingsError(
                f"a formula cannot name {str(key)[:40]!r}", where=f"{where}.graders", hint=hint
            )
    parts = {
        key: parse_grader(one, run_python, f"{where}.graders.{key}", True)
        for key, one in given.items()
    }
    formula = make_formula(told["calculate_output"], parts, f"{where}.calculate_output")

    def judge(scope: Scope) -> tuple[float, dict[str, float]]:
        numbers = {key: part.judge(scope)[0] for key, part in parts.items()}
        try:
            found = formula(numbers)
        except (
            ArithmeticError,
            ValueError,
            TypeError,
        ) as error:  # a root of -1 is no number that can be compared
            raise TrainingError(
                "the formula has no value", where=name, why=f"{error}; at {numbers}"
            ) from error
        return found, numbers

    return Grader(
        name, told, judge, tuple(template for part in parts.values() for template in part.templates)
    )


def make_formula(
    text: Any, names: Mapping[str, Any], where: str
) -> Callable[[Mapping[str, float]], float]:
    """Arithmetic over `names`, and nothing else, as a function of their numbers; raises `SettingsError`.

    It is walked, never run; all numbers are floats, so that no power takes long.
    """
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST:
        raise SettingsError(f"expected a formula of up to {LONGEST} characters", where=where)
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        _check(tree, names, where)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise SettingsError("the formula cannot be read", where=where, why=str(error)) from None
    return lambda numbers: float(_value(tree, numbers))


OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: a,
}


def _check(node: ast.expr, names: Mapping[str, Any], where: str) -> None:
    """Raise `SettingsError` for anything but arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        float(node.value)  # type: ignore[arg-type]  # an integer may be too large
    elif isinstance(node, ast.Name):
        if node.id not in names:
            raise SettingsError(
                f"no grader {node.id!r}", where=where, hint=did_you_mean(node.id, names)
            )
    elif isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in OPERATORS:
        for part in _parts(node):
            _check(part, names, where)
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in FUNCTIONS
        and not node.keywords
    ):
        if (len(node.args) < 2) if node.func.id in VARIADIC_FUNCTIONS else len(node.args) != 1:
            raise SettingsError(f"{node.func.id} takes another number of values", where=where)
        for part in node.args:
            _check(part, names, where)
    else:
        hint = "numbers, names of graders, + - * / ^, and " + ", ".join(FUNCTIONS)
        raise SettingsError(
            f"no part of a formula: {ast.unparse(node)[:60]}", where=where, hint=hint
        )


def _parts(node: ast.BinOp | ast.UnaryOp) -> list[ast.expr]:
    return [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]


def _value(node: ast.expr, numbers: Mapping[str, float]) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.Call):
        return float(FUNCTIONS[node.func.id](*(_value(part, numbers) for part in node.args)))  # type: ignore[attr-defined]
    assert isinstance(node, ast.BinOp | ast.UnaryOp)
    return OPERATORS[type(node.op)](*(_value(part, numbers) for part in _parts(node)))


def _all(told: Any) -> Iterator[Mapping[str, Any]]:
    """A grader as it was told, and all within it."""
    if isinstance(told, Mapping):
        yield told
        for one in told.values():
            yield from _all(one)


def main() -> int:
    """One answer by one grader, as JSON from standard input to standard output: for code that is to run apart."""
    asked = json.load(sys.stdin)
    try:
        reward, parts = parse_grader(asked["grader"], True).grade(asked["answer"], asked["item"])
    except AfinaError as error:
        print(
            "; ".join(part for part in (error.what, error.why) if part).replace("\n", " "),
            file=sys.stderr,
        )
        return 1
    print("\n" + json.dumps({"reward": reward, "parts": parts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
