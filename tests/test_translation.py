"""Languages: every sentence has its twin with the same gaps, and commands print in a language."""

import ast
import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from afina import errors
from afina.cli.command_table import COMMANDS
from afina.cli.main import LANGUAGE_HELP, run
from afina.evaluation.cause import RunFigures
from afina.evaluation.intervals import LossChange
from afina.evaluation.verdict import LossReport, verdict
from afina.io.result import Result, ResultTable, ResultText
from afina.io.translation import (
    GAP,
    LANGUAGES,
    Catalogue,
    Verbatim,
    catalogue,
    translate,
    use_language,
)
from afina.objectives.base import Units
from afina.objectives.task_score import TaskScore
from afina.settings import GroupedSettings, settings_groups
from sources import TEXTS, nodes
from test_rendering import KINDS, read_result, terminal

TRANSLATED = [name for name in LANGUAGES if name != "en"]
ENGLISH = re.compile(r"\b(the|of|and|with|rows|loss|fell|fits|by|was|per)\b")


@pytest.fixture(params=TRANSLATED)
def lang(request: pytest.FixtureRequest) -> Iterator[str]:
    """A language in which is printed."""
    with use_language(request.param):
        yield request.param


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSLATED)
def test_twins_have_the_gaps_of_their_sentences(name: str) -> None:
    for key, twin in catalogue(name).sentences.items():
        named = [gap[1] for gap in GAP.finditer(twin)]
        numbers = [int(text) if text else index for index, text in enumerate(named)]
        count = key.count("{}")
        assert all(named) or not any(named), (key, "either all gaps have a number or none")
        assert (not count and not any(named)) or sorted(numbers) == [*range(count)], (key, twin)


@pytest.mark.parametrize("name", TRANSLATED)
def test_short_sentences_match_only_numbers_words_and_other_sentences(name: str) -> None:
    for key, twin in catalogue(name).sentences.items():
        letters = re.sub(r"[^A-Za-z]", "", key.replace("{}", ""))
        if "{}" in key and len(letters) < 7:
            kinds = [gap[2] for gap in GAP.finditer(twin)]
            assert any(kind in ("n", "w") for kind in kinds) or ": " in key, (key, twin)


def helps() -> set[str]:
    """Return every help text of the command line."""
    texts = {LANGUAGE_HELP}
    for command in COMMANDS.values():
        texts |= {command.help, *(f.description for f in command.settings.model_fields.values())}
        if issubclass(command.settings, GroupedSettings):
            kinds = [settings_groups.get(name) for name in command.settings.group_names()]
            for kind in (kind for kind in kinds if kind.model_fields):
                if kind.__module__.startswith("afina."):
                    texts.add((kind.__doc__ or "").splitlines()[0])
                    texts |= {field.description for field in kind.model_fields.values()}
    return texts


@pytest.mark.parametrize("name", TRANSLATED)
def test_every_help_text_has_a_twin(name: str) -> None:
    assert {text for text in helps() if text not in catalogue(name).sentences} == set()


def texts_of(result: Result) -> Iterator[str]:
    """Yield what a result prints that is not a text of a user."""
    for part in result.content():
        if isinstance(part, ResultTable):
            yield from (part.title, *part.head, *(row[0] for row in part.rows))
            yield from (cell for row in part.rows for cell in row[1:])
        elif isinstance(part, ResultText) and part.wraps:
            yield part.text


@pytest.mark.parametrize("name", ["plan", "merge", "combine", "show"])
def test_results_are_printed_in_the_language(name: str, lang: str) -> None:
    for text in texts_of(read_result(name)):
        if not isinstance(text, Verbatim):
            assert not ENGLISH.search(translate(text)), (text, translate(text))


CHANGES = {  # (mean, standard error) of eval and train rows
    "one row": ((-1.0, None), (-1.0, None)),
    "improved": ((-1.0, 0.1), (-1.1, 0.1)),
    "overfits": ((-0.5, 0.05), (-2.0, 0.05)),
    "unsure": ((-0.5, 1.0), (-2.0, 0.1)),
    "none": ((0.001, 0.001), (0.0, 0.001)),
    "worse": ((0.5, 0.05), (0.4, 0.05)),
}


SCORES = {  # before, after, rows, interval of the change
    "one row": (0.0, 0.0, 1, None),
    "improved": (10.0, 80.0, 30, (60.0, 75.0)),
    "overfits": (10.0, 20.0, 30, (5.0, 15.0)),
    "unsure": (10.0, 20.0, 30, (-5.0, 25.0)),
    "none": (0.0, 0.0, 30, (0.0, 0.0)),
    "worse": (60.0, 20.0, 30, (-60.0, -20.0)),
}


@pytest.mark.parametrize("rise", [0.0, 0.1, 0.3, 0.6, 2.0])
@pytest.mark.parametrize("case", CHANGES)
def test_verdicts_are_printed_in_the_language(case: str, rise: float, lang: str) -> None:
    change, train = (LossChange(30, *one) for one in CHANGES[case])
    before, after, rows, interval = SCORES[case]
    scores = [TaskScore("exact match", after, rows, before, interval)]
    scores.append(TaskScore("accuracy", after, rows, None, interval, 25.0))
    figures = [
        RunFigures(curve, steps, 100, 10, 5, overfits, 2e-4, rank, what)
        for curve, steps in (([3.0, 1.0] * 20, 50), ([1.0, 4.0], 200), ([3.0, 2.5, 1.0], 200))
        for overfits, rank in ((False, 8), (False, None), (True, 8))
        for what in ("train loss", "reward")
        if not (overfits and what == "reward")
    ]
    losses = LossReport(3.0, 2.0, 3.0, 2.9, change, train, rows, 2.0, 2.0 + rise, 5, 10)
    for unit in ("token", "row", "pair", "answer", "masked token"):
        units = Units(unit, "tokens" if unit == "token" else "")
        found = [verdict(losses, units, score, score, run) for score in scores for run in figures]
        found.append(verdict(losses, units))
        for sentence in {one for each in found for one in (*each.sentences, *each.forgetting)}:
            shown = translate(f"- {sentence}")
            assert shown.startswith("- ") and not ENGLISH.search(shown), (sentence, shown)


