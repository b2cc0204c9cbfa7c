"""Trials, steps and seeds that fit a time budget: chosen before all runs, equal for all methods.

Successive halving: n learning rates with few steps, the better half with twice as many, until one
is
left, whose runs take all steps (new runs, since a learning rate schedule depends on the number of
steps). Each method has the same number of trials, over the same range around its default rate.

References:
    Jamieson and Talwalkar, 2016 (arXiv 1502.07943).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

STEP_RATIOS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1)  # of the requested steps
USABLE_BUDGET_RATIO = 0.9  # seconds measured on a few steps are not exact
ADAPTER_EVAL_SLOWDOWN = 1.3  # evaluating with an adapter, relative to the base alone


@dataclass(frozen=True)
class Schedule:
    """Trials per method, steps per run, seeds, estimated seconds, and what was reduced."""

    trials: int
    steps: int
    seeds: int
    seconds: float
    cut: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def rungs(trials: int, steps: int) -> list[tuple[int, int]]:
    """Return (rates, steps of each) per round of the search: (4, s/4), (2, s/2) for four trials."""
    found, rates = [], trials
    rounds = math.ceil(math.log2(trials)) if trials > 1 else 0
    for number in range(rounds):
        found.append((rates, max(1, steps // 2 ** (rounds - number))))
        rates = math.ceil(rates / 2)
    return found


def rates_to_try(usual: float, trials: int, reach: Sequence[float]) -> list[float]:
    """Return rates from reach[0] to reach[1] times `usual`, log-spaced; `usual` for one trial."""
    if trials == 1:
        return [usual]
    lowest, span = usual * reach[0], math.log(reach[1] / reach[0])
    return [float(f"{lowest * math.exp(span * (n + 0.5) / trials):.3g}") for n in range(trials)]


def search_seconds(cost: Mapping[str, float], trials: int, steps: int) -> float:
    """Return the seconds of a method's learning rate search."""
    return sum(
        n * (cost["other_seconds"] + s * cost["step_seconds"]) for n, s in rungs(trials, steps)
    )


def seed_seconds(cost: Mapping[str, float], steps: int, judging: float) -> float:
    """Return the seconds of one run of a method with all its steps, evaluation included."""
    return cost["other_seconds"] + steps * cost["step_seconds"] + ADAPTER_EVAL_SLOWDOWN * judging


def steps_that_fit(
    costs: Mapping[str, Mapping[str, float]],
    judging: float,
    steps: int,
    pace: float,
    seconds: float,
) -> int:
    """Return how many of `steps`, at least one, a run of each method has time for in `seconds`.

    `pace` is the machine's slowdown since the costs were measured.
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
    """Return the largest schedule that fits `seconds`, or the smallest one where none fits.

    Reduced in this order: the third and further seeds, steps to a half, trials to two, steps to a
    tenth, the second seed, and last the search. Sharing a pass among adapters is not assumed.
    """
    two_seeds, two_trials = min(2, seeds), min(2, trials)
    ways = [(trials, n, 1.0) for n in range(seeds, two_seeds - 1, -1)]
    ways += [(trials, two_seeds, ratio) for ratio in STEP_RATIOS if ratio >= 0.5]
    ways += [(two_trials, two_seeds, ratio) for ratio in STEP_RATIOS if ratio <= 0.5]
    ways += [(two_trials, 1, STEP_RATIOS[-1]), (1, 1, STEP_RATIOS[-1])]
    for some, runs, ratio in ways:
        length = max(1, round(ratio * steps))
        total = sum(
            search_seconds(cost, some, length) + runs * seed_seconds(cost, length, judging)
            for cost in costs.values()
        )
        if total <= USABLE_BUDGET_RATIO * seconds:
            break
    requested = {"trials": trials, "steps": steps, "seeds": seeds}
    chosen = {"trials": some, "steps": length, "seeds": runs}
    reduced = [name for name in requested if chosen[name] < requested[name]]
    return Schedule(some, length, runs, total, reduced)
