"""Verdict on a run, in sentences: did eval loss improve, does it overfit, was anything forgotten.

The thresholds are rules of thumb, defined here once: a change under 0.02 nats per token counts as
none; an eval loss that improved less than the train loss by 15% of itself is overfitting; a rise of
the perplexity of general text by 5% is forgetting. Where the rows are too few for a sentence (its
95% confidence interval includes the opposite), the verdict says nothing else.
"""

import math
from dataclasses import dataclass

from afina.errors import pluralize
from afina.evaluation.intervals import LossChange

MIN_LOSS_CHANGE = 0.02  # nats per token
OVERFIT_RATIO = 0.15
FORGETTING, STRONG_FORGETTING = 0.05, 0.5  # ratio by which the perplexity of general text rises


@dataclass(frozen=True)
class LossReport:
    """Mean losses in nats per token (or row) before and after training, on eval and training rows.

    `eval_change` and `train_change` are changes row by row, which have intervals; they may be of
    some of the `eval_rows` only. Classifiers and encoders have no retention loss.
    """

    eval_loss_before: float
    eval_loss_after: float
    train_loss_before: float
    train_loss_after: float
    eval_change: LossChange
    train_change: LossChange
    eval_rows: int
    retention_loss_before: float | None = None
    retention_loss_after: float | None = None
    best_step: int = 0
    last_step: int = 0

    @property
    def forgetting(self) -> float | None:
        """Rise of the loss on general text, in nats per token; negative where it fell."""
        if self.retention_loss_before is None or self.retention_loss_after is None:
            return None
        return self.retention_loss_after - self.retention_loss_before


def verdict(losses: LossReport, unit: str = "token", choices: str = "tokens") -> list[str]:
    """Return two sentences, on eval loss and on overfitting, and one on forgetting if measured.

    Args:
        losses: The losses, in nats per `unit`.
        unit: What the loss is a mean over.
        choices: What perplexity counts; empty where e to the loss is no perplexity.
    """
    sentences = [_eval_sentence(losses, unit, choices), _overfitting_sentence(losses, unit)]
    if losses.forgetting is not None:
        sentences.append(forgetting_sentence(losses.forgetting))
    return sentences


MORE_EVAL_ROWS = "Use more eval rows: a larger --eval-size, or --eval-data FILE."


def _eval_sentence(losses: LossReport, unit: str, choices: str) -> str:
    """Return the sentence on eval loss; a change counts if its interval excludes 0."""
    change, interval = losses.eval_change.mean, losses.eval_change.interval
    if interval is None:
        return f"Too few to tell whether eval loss changed: there is one eval row. {MORE_EVAL_ROWS}"
    low, high = interval
    rows = pluralize(losses.eval_rows, "eval row")
    measured = f"{change:+.3f} nats per {unit} (95% CI {low:+.3f} to {high:+.3f}, {rows})"
    if low <= 0.0 <= high and max(-low, high) > MIN_LOSS_CHANGE:
        return f"Too few to tell whether eval loss changed: {measured}. {MORE_EVAL_ROWS}"
    if abs(change) < MIN_LOSS_CHANGE:
        return (
            f"Eval loss hardly changed: {measured}. Try more steps, a higher learning rate or rank."
        )
    if change > 0:
        return f"Eval loss got worse: {measured}. Try a lower learning rate or more data."
    improved = f"Eval loss improved by {-change:.3f} nats per {unit} "
    improved += f"(95% CI {-high:.3f} to {-low:.3f}, {rows})"
    if not choices:
        return f"{improved}."
    before, after = (
        f"{math.exp(loss):.2f}" if loss < 20 else f"e^{loss:.0f}"
        for loss in (losses.eval_loss_before, losses.eval_loss_after)
    )
    return f"{improved}; perplexity {before} to {after}."


def _overfitting_sentence(losses: LossReport, unit: str) -> str:
    """Return the sentence on overfitting: the gap that training widened, not the gap itself.

    Eval rows may have been harder than training rows from the start.
    """
    gap = losses.eval_change.minus(losses.train_change)
    limit = max(MIN_LOSS_CHANGE, OVERFIT_RATIO * losses.eval_loss_after)
    is_earlier = losses.best_step < losses.last_step
    note = f" The best state, of step {losses.best_step}, was kept." if is_earlier else ""
    trained, new = -losses.train_change.mean, -losses.eval_change.mean
    fell = f"train loss fell by {trained:.3f}, eval loss by {new:.3f} nats per {unit}"
    if gap.interval is None:
        return f"Too few to tell whether it overfits: {fell}.{note}"
    low, high = gap.interval
    if gap.mean > limit and low > 0.0:
        return f"It overfits: {fell}.{note}"
    if gap.mean > limit:
        return f"Too few to tell whether it overfits: {fell}; rows vary by more than that.{note}"
    if high > limit:
        return f"No sign of overfitting, but too few eval rows to be sure: {fell}.{note}"
    return f"No overfitting: eval loss fell about as much as train loss.{note}"


def forgetting_sentence(forgetting: float) -> str:
    """Return the sentence on a rise of the loss on general text, in nats per token."""
    rise = math.expm1(min(forgetting, 20.0))  # beyond that the figure no longer matters
    if rise < FORGETTING:
        change = f"the perplexity of general text changed by {100 * rise:+.1f}%"
        return f"No forgetting: {change}."
    kind = "Strong forgetting" if rise > STRONG_FORGETTING else "Some forgetting"
    return (
        f"{kind}: the perplexity of general text rose by {100 * rise:.0f}%. Fewer steps, a lower "
        "learning rate or rank, or general rows in the training data reduce it."
    )
