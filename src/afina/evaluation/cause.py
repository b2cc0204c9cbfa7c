"""Why a run learned little, from its own figures: steps, learning rate, rank or rows.

train loss rose                           the learning rate is too high
fewer steps than a run needs              steps
train loss fell and eval loss did not     rows: it overfits
train loss still falls at the end         steps
train loss hardly moved                   the learning rate is too low
train loss fell, and stays high           the rank
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

CauseName = Literal["steps", "learning rate too high", "learning rate", "rank", "rows"]

# A run that has converged takes less than a quarter of its fall in its second half; one that falls
# in a straight line takes half of it, and 0.4 under the cosine schedule.
STILL_FALLING_RATIO = 0.25
FLAT_RATIO = 0.1  # of the first loss: a fall below it is hardly more than noise between batches
WINDOW_RATIO = 0.2  # of the steps, over which a loss is averaged
RATE_FACTOR, STEPS_FACTOR, RANK_FACTOR = 3, 3, 4


@dataclass(frozen=True)
class Cause:
    """Cause of a result that was not reached, as a sentence, and the settings that change it."""

    name: CauseName
    sentence: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class RunFigures:
    """Figures of a run that show why it learned little.

    Attributes:
        curve: Loss of each optimizer step; lower is better.
        steps: Optimizer steps.
        min_steps: Steps that a run of this objective has by default at least.
        steps_per_epoch: Steps in which every row is seen once.
        best_step: Step with the lowest eval loss.
        overfits: Whether train loss fell and eval loss did not.
        learning_rate: Its peak.
        rank: Rank of the adapter; None where the method has none.
        what: Name of what the curve shows; of "reward" it shows the negative.
    """

    curve: Sequence[float]
    steps: int
    min_steps: int
    steps_per_epoch: int
    best_step: int
    overfits: bool
    learning_rate: float
    rank: int | None = None
    what: str = "train loss"

    def at(self, position: float) -> float:
        """Return the mean loss around a position in the run, 0 to 1."""
        width = max(1, round(len(self.curve) * WINDOW_RATIO))
        start = min(round(position * len(self.curve)), len(self.curve) - width)
        window = self.curve[max(0, start) : max(0, start) + width]
        return sum(window) / len(window)


def find_cause(run: RunFigures) -> Cause:
    """Return the first cause that the figures of a run show."""
    first, middle, last = run.at(0.0), run.at(0.5 - WINDOW_RATIO / 2), run.at(1.0)
    fall, flat = first - last, FLAT_RATIO * abs(first)
    sign = -1 if run.what == "reward" else 1
    moved = f"{run.what} went from {sign * first:.3f} to {sign * last:.3f}"
    if fall < -flat:
        return _rate(run, "learning rate too high", 1 / RATE_FACTOR, f"{moved}, which is worse")
    if run.overfits:
        why = (
            f"{_upper(moved)}, and eval loss did not follow: it was lowest at step {run.best_step}"
        )
        sentence = f"Cause: rows. {why}; more rows, fewer steps or dropout help."
        return Cause("rows", sentence, {"dropout": 0.1})
    enough = max(run.min_steps, run.steps_per_epoch)
    if run.steps < enough:
        count = f"{run.steps:,} optimizer steps are fewer than {enough:,}"
        return _steps(run, f"{count}; {moved}", max(enough, STEPS_FACTOR * run.steps))
    if fall > flat and middle - last > STILL_FALLING_RATIO * fall:
        return _steps(run, f"{run.what} still fell at the end", STEPS_FACTOR * run.steps)
    if fall <= flat:
        return _rate(run, "learning rate", RATE_FACTOR, f"{moved} and hardly moved")
    why = f"{moved} and stopped there"
    if run.rank is None:
        return _rate(run, "learning rate", RATE_FACTOR, why)
    more = RANK_FACTOR * run.rank
    sentence = f"Cause: rank. {_upper(why)}; try rank {more} instead of {run.rank}."
    return Cause("rank", sentence, {"rank": more})


def _steps(run: RunFigures, why: str, more: int) -> Cause:
    return Cause("steps", f"Cause: steps. {_upper(why)}; try {more:,}.", {"max_steps": more})


def _rate(run: RunFigures, name: CauseName, factor: float, why: str) -> Cause:
    rate = float(f"{run.learning_rate * factor:.1e}")
    sentence = f"Cause: {name}. {_upper(why)}; try {rate:g} instead of {run.learning_rate:g}."
    return Cause(name, sentence, {"learning_rate": rate})


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]
