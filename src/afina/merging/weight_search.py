"""Weights found on a few examples, without a gradient (after LoRAHub: Huang et al. 2023, arXiv 2307.13269).

    minimise over w in [-1.5, 1.5]^n      loss(base + sum over k of w_k D_k, rows)  +  penalty * sum |w_k|

The adapters lie over one base, and a trial is a route with other weights: nothing is merged or written. The loss is
smooth in a few weights, so a trust-region method without derivatives (COBYQA, in SciPy) starts from the best of the
simple choices: nobody, each alone, the mean, the plain sum. Half of the rows, drawn by the seed, are never searched on:
they say whether what was found is better than the simple choices.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import load_run
from afina.data.formats import read_table
from afina.data.packing import train_eval_split
from afina.data.renderer import Example, Renderer
from afina.errors import SettingsError
from afina.evaluation.retention import BATCH_TOKENS
from afina.merging.sources import AdapterSource
from afina.models.causal_lm import CausalLM
from afina.objectives.language_modeling import infer_objective, mean_loss, tokenize_rows
from afina.settings import CombineSettings

BOUND = 1.5  # as in LoRAHub
DIGITS = 4  # of a weight: what people can read and type again

Loss = Callable[[Sequence[float]], float]


class _Enough(Exception):
    """The trials are used up."""


def search(sources: Sequence[AdapterSource], settings: CombineSettings) -> dict[str, Any]:
    """The weights of `sources` with the least loss on half of the rows, and the losses on the other half.

    {"weights": [...], "search": {"rows", "checked_on", "trials", "found", "best_simple", "losses": {choice: nats a token}}}.
    Raises `SettingsError` without rows.
    """
    if settings.data is None:
        raise SettingsError(
            "a search needs rows with answers",
            where="data",
            hint="--data FILE, some 20 rows or more",
        )
    opened = load_run(Path(",".join(settings.adapters)), settings)
    base, routes = opened.causal_lm, [adapter.active for adapter, _ in opened.adapters]
    mine, kept = train_eval_split(
        read_table(settings.data, settings.columns).rows, 0.5, settings.seed
    )
    renderer = Renderer(base.tokenizer, opened.template, min(base.max_positions, 2048))
    rows, checked = (
        tokenize_rows(infer_objective("auto", part), renderer, part, None) for part in (mine, kept)
    )
    simple = _simple(sources)
    weights, trials = _minimise(
        _loss(base, rows, routes), list(simple.values()), settings.l1_penalty, settings.max_evals
    )
    check = _loss(base, checked, routes)
    losses = {name: check(choice) for name, choice in simple.items()}
    found = check(weights)
    best = min(losses, key=lambda name: losses[name])
    told = {
        "rows": len(mine),
        "checked_on": len(kept),
        "trials": trials,
        "found": found,
        "losses": losses,
        "best_simple": best,
    }
    return {"weights": weights, "search": told}


def _simple(sources: Sequence[AdapterSource]) -> dict[str, list[float]]:
    """What one would try by hand: weights by a name that says what they are."""
    count = len(sources)
    choices = {"base": [0.0] * count}
    for number, source in enumerate(sources):
        name = f"{source.name} alone"
        choices[name if name not in choices else f"{name} ({number + 1})"] = [
            float(i == number) for i in range(count)
        ]
    if count > 1:
        choices |= {"mean": [round(1 / count, DIGITS)] * count, "sum": [1.0] * count}
    return choices


def _loss(base: CausalLM, examples: Sequence[Example], routes: Sequence[ActiveAdapters]) -> Loss:
    def loss(weights: Sequence[float]) -> float:
        together = ActiveAdapters.combine(
            [replace(route, weight=w) for route, w in zip(routes, weights, strict=True)]
        )
        return mean_loss(base, examples, BATCH_TOKENS, together)

    return loss


def _minimise(
    loss: Loss, starts: Sequence[Sequence[float]], penalty: float, steps: int
) -> tuple[list[float], int]:
    """(weights, trials): the best point seen, from the best of `starts` on, in `steps` trials at most."""
    seen: dict[tuple[float, ...], float] = {}

    def value(weights: Sequence[float]) -> float:
        point = tuple(round(float(w), DIGITS) for w in weights)
        if point not in seen:
            if len(seen) >= max(steps, len(starts)):
                raise _Enough
            seen[point] = loss(point) + penalty * sum(map(abs, point))
        return seen[point]

    start = min(starts, key=lambda choice: value(choice))
    try:
        bounds = [(-BOUND, BOUND)] * len(start)
        options = {"initial_tr_radius": 0.4, "final_tr_radius": 1e-3, "maxfev": 10 * steps}
        minimize(
            lambda x: value(x), np.array(start), method="COBYQA", bounds=bounds, options=options
        )
    except _Enough:
        pass
    found = min(seen, key=lambda point: seen[point])
    return list(found), len(seen)
