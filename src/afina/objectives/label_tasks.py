"""What labels are for a classifier: a class, several classes, a number, or a relevance.

classes        cross-entropy, weighted by class    accuracy, macro F1, confusion matrix
multi-label    mean binary cross-entropy           micro and macro F1, rows that are exact
regression     squared error                       Pearson, Spearman, mean absolute error, RMSE
relevance      binary cross-entropy                accuracy and average precision, or Spearman
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.data.schemas import CLASSES, MULTI_LABEL, REGRESSION, LabeledRow, class_names, task_of
from afina.errors import DataError
from afina.evaluation.confusion import classification_scores
from afina.models.classifier import RELEVANCE_TASK
from afina.objectives.task_score import TaskScore

VALUE = "value"  # name of the only output of a regression
THRESHOLD = 0.5  # probability from which a class of a multi-label row is predicted


@dataclass(frozen=True)
class LabelTask:
    """The task of the labels, and the names of the model's outputs.

    Attributes:
        kind: "classes", "multi-label", "regression" or "relevance".
        labels: Names of the outputs: the classes, or "value".
        weights: Weight of each class in the loss; empty for equal weights.
        smoothing: Ratio of the target's probability that is spread over all classes.
    """

    kind: str
    labels: tuple[str, ...]
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0

    @classmethod
    def of(cls, rows: Sequence[LabeledRow]) -> "LabelTask":
        """Return the task of the labels of rows; raises `DataError` with fewer than two classes."""
        kind = task_of(rows)
        if kind == REGRESSION:
            return cls(kind, (VALUE,))
        names = class_names(rows)
        if len(names) < (2 if kind == CLASSES else 1):
            why = f"all rows are {names[0]!r}" if names else "no row has a label"
            raise DataError("fewer than two classes", where=rows[0].where, why=why)
        return cls(kind, names)

    def target(self, row: LabeledRow) -> Any:
        """Return the target of a row: an index, zeros and ones, or a number; raises `DataError`."""
        if self.kind in (REGRESSION, RELEVANCE_TASK):
            return [_number(row)]
        named = row.label if isinstance(row.label, tuple) else (str(row.label),)
        unknown = [name for name in named if name not in self.labels]
        if unknown or (self.kind == CLASSES) == isinstance(row.label, tuple):
            what = f"class {unknown[0]!r} does not occur in the training rows"
            if not unknown:
                what = f"a label of another task than {self.kind}: {row.label!r}"
            raise DataError(what, where=row.where, why=f"known: {', '.join(self.labels)}")
        if self.kind == CLASSES:
            return self.labels.index(named[0])
        return [float(label in named) for label in self.labels]

    def format_target(self, target: Any) -> str:
        """Return the label that a target of `target` stands for."""
        if self.kind in (REGRESSION, RELEVANCE_TASK):
            return f"{target[0]:g}"
        if self.kind == CLASSES:
            return self.labels[target]
        named = [label for label, value in zip(self.labels, target, strict=True) if value]
        return ", ".join(named) or "none"

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row `(num_rows,)` in nats; 0 where a row has no target."""
        if self.kind == CLASSES:
            weights = torch.tensor(self.weights, device=logits.device, dtype=logits.dtype)
            return F.cross_entropy(
                logits,
                targets,
                weights if self.weights else None,
                label_smoothing=self.smoothing,
                reduction="none",
            )
        known, targets = targets.isfinite(), targets.nan_to_num().to(logits.dtype)
        if self.kind in (MULTI_LABEL, RELEVANCE_TASK):
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        else:
            each = (logits - targets) ** 2
        return (each * known).mean(-1)

    def scores(self, logits: Tensor, targets: Sequence[Any]) -> dict[str, Any]:
        """Return the metrics of some rows from their logits `(num_rows, num_outputs)`."""
        if self.kind == CLASSES:
            predicted = logits.argmax(-1).tolist()
            return classification_scores(predicted, list(targets), len(self.labels))
        if self.kind == MULTI_LABEL:
            return _multi_label_scores(logits.sigmoid() >= THRESHOLD, torch.tensor(targets) > 0)
        if self.kind == RELEVANCE_TASK:
            return _relevance_scores(logits[:, 0].double(), torch.tensor(targets)[:, 0].double())
        return regression_scores(logits[:, 0].double(), torch.tensor(targets)[:, 0].double())

    def score(self, scores: Mapping[str, Any]) -> dict[str, TaskScore]:
        """Return the task's own score by the key `score`; nothing where labels do not vary."""
        rows = scores["rows"]
        if self.kind == CLASSES:
            table = scores["confusion"]
            right = sum(table[c][c] for c in range(len(table)))
            chance = 100 * max(map(sum, table)) / rows
            return {"score": TaskScore.of_counts("accuracy", right, rows, None, chance)}
        name, label, unit = ("f1", "micro F1", "%")
        if self.kind == REGRESSION:
            name, label, unit = ("spearman", "Spearman correlation", "")
        if scores[name] is None:
            return {}
        score = TaskScore(label, scores[name], rows, unit=unit, counts_right=False)
        return {"score": score}

    def answer(self, logits: Tensor) -> tuple[str, float | None]:
        """Return what one row is by its logits, and its probability where there is one."""
        if self.kind == REGRESSION:
            return f"{float(logits[0]):.4f}", None
        if self.kind == RELEVANCE_TASK:
            return self.labels[0], float(logits[0].sigmoid())
        if self.kind == CLASSES:
            shares = logits.softmax(-1)
            best = int(shares.argmax())
            return self.labels[best], float(shares[best])
        shares = logits.sigmoid()
        chosen = [n for n, share in enumerate(shares.tolist()) if share >= THRESHOLD]
        own = shares[chosen].min() if chosen else 1 - shares.max()
        return ", ".join(self.labels[n] for n in chosen) or "none", float(own)


