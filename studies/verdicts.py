"""How a claim of a guide is held against results: by rules that were written down before the figures were there.

A point is what one part says: for the claim, against it, or neither. A claim is confirmed where all points are for it, not
confirmed where none is for it and one at least is against it; else it depends, and the points say on what.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Any]  # a result: compare.json, shortened
Results = Mapping[str, Found]

POINTS, NATS = 5.0, 0.05  # what counts as a difference at all: of a score in percent, of a loss
CONFIRMED, REFUTED, DEPENDS, OPEN = "confirmed", "not confirmed", "depends", "not run yet"


@dataclass(frozen=True)
class Point:
    """What one part says: its figures, and whether they speak for the claim, against it, or neither (None)."""

    part: str
    figures: str
    holds: bool | None


@dataclass(frozen=True)
class Claim:
    """What a guide says, who says it, which parts can tell, by which rule, and what each verdict means in plain words."""

    name: str
    says: str
    who: str
    link: str
    parts: tuple[str, ...]
    rule: str
    judge: Callable[[Results, str], Point]
    plain: Mapping[str, str]

    def points(self, results: Results) -> list[Point]:
        """What each part that has run says."""
        return [self.judge(results, part) for part in self.parts if part in results]

    def verdict(self, results: Results) -> str:
        """What all of them say together."""
        held = [point.holds for point in self.points(results)]
        if not held:
            return OPEN
        if all(held):
            return CONFIRMED
        return REFUTED if not any(held) and False in held else DEPENDS


@dataclass(frozen=True)
class Gap:
    """One method's score less another's, turned so that more is better, paired by rows and seeds."""

    mean: float
    low: float
    high: float
    shown: bool
    unit: str

    @property
    def margin(self) -> float:
        """Differences below it are taken for none."""
        return NATS if self.unit == "nats" else POINTS

    def __str__(self) -> str:
        form = "{:+.3f}" if self.unit == "nats" else "{:+.1f}"
        ends = ", ".join(form.format(end) for end in (self.low, self.high))
        return f"{form.format(self.mean)} [{ends}] {self.unit}{'' if self.shown else ', not shown'}"


def gap(found: Found, one: str, other: str) -> Gap:
    """`one` less `other`; raises `KeyError` where they were not compared."""
    for test in found["tests"]:
        if {test["one"], test["other"]} == {one, other}:
            sign = (
                1.0 if test["one"] == other else -1.0
            )  # a test's difference is its other less its one
            shown = test["difference"]
            ends = sorted(sign * shown[end] for end in ("low", "high"))
            unit = "nats" if found["metric"] == "loss" else "points"
            return Gap(sign * shown["mean"], ends[0], ends[1], test["significant"], unit)
    raise KeyError(f"{one} and {other} were not compared")


def as_good(one: str, other: str) -> Callable[[Results, str], Point]:
    """For: `one` may be worse by less than the margin. Against: it is shown to be worse by more."""

    def judge(results: Results, part: str) -> Point:
        found = gap(results[part], one, other)
        worse = found.shown and found.mean < -found.margin
        return Point(
            part,
            f"{one} − {other}: {found}",
            True if found.low > -found.margin else False if worse else None,
        )

    return judge


def better(one: str, other: str) -> Callable[[Results, str], Point]:
    """For: `one` is shown to be better. Against: shown to be worse, or better by less than the margin at most."""

    def judge(results: Results, part: str) -> Point:
        found = gap(results[part], one, other)
        against = found.high < found.margin or (found.shown and found.mean < 0)
        return Point(
            part,
            f"{one} − {other}: {found}",
            True if found.shown and found.mean > 0 else False if against else None,
        )

    return judge


def less(kind: str, one: str, other: str) -> Callable[[Results, str], Point]:
    """For: the interval of `one`'s forgetting (or overfitting) ends below where `other`'s begins. Against: the reverse."""

    def judge(results: Results, part: str) -> Point:
        a, b = (results[part]["methods"][name][kind] for name in (one, other))
        return Point(part, f"{one} {spread(a)}, {other} {spread(b)} nats", below(a, b))

    return judge


def below(one: Mapping[str, float], other: Mapping[str, float]) -> bool | None:
    """Whether the interval of `one` ends below where `other`'s begins; False where it is the reverse, None where they touch."""
    return True if one["high"] < other["low"] else False if other["high"] < one["low"] else None


def spread(figure: Mapping[str, float], form: str = "{:+.3f}") -> str:
    """A figure with its interval."""
    return f"{form.format(figure['mean'])} [{form.format(figure['low'])}, {form.format(figure['high'])}]"


def verdicts(claims: Sequence[Claim], results: Results) -> Iterator[tuple[Claim, str, list[Point]]]:
    """(claim, verdict, points) of each."""
    for claim in claims:
        yield claim, claim.verdict(results), claim.points(results)
