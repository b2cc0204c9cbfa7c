"""Graders: what each says of an answer, formulas that can only calculate, and what is refused with its name."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from afina.data.schemas import PROMPT
from afina.data.table import read_table
from afina.errors import AfinaError, DataError, SettingsError, TrainingError
from afina.evaluation import metrics
from afina.objectives.grader_formulas import make_formula
from afina.objectives.graders import parse_grader
from helpers import write_rows

SAMPLE = "{{ sample.output_text }}"


def check(
    operation: str = "eq", input: str = SAMPLE, reference: str = "{{item.answer}}"
) -> dict[str, Any]:
    return {
        "type": "string_check",
        "name": "same",
        "input": input,
        "reference": reference,
        "operation": operation,
    }


def similar(metric: str) -> dict[str, Any]:
    return {
        "type": "text_similarity",
        "name": "close",
        "input": SAMPLE,
        "reference": "{{ item.answer }}",
        "evaluation_metric": metric,
    }


def grade(told: dict[str, Any], answer: str, item: Any = None, run_python: bool = False) -> float:
    return parse_grader(told, run_python).grade(answer, item or {"answer": "Sol y luna"})[0]


@pytest.mark.parametrize(
    ("operation", "answer", "expected"),
    [
        ("eq", "Sol y luna", 1),
        ("eq", "sol y luna", 0),
        ("ne", "sol", 1),
        ("ne", "Sol y luna", 0),
        ("like", "el Sol y luna.", 1),
        ("like", "el sol y luna.", 0),
        ("ilike", "EL SOL Y LUNA", 1),
        ("ilike", "el sol", 0),
    ],
)
def test_strings(operation: str, answer: str, expected: float) -> None:
    assert grade(check(operation), answer) == expected


def test_variables() -> None:
    item = {"a": {"b": ["x", {"c d": 1, "niño": "y"}]}, "n": 3.5, "yes": True}
    for told, expected in (
        ("{{item.a.b[0]}}", "x"),
        ("{{ item.a.b[1].niño }}!", "y!"),
        ("{{item.n}}{{item.yes}}", "3.5true"),
        ("{{item.a.b}}", '["x", {"c d": 1, "niño": "y"}]'),
        ("{ {item.n} }", "{ {item.n} }"),
    ):
        assert grade(check(input=told, reference=expected.replace("{{", "")), "", item) == 1, told
    # what an answer says is text, and no template
    assert grade(check(reference="{{item.n}}"), "{{item.n}}", item) == 0
    assert (
        grade(
            check(input="{{sample.output_json.city}}", reference="Roma"), '{"city": "Roma"}', item
        )
        == 1
    )
    for broken in ("Roma", '{"town": "Roma"}', "[1]", "[" * 100_000):
        assert grade(check("ne", "{{sample.output_json.city}}", "x"), broken, item) == 0


@pytest.mark.parametrize(
    "metric",
    [
        "fuzzy_match",
        "bleu",
        "gleu",
        "rouge_1",
        "rouge_2",
        "rouge_3",
        "rouge_4",
        "rouge_5",
        "rouge_l",
    ],
)
def test_similarities(metric: str) -> None:
    reference = "la luna salió sobre el mar y la casa dormía"
    same, near, far = (
        grade(similar(metric), text, {"answer": reference})
        for text in (reference, reference.replace("casa", "niña"), "qué tal")
    )
    assert same == pytest.approx(1.0)
    assert 0.0 <= far < near < 1.0
    assert grade(similar(metric), "", {"answer": reference}) == 0.0
    assert grade(similar("fuzzy_match"), "abcd", {"answer": "abxd"}) == pytest.approx(
        0.75
    )  # 2 * 3 alike of 8
    assert grade(similar("rouge_1"), "a b c", {"answer": "a b d e"}) == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    )


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("a + 2 * b", 1.5),
        ("2 * a ^ 3 - b", -0.25),
        ("-a^2", -0.25),
        ("min(a, b, 3) / max(a, b)", 1.0),
        ("sqrt(a + b) + exp(0)", 2.0),
        ("floor(a) + ceil(b) + abs(-1) + log(1)", 2.0),
        ("a ** 2", 0.25),
    ],
)
def test_formulas(formula: str, expected: float) -> None:
    assert make_formula(formula, {"a": 0, "b": 0}, "f")({"a": 0.5, "b": 0.5}) == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    "formula",
    [
        "",
        "a +",
        "c",
        "a.real",
        "__import__('os')",
        "a if b else 1",
        "[a]",
        "a(b)",
        "min(a)",
        "sqrt(a, b)",
        "a < b",
        "'x'",
        "1j",
        "min(*a)",
        "min(a, key=b)",
        "(lambda: 1)()",
        "a // b",
        "a % b",
        "a @ b",
        "True",
        "(" * 300 + ")" * 300,
        "-" * 499 + "a" * 50,
        "a; b",
        "a\nb",
        "1e999999j",
    ],
)
def test_a_formula_can_only_calculate(formula: str) -> None:
    with pytest.raises(SettingsError):
        make_formula(formula, {"a": 0, "b": 0}, "f")


def test_formulas_take_no_time_and_say_where_they_have_no_value() -> None:
    start = time.process_time()
    for formula in ("9^9^9^9", "1/0", "sqrt(-1)", "(-8)^0.5", "log(0)", "exp(9999)"):
        told = {
            "type": "multi",
            "name": "m",
            "graders": {"s": check()},
            "calculate_output": formula,
        }
        with pytest.raises(TrainingError):
            grade(told, "x")
    assert time.process_time() - start < 1.0


def test_several() -> None:
    told = {
        "type": "multi",
        "name": "m",
        "graders": {"same": check(), "close": similar("fuzzy_match")},
        "calculate_output": "0.5 * same + close",
    }
    assert parse_grader(told, False).grade("Sol y luna", {"answer": "Sol y luna"}) == (
        1.5,
        {"same": 1.0, "close": 1.0},
    )
    one = {
        "type": "multi",
        "name": "m",
        "graders": check(),
        "calculate_output": "2 * same",
    }  # as OpenAI's client types it
    assert grade(one, "Sol y luna") == 2.0


SOURCE = "def grade(sample, item):\n    return len(sample['output_text']) / item['most']\n"


def code(source: str = SOURCE) -> dict[str, Any]:
    return {"type": "python", "name": "code", "source": source}


def test_code_is_run_where_it_is_allowed(tmp_path: Path) -> None:
    assert grade(code(), "four", {"most": 8}, True) == 0.5
    within = {"type": "multi", "name": "m", "graders": {"c": code()}, "calculate_output": "c"}
    for told in (code(), within):
        assert parse_grader(told, True).is_code
        with pytest.raises(SettingsError, match="not run here"):
            parse_grader(told, False)
    assert not parse_grader(check(), False).is_code
    mark = tmp_path / "mark"
    touching = f"open({str(mark)!r}, 'w').close()\n{SOURCE}"
    grader = parse_grader(code(touching), True)
    assert not mark.exists()  # who looks at it runs nothing
    grader.grade("a", {"most": 1})
    assert mark.exists()
    for source in ("def other(): pass", "def grade(:", 3):
        with pytest.raises(SettingsError):
            parse_grader(code(source), True)  # type: ignore[arg-type]
    for source in (
        "def grade(sample, item): raise SystemError",
        "def grade(sample, item): return 'x'",
        "def grade(s, i): return float('nan')",
    ):
        with pytest.raises(TrainingError):
            grade(code(source), "x", {}, True)


@pytest.mark.parametrize(
    ("told", "word"),
    [
        ({"type": "score_model", "name": "x", "model": "gpt", "input": []}, "score_model"),
        ({"type": "label_model", "name": "x"}, "label_model"),
        (similar("cosine"), "embeddings"),
        (similar("meteor"), "synonyms"),
        (similar("bleo"), "bleu"),
        (check("equals"), "operation"),
        ({"type": "strings", "name": "x"}, "string_check"),
        (check() | {"name": ""}, "name"),
        (check() | {"weight": 1}, "weight"),
        ({k: v for k, v in check().items() if k != "reference"}, "reference is missing"),
        (check(input="{{ item }}"), "variable"),
        (check(input="{{ sample.choices[0] }}"), "variable"),
        (check(input="{{ item.a | upper }}"), "variable"),
        (check(input=3), "text"),  # type: ignore[arg-type]
        ({"type": "multi", "name": "m", "graders": {}, "calculate_output": "1"}, "graders"),
        (
            {"type": "multi", "name": "m", "graders": {"min": check()}, "calculate_output": "1"},
            "min",
        ),
        (
            {
                "type": "multi",
                "name": "m",
                "graders": {
                    "m": {
                        "type": "multi",
                        "name": "n",
                        "graders": {"s": check()},
                        "calculate_output": "s",
                    }
                },
                "calculate_output": "m",
            },
            "multi",
        ),
        ([], "object"),
    ],
)
def test_what_is_no_grader_is_refused(told: Any, word: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_grader(told, True)
    assert word in str(caught.value)


def test_rows_keep_what_graders_ask_for(tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        {"messages": [{"role": "user", "content": "say sol"}], "answer": {"text": "sol"}},
        {"prompt": "say mar", "completion": "mar"},
    )
    first, second = read_table(rows, PROMPT, {}).rows
    grader = parse_grader(check(reference="{{ item.answer.text }}"), False)
    grader.check(first.item, first.where)
    with pytest.raises(DataError, match="answer.text"):
        grader.check(second.item, second.where)
    again = write_rows(
        tmp_path / "again.jsonl", *(row.record(with_item=True) for row in (first, second))
    )
    for row, other in zip((first, second), read_table(again, PROMPT, {}).rows, strict=True):
        assert (row.prompt, row.reference, row.item) == (other.prompt, other.reference, other.item)


@pytest.mark.slow
def test_a_grader_judges_a_run(tiny: Path, general: Path, tmp_path: Path) -> None:
    from afina import evaluate, train
    from afina.settings import EvalSettings
    from helpers import metrics

    told = {
        "type": "multi",
        "name": "m",
        "graders": {"vowels": similar("fuzzy_match"), "has": check("like", reference="a")},
        "calculate_output": "vowels + 0.1 * has",
    }
    (tmp_path / "grader.json").write_text(json.dumps(told))
    rows = write_rows(
        tmp_path / "asked.jsonl",
        *({"prompt": f"say {n} sol", "answer": "aeiou"} for n in range(10)),
    )
    values: dict[str, Any] = {
        "base": str(tiny),
        "retention_text": general,
        "chat_template": "plain",
        "objective": "grpo",
        "max_steps": 2,
        "eval_steps": 1,
        "eval_size": 0.2,
        "grpo": {
            "reward_funcs": str(tmp_path / "grader.json"),
            "max_new_tokens": 4,
            "num_generations": 2,
            "prompts_per_step": 2,
        },
    }
    run = train(rows, output_dir=tmp_path / "run", **values)
    line = metrics(run.folder)[-1]
    assert line["reward"] == pytest.approx(
        line["reward_grader.json:vowels"] + 0.1 * line["reward_grader.json:has"]
    )
    assert math.isfinite(line["eval_reward"])
    found = evaluate(EvalSettings(adapter=run.folder))  # from its own held-out rows
    assert found["after"]["reward"] == pytest.approx(run.record["policy"]["after"]["reward"])
    bad = write_rows(tmp_path / "bad.jsonl", *({"prompt": f"say {n}"} for n in range(10)))
    with pytest.raises(AfinaError, match="reads a field that the row does not have"):
        train(bad, output_dir=tmp_path / "other", **values)


@pytest.mark.parametrize("package", ["nltk", "rapidfuzz", "rouge_score"])
def test_a_metric_without_its_package_names_the_extra_before_a_run(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = {"nltk": "gleu", "rapidfuzz": "fuzzy_match", "rouge_score": "rouge_3"}[package]
    definition = {
        "type": "text_similarity",
        "name": "similar",
        "input": "{{sample.output_text}}",
        "reference": "{{item.reference}}",
        "evaluation_metric": metric,
    }
    loaded = [name for name in sys.modules if name.partition(".")[0] == package]
    for name in {package, *loaded}:
        monkeypatch.setitem(sys.modules, name, None)
    metrics._rouge_scorer.cache_clear()
    with pytest.raises(SettingsError, match="is not installed") as caught:
        parse_grader(definition, False)
    assert caught.value.hint == "pip install 'afina[graders]'"
