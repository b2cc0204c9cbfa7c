"""Labels: their type is the task, each task has its loss and its scores, and rare classes are named."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from afina.data.schemas import CLASSES, LABELED, MULTI_LABEL, REGRESSION, LabeledRow, task_of
from afina.data.table import detect_schema, read_table
from afina.errors import DataError
from afina.objectives.label_tasks import LabelTask, balanced_weights
from afina.objectives.labeled_data import (
    known_rows,
    rows_of_frequent_classes,
    split_labels,
    split_rows,
)
from helpers import write_rows


def read(path: Path, *labels: Any, **more: Any) -> list[LabeledRow]:
    rows = [{"text": f"film number {n}", "label": label, **more} for n, label in enumerate(labels)]
    return read_table(write_rows(path / "a.jsonl", *rows), LABELED).rows


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["good", "bad"], CLASSES),
        ([1, 0], CLASSES),
        ([True, False], CLASSES),
        (["1", "0"], CLASSES),
        (["1.0", "0.0"], CLASSES),
        ([["a", "b"], ["b"], []], MULTI_LABEL),
        (["['a', 'b']", '["b"]'], MULTI_LABEL),
        ([0.5, 1, 3.25], REGRESSION),
        (["0.5", "2"], REGRESSION),
    ],
)
def test_the_type_of_the_labels_is_the_task(labels: list[Any], task: str, tmp_path: Path) -> None:
    rows = read(tmp_path, *labels)
    assert task_of(rows) == task
    assert [
        row.label
        for row in read_table(
            write_rows(tmp_path / "b.jsonl", *[row.record() for row in rows]), LABELED
        ).rows
    ] == [row.label for row in rows]  # what a run keeps is read again


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ([{"a": 0.5, "b": 0.5}], "soft labels"),
        ([[0.5, 0.25]], "several numbers to predict"),
        ([[["a"]]], "a list of a list"),
        ([math.nan], "no number to predict"),
    ],
)
def test_labels_of_other_tasks_are_refused_by_name(
    labels: list[Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        read(tmp_path, *labels)
    assert caught.value.where == f"{tmp_path}/a.jsonl:1:label"


def test_mixed_labels_and_labels_of_words_are_refused(tmp_path: Path) -> None:
    for labels in (["a", ["b"]], [0.5, "good"]):
        with pytest.raises(DataError, match="a label of another type"):
            task_of(read(tmp_path, *labels))
    row = {"text": ["John", "sleeps"], "label": ["PER", "O"]}
    with pytest.raises(DataError, match="token classification"):
        read_table(write_rows(tmp_path / "b.jsonl", row), LABELED)


@pytest.mark.parametrize(
    "names", [("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2")]
)
def test_pairs_of_texts_are_read_as_pairs(names: tuple[str, str], tmp_path: Path) -> None:
    row = dict(zip(names, ("A man sleeps.", "A man is awake."), strict=True)) | {"label": "no"}
    file = write_rows(tmp_path / "a.jsonl", row)
    table = read_table(file, LABELED)
    assert (table.rows[0].content, table.rows[0].pair) == ("A man sleeps.", "A man is awake.")
    assert detect_schema(file, {}) == (LABELED, "text")
    assert table.unused_columns == {}


def test_losses_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3)
    classes = torch.tensor([0, 2, 1, 2])
    weights = balanced_weights(classes.tolist(), 3)
    assert weights == (4 / 3, 4 / 3, 2 / 3)
    task = LabelTask(CLASSES, ("a", "b", "c"), weights, 0.1)
    target = torch.nn.functional.one_hot(classes, 3) * 0.9 + 0.1 / 3
    expected = -(target * logits.log_softmax(-1) * torch.tensor(weights)).sum(-1)
    assert torch.allclose(task.losses(logits, classes), expected)
    several = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [float("nan")] * 3])
    share = logits.sigmoid()
    each = -(several * share.log() + (1 - several) * (1 - share).log())
    found = LabelTask(MULTI_LABEL, ("a", "b", "c")).losses(logits, several)
    assert torch.allclose(found, each.mean(-1).nan_to_num())
    numbers = torch.tensor([[0.5], [2.0], [-100.0], [float("nan")]])
    found = LabelTask(REGRESSION, ("value",)).losses(logits[:, :1], numbers)
    assert torch.allclose(found, ((logits[:, :1] - numbers) ** 2)[:, 0].nan_to_num())


def test_scores_of_several_labels_and_of_numbers() -> None:
    task = LabelTask(MULTI_LABEL, ("a", "b"))
    logits = torch.tensor([[1.0, -1], [1, 1], [-1, -1], [-1, 1]])
    scores = task.scores(logits, [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert scores["f1"] == pytest.approx(100 * 2 * 3 / (4 + 4))
    assert scores["macro_f1"] == pytest.approx(100 * (4 / 5 + 2 / 3) / 2)
    assert scores["exact"] == 50.0
    assert [task.answer(row)[0] for row in logits] == ["a", "a, b", "none", "b"]
    values, targets = [1.0, 2.5, 2.0, 4.0], [1.5, 2.0, 2.5, 3.0]
    scores = LabelTask(REGRESSION, ("value",)).scores(
        torch.tensor(values)[:, None], [[target] for target in targets]
    )
    assert scores["pearson"] == pytest.approx(stats.pearsonr(values, targets)[0])
    assert scores["spearman"] == pytest.approx(stats.spearmanr(values, targets)[0])
    assert (scores["mae"], scores["rmse"]) == pytest.approx((0.625, 0.4375**0.5))


def test_rare_classes_are_trained_and_not_evaluated(tmp_path: Path) -> None:
    rows = read(tmp_path, *["late", "broken"] * 9, "card", "lost")
    task = LabelTask.of(rows)
    train, held = split_rows(rows, task, 0.1, 0)
    assert task.labels == ("broken", "card", "late", "lost")
    assert {row.label for row in held} == {"late", "broken"}
    assert {row.label for row in train} == set(task.labels)
    skipped: list[str] = []
    kept, rare = rows_of_frequent_classes(rows, 2, skipped)
    assert len(kept) == 18 and rare == {"card": 1, "lost": 1}
    assert [line.partition("class ")[2] for line in skipped] == [
        "'card' has 1 row, fewer than 2",
        "'lost' has 1 row, fewer than 2",
    ]
    other = LabelTask.of(rows[:18])
    assert known_rows(rows, other, skipped) == rows[:18]
    assert "class 'card' does not occur in the training rows" in skipped[2]
    with pytest.raises(DataError, match="no row is left for evaluation"):
        split_rows([*rows[:1], *rows[18:]], task, 0.1, 0)


def test_a_separator_makes_several_classes_of_one_text(tmp_path: Path) -> None:
    rows = read(tmp_path, *["action | comedy", "action", "comedy"] * 4)
    assert task_of(rows) == "classes"
    found = split_labels(rows, "|")
    assert task_of(found) == "multi-label" and split_labels(rows, None) is rows
    assert [row.label for row in found[:3]] == [("action", "comedy"), ("action",), ("comedy",)]
    with pytest.raises(DataError, match="no label has the separator ';'"):
        split_labels(rows, ";")