def test_values_keep_their_order_and_numbers_follow_the_language() -> None:
    twins = Catalogue("es", {"{} of {}": "{1:n} contiene {0:t}", "{} rows": "{:n} filas"})
    assert twins.translate("1,234.5% of 3") == "3 contiene 1.234,5 %"
    assert twins.translate("2,000 rows of 3e-4") == "3e-4 contiene 2.000 filas"
    assert twins.translate("many rows") is None
    assert twins.line("  - 7 rows\n") == "  - 7 filas\n"


def test_texts_of_users_are_not_translated(lang: str) -> None:
    assert translate("yes") != "yes"
    table = ResultTable("", [("prompt", Verbatim("yes")), ("expected", Verbatim("1.5"))])
    stream = io.StringIO()
    Console(file=stream, width=60).print(table)
    assert " yes " in stream.getvalue() and " 1.5 " in stream.getvalue()
    assert table.to_markdown().startswith("|  |  |")


@pytest.mark.parametrize("variable", ["es", "es_ES.UTF-8"])
def test_environment_selects_the_language(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AFINA_LANG", variable)
    with pytest.raises(SystemExit):
        run(["plan", "--help"])
    assert capsys.readouterr().out.startswith("uso: afina plan")
    monkeypatch.setenv("AFINA_LANG", "tlh")
    assert translate("settings") == "settings"


@pytest.mark.parametrize(
    "words", [["--lang", "es", "plan", "none.jsonl"], ["plan", "none.jsonl", "--lang=es"]]
)
def test_flag_selects_the_language_of_errors(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) in (1, 2)
    assert "siguiente:" in capsys.readouterr().err
    assert translate("settings") == "settings"


def test_unknown_language_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--lang", "tlh", "demo"]) == 2
    assert "known: en, es" in capsys.readouterr().err


def test_json_and_markdown_are_in_english(lang: str) -> None:
    result = read_result("merge")
    assert "KL divergence" in result.to_markdown()
    assert terminal(result) != result.to_markdown()
    assert set(KINDS) >= {"merge"}


ERRORS = {name for name in vars(errors) if name.endswith("Error")}
PROSE = re.compile(r"[a-z]{3,} +[a-z{]|[a-z]{2,} [a-z]{3,}")  # not a flag or a value alone
CODE = re.compile(r"--[\w.-]+( [A-Z]\w*)?|(?:afina|pip|gunzip|def|use) [a-z{].*|\w*[_/.]\w+")


def sentence(node: ast.expr) -> str | None:
    """Return the key of a literal, an f-string or a sum of them; None of any other expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        values = node.values
        return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = sentence(node.left), sentence(node.right)
        return left + right if left is not None and right is not None else None
    return None


def error_sentences() -> Iterator[tuple[str, str]]:
    """Yield (module, key) of every sentence in the call of an error."""
    for module in TEXTS:
        for node in nodes(module):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS:
                keywords = [word.value for word in node.keywords if word.arg in ("why", "hint")]
                for text in map(sentence, [*node.args[:1], *keywords]):
                    if text and PROSE.search(CODE.sub("", text)):
                        yield module, text


@pytest.mark.parametrize("name", TRANSLATED)
def test_every_error_has_a_twin(name: str) -> None:
    known = catalogue(name).sentences
    missing = [f"{module}: {text!r}" for module, text in error_sentences() if text not in known]
    assert not missing, "add to io/translations:\n" + "\n".join(missing)


FINDINGS = {"block": 1, "review": 1, "note": 1, "add_finding": 2}  # the place of the sentence


def finding_sentences() -> Iterator[tuple[str, str]]:
    """Yield (module, key) of every sentence of the audit's gates, given at once or by a name."""
    for module in TEXTS:
        if not module.startswith("afina.audit."):
            continue
        for node in nodes(module):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                place = FINDINGS.get(node.func.attr, len(node.args))
                texts = map(sentence, node.args[place : place + 1])
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "what":
                texts = map(sentence, [node.value])
            else:
                continue
            yield from ((module, text) for text in texts if text and PROSE.search(text))


@pytest.mark.parametrize("name", TRANSLATED)
def test_every_finding_of_the_audit_has_a_twin(name: str) -> None:
    known, found = catalogue(name).sentences, list(finding_sentences())
    missing = [f"{module}: {text!r}" for module, text in found if text not in known]
    assert len(found) > 50
    assert not missing, "add to io/translations:\n" + "\n".join(missing)


def test_a_finding_is_printed_with_its_file_and_values_as_they_are() -> None:
    with use_language("es"):
        line = translate("- block, files: ranks are integers from 1, not 'x'  [a/b.json]")
    assert line == "- bloqueo, files: los rangos son enteros desde 1, no 'x'  [a/b.json]"
