"""Did it learn, did it overfit, what did it forget: figures into plain words.

The thresholds are rules of thumb, stated here once: a change under 0.02 nats a token is noise on a few thousand
tokens; a gap of 15% between rows learned and rows held out is worth a word; so is losing 5% of general perplexity.
"""

import math
from dataclasses import dataclass

NOISE = 0.02  # nats a token
GAP = 0.15
FORGOT, FORGOT_MUCH = 0.05, 0.5  # shares of general perplexity


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropy in nats a token, before and after; `train` on rows that were learned."""

    held_before: float
    held_after: float
    train_after: float
    general_before: float | None = None  # None where there is no general text to speak of: classifiers, encoders
    general_after: float | None = None
    best_step: int = 0
    last_step: int = 0

    @property
    def forgetting(self) -> float | None:
        """Rise of the loss on general text, in nats a token; negative where it fell."""
        if self.general_before is None or self.general_after is None:
            return None
        return self.general_after - self.general_before


def verdict(losses: Losses) -> list[str]:
    """Three sentences for people: learned, overfitted, forgotten."""
    said = [_learned(losses), _overfitted(losses)]
    return said if losses.forgetting is None else [*said, _forgot(losses.forgetting)]


def _learned(losses: Losses) -> str:
    gain = losses.held_before - losses.held_after
    if gain < -NOISE:
        return "It did not learn: on rows it had not seen it is worse than before. Try a lower learning rate or more data."
    if gain < NOISE:
        return "It learned next to nothing on rows it had not seen. Try more steps, a higher learning rate or rank."
    before, after = (f"{math.exp(x):.2f}" if x < 20 else f"e^{x:.0f}" for x in (losses.held_before, losses.held_after))
    return f"It learned: on rows it had not seen it now hesitates between {after} tokens instead of {before} (perplexity)."


def _overfitted(losses: Losses) -> str:
    gap = losses.held_after - losses.train_after
    stopped = losses.best_step < losses.last_step
    note = f" The best state, of step {losses.best_step}, was kept." if stopped else ""
    if gap > NOISE and gap > GAP * losses.held_after:
        return (
            f"It overfits: rows it learned cost {losses.train_after:.3f}, new rows {losses.held_after:.3f} nats a token.{note}"
        )
    return f"It does not overfit: new rows are about as easy for it as those it learned.{note}"


def _forgot(forgetting: float) -> str:
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
