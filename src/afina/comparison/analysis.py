"""Estimates with intervals, tests between methods, Pareto fronts and a recommendation.

A recommendation claims no more than the intervals show. Methods that these rows and seeds do not
distinguish are reported as such, and the one with the lowest measured cost is recommended.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afina.evaluation.intervals import (
    Estimate,
    crossed_estimate,
    holm,
    linearized_ratio,
    paired_difference,
    pareto,
    percentage_estimate,
    unpaired_difference,
    zero_count_bound,
)

Judged = Mapping[str, Any]
Table = NDArray[np.float64]
SURE = 0.05  # family-wise error rate over all pairs
ALIKE = 1.1  # costs within 10% of each other count as equal: they are measured once
BASE = "base"
COSTS = ("peak_mb", "run_seconds", "adapter_kb")


def losses(judged: Sequence[Judged], kind: str = "") -> Table:
    """Return linearized losses per target token `(S, N)`; `kind` is "", "train_" or "general_"."""
    return linearized_ratio([run[f"{kind}losses"] for run in judged], judged[0][f"{kind}labels"])


def scores(judged: Sequence[Judged], metric: str) -> Table:
    """Return the deciding metric `(S, N)`, signed so that higher is better."""
    if metric == "loss":
        return -losses(judged)
    return np.asarray([run["scores"][metric] for run in judged], float)


def changes(judged: Sequence[Judged], base: Judged, kind: str) -> Table:
    """Return the change of loss per target token against the base, by row `(S, N)`."""
    return linearized_ratio(
        [np.subtract(run[f"{kind}losses"], base[f"{kind}losses"]) for run in judged],
        judged[0][f"{kind}labels"],
    )


def describe(judged: Sequence[Judged], base: Judged, metric: str) -> dict[str, Any]:
    """Return every evaluated figure of a method with its interval."""
    found: dict[str, Any] = {
        "loss": crossed_estimate(losses(judged)).as_dict(),
        "loss_change": crossed_estimate(changes(judged, base, "")).as_dict(),
        "overfitting": unpaired_difference(
            changes(judged, base, ""), changes(judged, base, "train_")
        ).as_dict(),
        "others": {
            name: percentage_estimate([run["scores"][name] for run in judged]).as_dict()
            for name in judged[0].get("scores", {})
        },
        "seeds": len(judged),
    }
    found["score"] = found["loss"] if metric == "loss" else found["others"][metric]
    if "general_losses" in base:
        found["forgetting"] = crossed_estimate(changes(judged, base, "general_")).as_dict()
    return found


def pairs(
    judged: Mapping[str, Sequence[Judged]], base: Judged, metric: str
) -> list[dict[str, Any]]:
    """Return the paired test of every pair, base included, with Holm-corrected p-values."""
    seeds = min(len(runs) for runs in judged.values())
    tables = {BASE: np.repeat(scores([base], metric), seeds, 0)}
    tables |= {name: scores(runs[:seeds], metric) for name, runs in judged.items()}
    both = list(combinations(tables, 2))
    found = [_tested(tables[b], tables[a], metric) for a, b in both]
    corrected = holm([p for _, p in found])
    return [
        {
            "one": a,
            "other": b,
            "difference": shown.as_dict(),
            "p": p,
            "corrected": q,
            "significant": q < SURE,
        }
        for (a, b), (shown, p), q in zip(both, found, corrected, strict=True)
    ]


def _tested(one: Table, other: Table, metric: str) -> tuple[Estimate, float]:
    """Return the difference of two tables and its p-value.

    Scores are percentages, so the interval ends at 100; where all rows agree it includes the
    bound of a rate of which none was observed.
    """
    found, p = paired_difference(one, other)
    if metric == "loss" or found.low is None or found.high is None:
        return found, p
    reach = zero_count_bound(one.shape[1]) if found.error == 0.0 else 0.0
    return Estimate(
        found.mean, found.error, max(-100.0, found.low - reach), min(100.0, found.high + reach)
    ), p


def min_rows_to_differ(pairs: int) -> int:
    """Return the fewest scored rows with which a sign test over `pairs` can be significant."""
    return next(rows for rows in range(1, 99) if pairs * 2.0 ** (1 - rows) < SURE)


def fronts(methods: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, list[str]]:
    """Return the Pareto front of quality against memory, time and forgetting, by means."""
    names = list(methods)
    sign = 1.0 if metric == "loss" else -1.0
    quality = [sign * methods[name]["score"]["mean"] for name in names]
    found = {}
    for cost in ("peak_mb", "run_seconds", "forgetting"):
        if all(cost in methods[name] for name in names):
            value = [
                methods[n][cost]["mean"] if cost == "forgetting" else methods[n][cost]
                for n in names
            ]
            found[cost] = [names[i] for i in pareto(list(zip(quality, value, strict=True)))]
    return found


def recommend(
    methods: Mapping[str, Mapping[str, Any]], tested: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, Any]:
    """Return {"use", "kind", "indistinguishable", "reasons": [(message key, values)]}."""
    sign = -1.0 if metric == "loss" else 1.0
    names = sorted(methods, key=lambda name: -sign * methods[name]["score"]["mean"])
    pair = {frozenset((t["one"], t["other"])): t for t in tested}
    best = names[0]

    def better(one: str, other: str) -> bool:
        if one == other:
            return False
        test = pair[frozenset((one, other))]
        gain = test["difference"]["mean"] * (1 if test["other"] == one else -1)
        # tests compare scores with the sign by which more is better
        return bool(test["significant"] and gain > 0)

    reasons: list[tuple[str, dict[str, Any]]]
    helpful = [name for name in names if better(name, BASE)]
    if not helpful:
        worse = [name for name in names if better(BASE, name)]
        reasons = [
            ("no_gain", {"best": best}),
            *([("worse_than_base", {"methods": worse})] if worse else []),
        ]
        if fell := [
            name for name in names if (methods[name].get("loss_change", {}).get("high") or 0.0) < 0
        ]:
            reasons.append(("loss_fell", {"methods": fell}))
        return {"use": BASE, "kind": "base", "indistinguishable": names, "reasons": reasons}
    best = helpful[0]
    alike = [name for name in helpful if not better(best, name)]
    behind = [name for name in names if better(best, name)]
    reasons = [("helps", {"best": best})]
    if behind:
        reasons.append(("better_than", {"best": best, "methods": behind}))
    if len(alike) == 1:
        return {"use": best, "kind": "best", "indistinguishable": alike, "reasons": reasons}
    reasons.append(("no_difference", {"methods": alike}))
    widest = max(
        (pair[frozenset((best, other))] for other in alike[1:]),
        key=lambda t: _reach(t["difference"]),
    )
    reasons.append(
        (
            "may_hide",
            {"amount": _reach(widest["difference"]), "methods": [widest["one"], widest["other"]]},
        )
    )
    left, why = _cheapest(methods, alike)
    return {"use": left, "kind": "cheapest", "indistinguishable": alike, "reasons": reasons + why}


def _reach(shown: Mapping[str, float | None]) -> float:
    """Return the largest difference that the interval includes."""
    return max(abs(shown["low"] or 0.0), abs(shown["high"] or 0.0))


def _cheapest(
    methods: Mapping[str, Mapping[str, Any]], alike: Sequence[str]
) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Return the cheapest of equally good methods: forgetting, then memory, time and size."""
    left = list(alike)
    reasons: list[tuple[str, dict[str, Any]]] = []
    if all("forgetting" in methods[name] for name in left):
        least = min(left, key=lambda name: methods[name]["forgetting"]["mean"])
        keeps = [
            n
            for n in left
            if n == least
            or not _are_disjoint(methods[n]["forgetting"], methods[least]["forgetting"])
        ]
        if len(keeps) < len(left):
            reasons.append(
                ("forgets_more", {"methods": [n for n in left if n not in keeps], "best": least})
            )
            left = keeps
    for cost in COSTS:
        if len(left) == 1:
            break
        lowest = min(methods[name][cost] for name in left)
        cheap = [name for name in left if methods[name][cost] <= ALIKE * lowest]
        if len(cheap) < len(left):
            reasons.append((cost, {"methods": cheap, "value": lowest}))
            left = cheap
    if len(left) > 1:
        reasons.append(("as_cheap", {"methods": left}))
    return left[0], reasons


def _are_disjoint(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> bool:
    """Return whether two intervals are disjoint, which is stricter than a test."""
    return (one["low"] or 0.0) > (other["high"] or 0.0)
