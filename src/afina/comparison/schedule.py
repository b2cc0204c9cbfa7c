"""How much fits into the budget? Chosen before the first run, the same for every method.

Successive halving: n rates with few steps, the better half with twice as many, until one is left, which has its runs
with all steps (Jamieson and Talwalkar, 2016, arXiv 1502.07943; fresh runs, since the schedule of a rate belongs to its
length). Each method has the same number of trials, over the same range around its usual rate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1)  # of the steps
SPARE = 0.9  # of the budget: what is measured on a few steps is not exact
SLOWER = 1.3  # judging with an adapter against judging the base


@dataclass(frozen=True)
class Schedule:
    """Trials of each method, steps of a run, seeds; seconds that it takes as far as is known, and what was cut."""

    trials: int
    steps: int
    seeds: int
    seconds: float
    cut: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def rungs(trials: int, steps: int) -> list[tuple[int, int]]:
    """(rates, steps of each) of every round of the search: (4, s/4), (2, s/2) for four trials; none for one."""
    made, rates, rounds = [], trials, math.ceil(math.log2(trials)) if trials > 1 else 0
    for number in range(rounds):
        made.append((rates, max(1, steps // 2 ** (rounds - number))))
        rates = math.ceil(rates / 2)
    return made


def rates_to_try(usual: float, trials: int, reach: Sequence[float]) -> list[float]:
    """Rates from reach[0] to reach[1] times the usual one, evenly apart on a log scale; that alone where there is one trial."""
    if trials == 1:
        return [usual]
    lowest, span = usual * reach[0], math.log(reach[1] / reach[0])
    return [float(f"{lowest * math.exp(span * (n + 0.5) / trials):.3g}") for n in range(trials)]


def search_seconds(cost: Mapping[str, float], trials: int, steps: int) -> float:
    """Seconds of a method's search."""
    return sum(
        n * (cost["other_seconds"] + s * cost["step_seconds"]) for n, s in rungs(trials, steps)
    )


def seed_seconds(cost: Mapping[str, float], steps: int, judging: float) -> float:
    """Seconds of one run of a method with all its steps, judged."""
    return cost["other_seconds"] + steps * cost["step_seconds"] + SLOWER * judging


def steps_that_fit(
    costs: Mapping[str, Mapping[str, float]],
    judging: float,
    steps: int,
    pace: float,
    seconds: float,
) -> int:
    """As many of `steps`, one at least, as one run of each method has time for in `seconds`.

    `pace` says how much slower the machine turned out to be than it was measured.
    """
    once = pace * sum(seed_seconds(cost, 0, judging) for cost in costs.values())
    each = pace * sum(cost["step_seconds"] for cost in costs.values())
    return max(1, min(steps, int((seconds - once) / each)))


def choose_schedule(
    costs: Mapping[str, Mapping[str, float]],
    judging: float,
    trials: int,
    steps: int,
    seeds: int,
    seconds: float,
) -> Schedule:
    """The most that fits into `seconds`; where nothing does, the least there is, whose seconds then are more.

    Cut first are the third and further seeds, then steps down to a half, then trials down to two, then steps down to a
    tenth, then the second seed, and the search at last. One pass for several adapters is not counted on.
    """
    two_seeds, two_trials = min(2, seeds), min(2, trials)
    ways = [(trials, n, 1.0) for n in range(seeds, two_seeds - 1, -1)]
    ways += [(trials, two_seeds, share) for share in SHARES if share >= 0.5]
    ways += [(two_trials, two_seeds, share) for share in SHARES if share <= 0.5]
    ways += [(two_trials, 1, SHARES[-1]), (1, 1, SHARES[-1])]
    for some, runs, share in ways:
        length = max(1, round(share * steps))
        total = sum(
            search_seconds(cost, some, length) + runs * seed_seconds(cost, length, judging)
            for cost in costs.values()
        )
        if total <= SPARE * seconds:
            break
    asked, got = (
        {"trials": trials, "steps": steps, "seeds": seeds},
        {"trials": some, "steps": length, "seeds": runs},
    )
    return Schedule(some, length, runs, total, [name for name in asked if got[name] < asked[name]])
