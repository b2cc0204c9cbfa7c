"""Weights found on a few examples, without gradients.

    minimize over w in [-1.5, 1.5]^n
    loss(base + sum over k of w_k D_k, rows) + penalty * sum over k of |w_k|

All adapters are attached to one base, and an evaluation only changes their weights: nothing is
merged or written. The loss is smooth in a few weights, so that a derivative-free trust-region
method (COBYQA, in SciPy) starts from the best of the simple choices: the base, each adapter alone,
the mean, the sum. Half of the rows, sampled by the seed, are never searched on: their loss shows
whether the weights found are better than the simple choices.

References:
    Huang et al. 2023, LoraHub, arXiv 2307.13269.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import load_run
from afina.data.packing import train_eval_split
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.errors import SettingsError
from afina.merging.registry import register_merge_method
from afina.merging.sources import AdapterSource
from afina.models.causal_lm import CausalLM
from afina.objectives.language_data import infer_objective, tokenize_rows
from afina.objectives.language_modeling import mean_loss
from afina.objectives.prepared import BATCH_TOKENS
from afina.settings import CombineSettings
from afina.settings.combine import WeightSearchSettings

BOUND = 1.5  # of |w|, as in LoraHub
DIGITS = 4  # decimal places of a weight, so that the result can be typed again

Loss = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class FoundWeights:
    """The result of a weight search: weights, the merge method to apply with them, and a record."""

    weights: list[float]
    merge_method: str
    record: dict[str, Any]


class _EvaluationsUsedUp(Exception):
    """The largest number of loss evaluations is reached."""


@register_merge_method(
    "search",
    form="weight_search",
    precision="float64",
    reference="Huang et al. 2023, arXiv 2307.13269",
    settings=WeightSearchSettings,
)
def search(sources: Sequence[AdapterSource], settings: CombineSettings) -> FoundWeights:
    """Weights with the least loss on a few rows, then sum, or svd where a rank is given.

    The losses on the other half of the rows are recorded, in nats per token, by choice of weights.

    Raises:
        SettingsError: `data` is not given.
    """
    if settings.data is None:
        raise SettingsError(
            "data is missing: a search for weights needs rows with answers",
            where="data",
            hint="--data FILE, with 20 rows or more",
        )
    opened = load_run(Path(",".join(settings.adapters)), settings)
    base, routes = opened.causal_lm, [adapter.active for adapter, _ in opened.adapters]
    mine, kept = train_eval_split(
        read_table(settings.data, SFT, settings.columns).rows, 0.5, settings.seed
    )
    renderer = Renderer(base.tokenizer, opened.chat_format, min(base.max_positions, 2048))
    rows, checked = (
        tokenize_rows(infer_objective("auto", part), renderer, part, None) for part in (mine, kept)
    )
    simple = _simple_choices(sources)
    weights, trials = _minimize(
        _loss(base, rows, routes), list(simple.values()), settings.l1_penalty, settings.max_evals
    )
    check = _loss(base, checked, routes)
    losses = {name: check(choice) for name, choice in simple.items()}
    record = {
        "rows": len(mine),
        "checked_on": len(kept),
        "trials": trials,
        "found": check(weights),
        "losses": losses,
        "best_simple": min(losses, key=lambda name: losses[name]),
    }
    return FoundWeights(weights, "svd" if settings.rank else "sum", record)


def _simple_choices(sources: Sequence[AdapterSource]) -> dict[str, list[float]]:
    """Return weights that one would try by hand, by the name of the choice."""
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
            [active.scaled(w) for active, w in zip(routes, weights, strict=True)]
        )
        return mean_loss(base, examples, BATCH_TOKENS, together)

    return loss


def _minimize(
    loss: Loss, starts: Sequence[Sequence[float]], penalty: float, steps: int
) -> tuple[list[float], int]:
    """Return the best weights, starting from the best of `starts`, and the number of evaluations.

    Args:
        steps: The largest number of loss evaluations.
    """
    from scipy.optimize import minimize

    seen: dict[tuple[float, ...], float] = {}

    def value(weights: Sequence[float]) -> float:
        point = tuple(round(float(w), DIGITS) for w in weights)
        if point not in seen:
            if len(seen) >= max(steps, len(starts)):
                raise _EvaluationsUsedUp
            seen[point] = loss(point) + penalty * sum(map(abs, point))
        return seen[point]

    start = min(starts, key=lambda choice: value(choice))
    try:
        bounds = [(-BOUND, BOUND)] * len(start)
        options = {"initial_tr_radius": 0.4, "final_tr_radius": 1e-3, "maxfev": 10 * steps}
        minimize(
            lambda x: value(x), np.array(start), method="COBYQA", bounds=bounds, options=options
        )
    except _EvaluationsUsedUp:
        pass
    found = min(seen, key=lambda point: seen[point])
    return list(found), len(seen)
