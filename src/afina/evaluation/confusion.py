"""Accuracy, F1 and confusion matrix of a classifier, in percent."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.io.atomic import translate_os_errors


def confusion(predicted: Sequence[int], expected: Sequence[int], classes: int) -> list[list[int]]:
    """Return counts `(classes, classes)`: rows are true classes, columns predicted ones."""
    table = [[0] * classes for _ in range(classes)]
    for was, right in zip(predicted, expected, strict=True):
        table[right][was] += 1
    return table


def classification_scores(
    predicted: Sequence[int], expected: Sequence[int], classes: int
) -> dict[str, Any]:
    """Return accuracy and macro F1 over the classes that occur, in percent, and the matrix."""
    table = confusion(predicted, expected, classes)
    f1 = []
    for c in range(classes):
        right, taken, there = table[c][c], sum(row[c] for row in table), sum(table[c])
        if taken + there:
            f1.append(2 * right / (taken + there))
    right = sum(table[c][c] for c in range(classes))
    return {
        "accuracy": 100.0 * right / len(expected),
        "f1": 100.0 * sum(f1) / len(f1),
        "confusion": table,
    }


def draw_confusion(table: Sequence[Sequence[int]], labels: Sequence[str], file: Path) -> None:
    """Draw the confusion matrix as PNG; rows are true classes, colors ratios of each row."""
    from matplotlib.figure import Figure

    shares = [[n / max(1, sum(row)) for n in row] for row in table]
    side = max(4.0, 0.55 * len(labels) + 2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    for i, row in enumerate(table):
        for j, n in enumerate(row):
            if n:
                axes.text(
                    j,
                    i,
                    str(n),
                    ha="center",
                    va="center",
                    color="white" if shares[i][j] > 0.5 else "black",
                    fontsize=8,
                )
    figure.colorbar(image, ax=axes, label="ratio of the true class")
    with translate_os_errors(file):
        figure.savefig(file, dpi=120)
