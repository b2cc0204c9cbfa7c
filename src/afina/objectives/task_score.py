"""The task's own score of a run: exact match, chrF, accuracy, preference accuracy or reward.

A falling loss is not yet a right answer, so a verdict is decided by this score where there is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from afina.errors import pluralize
from afina.evaluation.intervals import paired_change, wilson_interval

Outcome = Literal["too few", "better", "worse", "unclear", "unknown"]

# With 5 paired rows that all improved, the sign test gives 2 / 2^5 = 6%; with 6 rows 3%.
MIN_DECISIVE_ROWS = 6


@dataclass(frozen=True)
class TaskScore:
    """Score of eval rows, in percent or, where `unit` is empty, a number; higher is better.

    Attributes:
        before: Before training; None where nothing was there that could be scored.
        change: 95% interval of `after` minus `before`, or minus `chance`; None if unknown.
        chance: Score of a guess, in place of `before`.
        counts_right: Whether it is the percentage of rows that are right.
    """

    name: str
    after: float
    rows: int
    before: float | None = None
    change: tuple[float, float] | None = None
    chance: float | None = None
    unit: str = "%"
    counts_right: bool = True
    row_kind: str = "eval row"

    @classmethod
    def of_rows(
        cls, name: str, before: Sequence[float], after: Sequence[float], **fields: Any
    ) -> "TaskScore":
        """Return the score of rows that were scored twice."""
        change = paired_change(before, after, [1] * len(after)).interval
        if change is not None and fields.get("unit", "%"):
            change = _percent_interval(change, len(after), float(np.mean(before)))
        first, last = float(np.mean(before)), float(np.mean(after))
        return cls(name, last, len(after), first, change, **fields)

    @classmethod
    def of_counts(
        cls, name: str, right: int, rows: int, before: float | None, chance: float, **fields: Any
    ) -> "TaskScore":
        """Return the percentage of right rows, compared with `before` or else with `chance`."""
        level = chance if before is None else before
        low, high = (100 * bound - level for bound in wilson_interval(right, rows))
        change, after = (low, high), 100 * right / rows
        return cls(name, after, rows, before, change, chance, **fields)

    @property
    def outcome(self) -> Outcome:
        """Whether the score rose: its interval excludes 0; "unknown" without an interval."""
        if self.rows < MIN_DECISIVE_ROWS:
            return "too few"
        if self.change is None:
            return "unknown"
        low, high = self.change
        return "better" if low > 0 else "worse" if high < 0 else "unclear"

    @property
    def mostly_right(self) -> bool:
        """Whether more rows are right than wrong; True of scores that count no right rows."""
        return not self.counts_right or self.after >= 50

    def sentence(self) -> str:
        """Return what was measured: before, after, interval and rows."""
        rows = pluralize(self.rows, self.row_kind)
        if self.before is None:
            against = "" if self.chance is None else f", a guess {self._value(self.chance)}"
            text = f"{self.name} {self._value(self.after)}{against}"
        else:
            text = f"{self.name} {self._value(self.before)} to {self._value(self.after)}"
        if self.change is None or self.rows < MIN_DECISIVE_ROWS:
            return f"{text} ({rows})"
        low, high = self.change
        form = "+.1f" if self.unit else "+.3f"
        points = " points" if self.unit else ""
        return f"{text} (95% CI of the change {low:{form}} to {high:{form}}{points}, {rows})"

    def cells(self) -> tuple[str, str, str]:
        """Return name, before and after, for a table."""
        before = "" if self.before is None else self._value(self.before)
        return self.name, before, self._value(self.after)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for run.json."""
        return vars(self) | {"change": None if self.change is None else list(self.change)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TaskScore":
        """Return the score that `to_dict` wrote."""
        change = values["change"]
        return cls(**values | {"change": None if change is None else tuple(change)})

    def _value(self, number: float) -> str:
        return f"{number:.1f}{self.unit}" if self.unit else f"{number:.3f}"


def _percent_interval(change: tuple[float, float], rows: int, before: float) -> tuple[float, float]:
    """Return the interval of a change in percent, within what is possible.

    Where all rows changed by the same, so that the estimated variance is 0, it is Wilson's.
    """
    low, high = change
    if low == high:
        unseen = 100 * wilson_interval(0, rows)[1]
        low, high = low - unseen, high + unseen
    return max(low, -before) + 0.0, min(high, 100 - before)  # + 0.0: no minus zero
