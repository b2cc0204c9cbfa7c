"""Verdicts: the task's score decides, a cause is named, forgetting has plain steps."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from afina.evaluation.answer_scores import score_answers
from afina.evaluation.cause import RunFigures, find_cause
from afina.evaluation.intervals import LossChange
from afina.evaluation.verdict import (
    FORGETTING_LEVELS,
    LossReport,
    Verdict,
    forgetting_sentence,
    is_learned,
    score_sentence,
    verdict,
)
from afina.objectives.base import Units
from afina.objectives.task_score import MIN_DECISIVE_ROWS, TaskScore

FALLING = [3.0 - 2.9 * step / 200 for step in range(200)]
SETTLED = [0.1 + 2.9 * math.exp(-step / 10) for step in range(200)]
HIGH = [2.0 + math.exp(-step / 10) for step in range(200)]


def loss_report(rows: int = 200, error: float | None = 0.005, **changes: Any) -> LossReport:
    values: dict[str, Any] = {
        "eval_loss_before": 3.0,
        "eval_loss_after": 1.0,
        "train_loss_before": 3.0,
        "train_loss_after": 1.0,
        "retention_loss_before": 2.0,
        "retention_loss_after": 2.0,
        "eval_rows": rows,
        **changes,
    }
    for side in ("eval", "train"):
        mean = values[f"{side}_loss_after"] - values[f"{side}_loss_before"]
        values[f"{side}_change"] = LossChange(rows, mean, error)
    return LossReport(**values)


def figures(curve: Sequence[float] = SETTLED, **changes: Any) -> RunFigures:
    values: dict[str, Any] = {
        "steps": len(curve),
        "min_steps": 100,
        "steps_per_epoch": 20,
        "best_step": len(curve),
        "overfits": False,
        "learning_rate": 2e-4,
        "rank": 8,
    }
    return RunFigures(curve, **values | changes)


def exact(after: float, rows: int = 40, before: float = 0.0) -> TaskScore:
    right = [100.0 * (n < round(after * rows / 100)) for n in range(rows)]
    earlier = [100.0 * (n < round(before * rows / 100)) for n in range(rows)]
    return TaskScore.of_rows("exact match", earlier, right)


def said(score: TaskScore | None = None, **changes: Any) -> Verdict:
    return verdict(loss_report(**changes), Units(), score, None, figures())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "nats per token (95% CI 1.990 to 2.010, 200 eval rows); perplexity 20.09 to 2.72."),
        ({"eval_loss_after": 2.99}, "Eval loss hardly changed"),
        ({"eval_loss_after": 3.1}, "Eval loss got worse"),
        ({}, "No overfitting"),
        ({"train_loss_after": 0.99}, "No overfitting"),
        ({"train_loss_after": 0.5}, "It overfits: train loss fell by 2.500, eval loss by 2.000"),
        # those rows were easier from the start
        ({"train_loss_after": 0.5, "train_loss_before": 2.5}, "No overfitting"),
        ({"train_loss_after": 0.5, "error": 0.3}, "Too few to tell whether it overfits"),
        ({"error": 0.3}, "No sign of overfitting, but too few eval rows to be sure"),
        (
            {"eval_loss_after": 2.8, "rows": 6, "error": 0.1},
            "Too few to tell whether eval loss changed: -0.200 nats per token (95% CI -0.457 to",
        ),
        ({"eval_loss_after": 3.2, "rows": 6, "error": 0.1}, "Too few to tell whether eval loss"),
        ({"eval_loss_after": 2.5, "rows": 6, "error": 0.1}, "Eval loss improved"),
        ({"rows": 1, "error": None}, "Too few eval rows to tell (1 eval row): eval loss 3.000 to"),
        ({"rows": 5, "eval_loss_after": 9.0}, "Too few eval rows to tell (5 eval rows)"),
        (
            {"train_loss_after": 0.5, "best_step": 4, "last_step": 9},
            "The best state, of step 4, was kept.",
        ),
        ({"eval_loss_before": 2000.0}, "Eval loss improved"),
    ],
)
def test_verdicts_on_losses(changes: dict[str, Any], expected: str) -> None:
    assert expected in " ".join(said(**changes).sentences)


@pytest.mark.parametrize("rows", range(1, MIN_DECISIVE_ROWS))
def test_few_eval_rows_decide_nothing(rows: int) -> None:
    """Neither eval loss nor their answers are judged; what the training rows show is."""
    found = said(exact(0, rows), rows=rows, eval_loss_after=5.0, train_loss_after=0.1)
    assert found.cause is None
    assert [sentence.partition(":")[0] for sentence in found.sentences] == [
        f"Too few eval rows to tell ({rows} eval row{'s'[: rows > 1]})",
        "On training rows",
    ]
    assert said(rows=rows, train_loss_after=2.9).cause is not None


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (exact(90), "Learned: exact match 0.0% to 90.0% (95% CI of the change +80.3 to +99.7"),
        (exact(100), "(95% CI of the change +91.2 to +100.0 points, 40 eval rows)"),
        (exact(20), "Partly learned: exact match 0.0% to 20.0%"),
        (exact(0), "Not yet right: exact match 0.0% to 0.0%"),
        (exact(0), "no answer is right, although eval loss improved."),
        (exact(20, before=60), "Worse than before: exact match 60.0% to 20.0%"),
        (exact(50, before=50), "No clear change: exact match 50.0% to 50.0%"),
        (exact(100, rows=3), "Too few eval rows to tell: exact match 0.0% to 100.0% (3 eval rows)"),
        (
            TaskScore.of_counts("accuracy", 38, 40, None, 30.0),
            "Learned: accuracy 95.0%, a guess 30.0% (95% CI of the change +53.5 to +68.6",
        ),
        (TaskScore.of_counts("accuracy", 13, 40, None, 30.0), "No clear change: accuracy 32.5%"),
        (TaskScore("Spearman correlation", 0.7, 40, unit=""), "Score: Spearman correlation 0.700"),
        (
            TaskScore.of_rows("mean reward", [0.1] * 9, [0.5] * 8 + [0.4], unit=""),
            "mean reward 0.100 to 0.489 (95% CI of the change +0.363 to +0.415, 9 eval rows)",
        ),
    ],
)
def test_the_score_decides(score: TaskScore, expected: str) -> None:
    assert expected in score_sentence(score, loss_report())
    assert TaskScore.from_dict(score.to_dict()) == score


def test_a_better_loss_is_not_yet_learned() -> None:
    """Whatever the loss, a run without a right answer is not called learned, and has a cause."""
    found = said(exact(0))
    assert not any(sentence.startswith("Learned") for sentence in found.sentences)
    assert found.cause is not None and found.cause.sentence in found.sentences
    assert said(exact(90)).cause is None and said().cause is None
    assert is_learned(loss_report(), None) and not is_learned(loss_report(), exact(20))


@pytest.mark.parametrize(
    ("run", "name", "settings"),
    [
        (figures([4.9, 4.5, 4.2]), "steps", {"max_steps": 100}),
        (figures(SETTLED[:150], steps_per_epoch=500), "steps", {"max_steps": 500}),
        (figures(FALLING), "steps", {"max_steps": 600}),
        (figures([2.0] * 200), "learning rate", {"learning_rate": 6e-4}),
        (figures(SETTLED[::-1]), "learning rate too high", {"learning_rate": 6.7e-5}),
        (figures(HIGH), "rank", {"rank": 32}),
        (figures(HIGH, rank=None), "learning rate", {"learning_rate": 6e-4}),
        (figures(SETTLED, overfits=True), "rows", {"dropout": 0.1}),
        (figures(SETTLED[:60], overfits=True), "rows", {"dropout": 0.1}),
        (figures([-x for x in range(200)], what="reward"), "steps", {"max_steps": 600}),
        (figures([-0.5] * 200, what="reward"), "learning rate", {"learning_rate": 6e-4}),
    ],
)
def test_causes(run: RunFigures, name: str, settings: dict[str, Any]) -> None:
    found = find_cause(run)
    assert (found.name, found.settings) == (name, settings)
    assert found.sentence.startswith(f"Cause: {name}. ") and found.sentence.endswith(".")


@pytest.mark.parametrize(
    ("rise", "word"),
    [
        (-0.4, "No forgetting"),
        (0.04, "No forgetting"),
        (0.1, "Slight forgetting"),
        (0.46, "Marked forgetting"),
        (0.8, "Strong forgetting"),
        (1.7, "Severe forgetting"),
        (1e6, "Severe forgetting"),
    ],
)
def test_forgetting_has_plain_steps(rise: float, word: str) -> None:
    sentence = forgetting_sentence(2.0, 2.0 + math.log1p(rise))
    assert sentence.startswith(f"{word}: retention loss 2.000 to ")
    assert ("Fewer steps" in sentence) == (word != "No forgetting")
    assert [limit for limit, _ in FORGETTING_LEVELS] == sorted(
        limit for limit, _ in FORGETTING_LEVELS
    )


def test_short_answers_are_right_or_wrong_and_long_ones_alike() -> None:
    short = score_answers({"before": ["no", "a b"], "after": [" yes", "c"]}, ["yes", "d"])
    assert (short.name, short.before, short.after, short.counts_right) == (
        "exact match",
        0,
        50,
        True,
    )
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    long = score_answers({"before": ["zzz"] * 2, "after": [text, text[:30]]}, [text] * 2)
    assert long.name == "chrF" and long.before == 0 and 50 < long.after < 100
    assert not long.counts_right