def _number(row: LabeledRow) -> float:
    try:
        number = float(row.label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        what = f"expected a number to predict, found {row.label!r}"
        raise DataError(what, where=f"{row.where}:label")
    return number


def _multi_label_scores(predicted: Tensor, expected: Tensor) -> dict[str, Any]:
    """Return micro and macro F1 and the ratio of exact rows, in percent."""
    right = (predicted & expected).sum(0).double()
    total = (predicted.sum(0) + expected.sum(0)).double()
    known = total > 0
    f1 = 2 * right[known] / total[known]
    return {
        "f1": 100.0 * float(2 * right.sum() / total.sum().clamp(min=1)),
        "macro_f1": 100.0 * float(f1.mean()) if len(f1) else 0.0,
        "exact": 100.0 * float((predicted == expected).all(-1).double().mean()),
    }


def regression_scores(predicted: Tensor, expected: Tensor) -> dict[str, Any]:
    """Return correlations, None where all values are equal, and errors in the label's unit."""
    from scipy import stats  # type: ignore[import-untyped]

    error = predicted - expected
    varies = len(predicted) > 1 and float(predicted.std()) > 0 and float(expected.std()) > 0
    pairs = predicted.numpy(), expected.numpy()
    return {
        "pearson": float(stats.pearsonr(*pairs)[0]) if varies else None,
        "spearman": float(stats.spearmanr(*pairs)[0]) if varies else None,
        "mae": float(error.abs().mean()),
        "rmse": float((error**2).mean().sqrt()),
    }


def _relevance_scores(logits: Tensor, expected: Tensor) -> dict[str, Any]:
    """Return accuracy and average precision, in percent; of labels between 0 and 1, Spearman.

    Average precision: the mean, over the relevant rows, of the share of relevant rows among those
    that score at least as high.
    """
    if not bool(((expected == 0) | (expected == 1)).all()):
        return {"spearman": regression_scores(logits.sigmoid(), expected)["spearman"]}
    relevant = expected == 1
    right = float(((logits.sigmoid() >= THRESHOLD) == relevant).double().mean())
    scores = {"accuracy": 100.0 * right}
    if bool(relevant.any()):
        ranked = logits.sort().values, logits[relevant].sort().values
        above = [len(values) - torch.searchsorted(values, ranked[1]) for values in ranked]
        scores["average_precision"] = 100.0 * float((above[1] / above[0]).double().mean())
    return scores


def balanced_weights(targets: Sequence[int], num_classes: int) -> tuple[float, ...]:
    """Return weights by which each class counts alike: rows / (classes x rows of the class)."""
    counts = [max(1, sum(target == n for target in targets)) for n in range(num_classes)]
    return tuple(len(targets) / (num_classes * count) for count in counts)
