"""Losses of a run before and after, row by row, for its verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.evaluation.intervals import LossChange, paired_change
from afina.evaluation.verdict import LossReport
from afina.objectives.base import Objective, train_sample

MAX_ROWS = 256  # rows of an interval: beyond these it is narrow enough for a verdict


def row_loss_change(
    objective: Objective,
    rows: Sequence[Any],
    active: ActiveAdapters,
    before: ActiveAdapters = BASE_ONLY,
) -> LossChange:
    """Return the change of the loss from `before` to `active` on `rows`, or on MAX_ROWS of them."""
    some = rows[:: -(-len(rows) // MAX_ROWS)]
    old, new = (objective.row_losses(some, one) for one in (before, active))
    return paired_change(
        [one.total for one in old], [one.total for one in new], [one.num_targets for one in new]
    )


def measure_losses(
    objective: Objective,
    before: Mapping[str, float],
    after: Mapping[str, float],
    baseline: ActiveAdapters,
    active: ActiveAdapters,
) -> LossReport:
    """Return the losses of eval and training rows, before and after, with their changes.

    Args:
        objective: The objective with its rows.
        before: `eval_loss` and, of a language model, `retention_loss` before training.
        after: The same with the best adapter.
        baseline: What was active before training.
        active: What is active now.
    """
    return LossReport(
        eval_loss_before=before["eval_loss"],
        eval_loss_after=after["eval_loss"],
        train_loss_before=objective.train_loss(baseline),
        train_loss_after=objective.train_loss(active),
        eval_change=row_loss_change(objective, objective.eval_rows, active, baseline),
        train_change=row_loss_change(objective, train_sample(objective), active, baseline),
        eval_rows=len(objective.eval_rows),
        retention_loss_before=before.get("retention_loss"),
        retention_loss_after=after.get("retention_loss"),
    )
