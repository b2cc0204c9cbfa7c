"""Did it learn, did it overfit, what did it forget: figures into plain words.

The thresholds are rules of thumb, stated here once: a change under 0.02 nats a token is nothing to speak of; rows held
out that fell behind those learned by 15% of their loss are worth a word; so is losing 5% of general perplexity. Where
the rows are too few for a sentence (its 95% interval includes the opposite), the verdict says that instead.
"""

import math
from dataclasses import dataclass

from afina.errors import pluralize
from afina.evaluation.intervals import LossChange

MIN_LOSS_CHANGE = 0.02  # nats a token
OVERFIT_RATIO = 0.15
FORGOT, FORGOT_MUCH = 0.05, 0.5  # shares of general perplexity


@dataclass(frozen=True)
class LossReport:
    """Mean cross-entropy in nats a token (or row), before and after; `train` on rows that were learned.

    `eval_change` and `train_change` are the changes row by row, from which the intervals come.
    """

    eval_loss_before: float
    eval_loss_after: float
    train_loss_before: float
    train_loss_after: float
    eval_change: LossChange
    train_change: LossChange
    eval_rows: int  # of which `eval_change` may have looked at some only
    retention_loss_before: float | None = (
        None  # None where there is no general text to speak of: classifiers, encoders
    )
    retention_loss_after: float | None = None
    best_step: int = 0
    last_step: int = 0

    @property
    def forgetting(self) -> float | None:
        """Rise of the loss on general text, in nats a token; negative where it fell."""
        if self.retention_loss_before is None or self.retention_loss_after is None:
            return None
        return self.retention_loss_after - self.retention_loss_before


def verdict(losses: LossReport, unit: str = "token", choices: str = "tokens") -> list[str]:
    """Three sentences for people: learned, overfitted, forgotten. Losses are nats a `unit`, among `choices` (or none)."""
    sentences = [_learned(losses, unit, choices), _overfitted(losses, unit)]
    return (
        sentences
        if losses.forgetting is None
        else [*sentences, forgetting_sentence(losses.forgetting)]
    )


def _learned(losses: LossReport, unit: str, choices: str) -> str:
    """A change counts when its interval excludes none at all."""
    gain, interval, rows = (
        -losses.eval_change.mean,
        losses.eval_change.interval,
        pluralize(losses.eval_rows, "held-out row"),
    )
    if interval is None:
        return f"Too few to tell whether it learned: there is one held-out row. {_MORE}"
    low, high = interval
    measured = f"({-gain:+.3f} nats a {unit} on {rows}, 95% interval {low:+.3f} to {high:+.3f})"
    if low <= 0.0 <= high and max(-low, high) > MIN_LOSS_CHANGE:
        return f"Too few to tell whether it learned: the interval includes no change {measured}. {_MORE}"
    if abs(gain) < MIN_LOSS_CHANGE:
        return f"It learned next to nothing on rows it had not seen {measured}. Try more steps, a higher learning rate or rank."
    if gain < 0:
        return (
            f"It did not learn: on rows it had not seen it is worse than before {measured}. "
            "Try a lower learning rate or more data."
        )
    if not choices:  # a loss that is no perplexity
        return f"It learned: the loss on rows it had not seen fell {measured}."
    before, after = (
        f"{math.exp(x):.2f}" if x < 20 else f"e^{x:.0f}"
        for x in (losses.eval_loss_before, losses.eval_loss_after)
    )
    return (
        f"It learned: on rows it had not seen it now hesitates between {after} {choices} instead of {before} "
        f"(perplexity) {measured}."
    )


_MORE = "Use more eval rows: a larger --eval-size, or --eval-data FILE."


def _overfitted(losses: LossReport, unit: str) -> str:
    """Only what training widened is overfitting: rows may have been harder than others from the start."""
    gap = losses.eval_change.minus(losses.train_change)
    limit = max(MIN_LOSS_CHANGE, OVERFIT_RATIO * losses.eval_loss_after)
    stopped = losses.best_step < losses.last_step
    note = f" The best state, of step {losses.best_step}, was kept." if stopped else ""
    learned, new = -losses.train_change.mean, -losses.eval_change.mean
    fell = f"the loss of rows it learned fell by {learned:.3f}, that of new rows by {new:.3f} nats a {unit}"
    if gap.interval is None:
        return f"Too few to tell whether it overfits: {fell}.{note}"
    low, high = gap.interval
    if gap.mean > limit and low > 0.0:
        return f"It overfits: {fell}.{note}"
    if gap.mean > limit:
        return f"Too few to tell whether it overfits: {fell}, and the rows differ by more than that.{note}"
    if high > limit:
        return (
            f"No sign that it overfits, but the held-out rows are too few to be sure: {fell}.{note}"
        )
    return f"It does not overfit: new rows gained about as much as those it learned.{note}"


def forgetting_sentence(forgetting: float) -> str:
    """The sentence about a rise of the loss on general text, in nats a token."""
    rise = math.expm1(min(forgetting, 20.0))  # beyond it is a wreck, whatever the figure
    if rise < -FORGOT:
        return "It forgot nothing: general text is even easier for it than before."
    if rise < FORGOT:
        return "It forgot nothing worth speaking of: general text is as easy for it as before."
    amount = "much" if rise > FORGOT_MUCH else "a little"
    return (
        f"It forgot {amount}: general text is {100 * rise:.0f}% harder for it than before. "
        "Fewer steps, a lower learning rate or rank, or general rows among the data keep more."
    )
