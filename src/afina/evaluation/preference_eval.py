"""Who wins, how surely, and is the better answer itself becoming unlikely: preferences on held-out rows, before and after.

Likelihood displacement: both answers become less likely and only their distance grows; what becomes likely instead is
neither (Razin et al. 2024, arXiv 2410.08847). A fall of the better answers' log-probability by 5% is worth a warning.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.adapters.loading import load_adapter
from afina.data.renderer import Renderer
from afina.data.schemas import PAIRS, PREFERENCE, split_pairs
from afina.data.table import read_table
from afina.errors import DataError, SettingsError, pluralize
from afina.evaluation.results import EvalResult
from afina.evaluation.retention import BATCH_TOKENS, retention_loss
from afina.io.adapter_folder import adapter_folder
from afina.io.adapter_metadata import read_metadata
from afina.models.causal_lm import CausalLM
from afina.objectives.preference import PairwiseObjective, PreferenceObjective, tokenize_preferences
from afina.objectives.preference_losses import NEEDS_REFERENCE
from afina.objectives.reference import ReferencePolicy, select_reference
from afina.objectives.reward_model import RewardModelObjective
from afina.settings import EvalSettings, TrainSettings

HELD_OUT = "held_out.jsonl"
BEGIN_EQUAL = ("accuracy", "margin", "z", "chosen_reward", "rejected_reward", "calibration_error")
DISPLACEMENT_RATIO = 0.05  # share of the log-probability


def wilson_interval(wins: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share of `of` (at least one) trials. Wilson 1927, J. Am. Stat. Assoc. 22, 209."""
    z, share = 1.959964, wins / of
    middle, reach = (
        share + z * z / (2 * of),
        z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)),
    )
    return (middle - reach) / (1 + z * z / of), (middle + reach) / (1 + z * z / of)


def judge_preferences(
    task: PairwiseObjective,
    objective: str,
    before: ActiveAdapters | None,
    after: ActiveAdapters | None,
) -> dict[str, Any]:
    """Facts about the held-out rows under both routes, the reference, and sentences ("verdict").

    Log-probabilities and lengths are those of whole answers, in nats and tokens.
    """
    facts: dict[str, Any] = {
        "before": task.eval_metrics(before),
        "after": task.eval_metrics(after),
        "rows": len(task.eval_rows),
    }
    if objective in (
        *NEEDS_REFERENCE,
        "reward",
    ):  # there everything begins equal: nobody is preferred
        facts["before"] = {
            name: value for name, value in facts["before"].items() if name not in BEGIN_EQUAL
        }
    reference = getattr(task, "reference", None)
    said = [_who_wins(facts, objective), *displacement_warning(facts, objective)]
    if objective == "reward":
        said.append(_calibrated(facts))
    return (
        facts
        | ({"reference": reference.to_dict()} if reference is not None else {})
        | {"verdict": said}
    )


def _who_wins(facts: dict[str, Any], objective: str) -> str:
    rows = pluralize(facts["rows"], "held-out answer" if objective == "kto" else "held-out pair")
    share = f"{100 * facts['after']['accuracy']:.1f}% of {rows}"
    if objective == "kto":
        return f"It tells good answers from bad ones on {share}: the former became likelier, the latter less likely."
    margin = f"the mean margin is {facts['after']['margin']:+.3f}"
    if objective == "reward":
        return f"It gives the better answer the higher reward on {share}; {margin}."
    then = facts["before"].get("accuracy")
    before = "more than the reference does" if then is None else f"before, on {100 * then:.1f}%"
    return f"It prefers the better answer on {share} ({before}); {margin}."


def _calibrated(facts: dict[str, Any]) -> str:
    error = 100 * facts["after"]["calibration_error"]
    return (
        f"Its probabilities are off by {error:.1f} points on average (expected calibration error)."
    )


def displacement_warning(facts: dict[str, Any], objective: str) -> list[str]:
    """A warning with a remedy where the better answers have become less likely; nothing else."""
    names = "before", "after"
    chosen = [facts[name].get("chosen_logp") for name in names]
    if None in chosen or chosen[1] - chosen[0] >= -DISPLACEMENT_RATIO * abs(chosen[0]):
        return []
    rejected = [facts[name].get("rejected_logp", float("nan")) for name in names]
    remedies = {
        "dpo": "`--dpo.sft-weight 0.2`, `--dpo.loss-type ipo`, ",
        "simpo": "`--simpo.sft-weight 0.2`, ",
        "kto": "a larger `--kto.desirable-weight`, ",
        "orpo": "a smaller `--orpo.beta`, ",
    }
    return [
        f"Warning: the better answers themselves became less likely ({chosen[0]:.1f} to {chosen[1]:.1f} nats an answer, the "
        f"worse ones {rejected[0]:.1f} to {rejected[1]:.1f}): likelihood displacement. Try {remedies[objective]}or a lower "
        "learning rate."
    ]


def eval_rows_file(settings: EvalSettings) -> Path:
    """The held-out rows of a run; raises `SettingsError` or `DataError` where there are none."""
    if settings.adapter is None:
        raise SettingsError(
            "nothing to judge on",
            where="data",
            hint="--data FILE, or --run RUN for its own held-out rows",
        )
    kept = settings.adapter / HELD_OUT
    if not kept.is_file():
        raise DataError(
            "this folder has no held-out rows of its own",
            where=str(settings.adapter),
            hint="--data FILE",
        )
    return kept


def evaluate_preferences(opened: LoadedRun, settings: EvalSettings) -> EvalResult:
    """`afina eval` of a run that learned preferences, on its held-out rows or on others: facts, loss and sentences."""
    base, story = opened.base, opened.run
    assert isinstance(base, CausalLM)
    adapter = opened.adapters[0][0] if opened.adapters else None
    trained = TrainSettings(**story["settings"] | {"objective": story["objective"]})
    objective = trained.objective
    own = settings.data is None
    table = read_table(
        eval_rows_file(settings) if own else Path(str(settings.data)),
        PREFERENCE,
        {} if own else settings.columns,
    )
    rows = split_pairs(table.rows) if objective == "kto" and table.format == PAIRS else table.rows
    if objective != "kto" and table.format != PAIRS:
        raise DataError(
            f"{objective} compares two answers to one prompt",
            where=str(table.path),
            hint="chosen and rejected",
        )
    renderer = Renderer(
        base.tokenizer, opened.template, trained.max_length or min(base.max_positions, 2048)
    )
    invocation = adapter.config.invocation if adapter is not None else ()
    choices = [
        choice
        for _, choice in tokenize_preferences(renderer, rows, None, invocation, objective == "kto")
    ]
    packing = (BATCH_TOKENS, 1, trained.seed)
    task: PairwiseObjective
    before, reference = _reference(opened, trained, story)
    if objective == "reward":
        task = RewardModelObjective(base, choices, choices, *packing)
    else:
        task = PreferenceObjective(
            objective, trained.group(objective), base, choices, choices, *packing
        )
        task.reference = reference
    found = judge_preferences(task, objective, before, opened.active)
    result: dict[str, Any] = {
        "base": base.name,
        "run": str(settings.adapter),
        "rows": len(rows),
        "objective": objective,
    }
    for when, route in (("before", before), ("after", opened.active)):
        result[when] = {
            "loss": task.eval_loss(route),
            "general_loss": retention_loss(base, route),
        } | found[when]
    result["forgetting"] = result["after"]["general_loss"] - result["before"]["general_loss"]
    return EvalResult(**result, reference=found.get("reference"), verdict=found["verdict"])


def _reference(
    opened: LoadedRun, trained: TrainSettings, story: Mapping[str, Any]
) -> tuple[ActiveAdapters | None, ReferencePolicy | None]:
    """What a run was compared with, loaded again: the adapter that it went on from, where it did, and the reference."""
    before, digest = reload_init_adapter(opened, trained, story["preferences"].get("start"))
    compared = trained.objective in NEEDS_REFERENCE
    if not compared:
        return before, None
    return before, select_reference(trained.group(trained.objective), before, digest, 0.0)


def reload_init_adapter(
    opened: LoadedRun, trained: TrainSettings, expected: str | None
) -> tuple[ActiveAdapters | None, str | None]:
    """The adapter that a run went on from, loaded again, and its hash; nothing where it began anew.

    Raises `DataError` where it is not the `expected` one any more.
    """
    start = trained.init_adapter
    over = [opened.frozen_adapter] if opened.frozen_adapter is not None else []
    if start is None:
        return (over[0], opened.run["over"]) if over else (None, None)
    folder = adapter_folder(start)
    digest = str(read_metadata(folder).get("hash", ""))
    if digest != expected:
        why = f"its hash was {str(expected)[:12]}, and is {digest[:12]}"
        raise DataError(
            "the adapter that the run went on from has changed", where=str(folder), why=why
        )
    route = load_adapter(folder, opened.base, "start").active
    return ActiveAdapters.combine([route, *over]), digest
