"""Who wins, how surely, and is the better answer itself becoming unlikely: preferences on held-out rows, before and after.

Likelihood displacement: both answers become less likely and only their distance grows; what becomes likely instead is
neither (Razin et al. 2024, arXiv 2410.08847). A fall of the better answers' log-probability by 5% is worth a warning.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.base.model import Base
from afina.config import EvalSettings, PreferenceOptions, TrainSettings
from afina.data.preferences import PAIRS, as_labels, read_preferences
from afina.data.template import Renderer
from afina.delta.files import adapter_folder, load_adapter, read_story
from afina.delta.opening import Opened
from afina.errors import DataError, SettingsError, counted
from afina.judge.losses import BATCH_TOKENS, general_loss
from afina.objective.choices import ChoiceTask, PreferenceTask, make_choices
from afina.objective.preference import COMPARED, preference_options
from afina.objective.reference import Reference, choose_reference
from afina.objective.reward import RewardTask
from afina.route.invocation import Route

HELD_OUT = "held_out.jsonl"
BEGIN_EQUAL = ("accuracy", "margin", "z", "chosen_reward", "rejected_reward", "calibration_error")
FALL = 0.05  # share of the log-probability


def wilson(wins: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share of `of` (at least one) trials. Wilson 1927, J. Am. Stat. Assoc. 22, 209."""
    z, share = 1.959964, wins / of
    middle, reach = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - reach) / (1 + z * z / of), (middle + reach) / (1 + z * z / of)


def judge_preferences(task: ChoiceTask, objective: str, before: Route | None, after: Route | None) -> dict[str, Any]:
    """Facts about the held-out rows under both routes, the reference, and sentences ("verdict").

    Log-probabilities and lengths are those of whole answers, in nats and tokens.
    """
    facts: dict[str, Any] = {"before": task.facts(before), "after": task.facts(after), "rows": len(task.held)}
    if objective in (*COMPARED, "reward"):  # there everything begins equal: nobody is preferred
        facts["before"] = {name: value for name, value in facts["before"].items() if name not in BEGIN_EQUAL}
    reference = getattr(task, "reference", None)
    said = [_who_wins(facts, objective), *displaced(facts, objective)]
    if objective == "reward":
        said.append(_calibrated(facts))
    return facts | ({"reference": reference.about()} if reference is not None else {}) | {"verdict": said}


def _who_wins(facts: dict[str, Any], objective: str) -> str:
    rows = counted(facts["rows"], "held-out answer" if objective == "kto" else "held-out pair")
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
    return f"Its probabilities are off by {error:.1f} points on average (expected calibration error)."


def displaced(facts: dict[str, Any], objective: str) -> list[str]:
    """A warning with a remedy where the better answers have become less likely; nothing else."""
    names = "before", "after"
    chosen = [facts[name].get("chosen_logp") for name in names]
    if None in chosen or chosen[1] - chosen[0] >= -FALL * abs(chosen[0]):
        return []
    rejected = [facts[name].get("rejected_logp", float("nan")) for name in names]
    remedies = {
        "dpo": "`sft: 0.2` among the options, `loss: ipo`, ", "simpo": "`sft: 0.2` among the options, ",
        "kto": "a larger `good_weight` among the options, ", "orpo": "a smaller `beta` among the options, ",
    }  # fmt: skip
    return [
        f"Warning: the better answers themselves became less likely ({chosen[0]:.1f} to {chosen[1]:.1f} nats an answer, the "
        f"worse ones {rejected[0]:.1f} to {rejected[1]:.1f}): likelihood displacement. Try {remedies[objective]}or a lower "
        "learning rate."
    ]


def held_out_file(settings: EvalSettings) -> Path:
    """The held-out rows of a run; raises `SettingsError` or `DataError` where there are none."""
    if settings.run is None:
        raise SettingsError("nothing to judge on", where="data", hint="--data FILE, or --run RUN for its own held-out rows")
    kept = settings.run / HELD_OUT
    if not kept.is_file():
        raise DataError("this folder has no held-out rows of its own", where=str(settings.run), hint="--data FILE")
    return kept


def evaluate_preferences(opened: Opened, settings: EvalSettings) -> dict[str, Any]:
    """`afina eval` of a run that learned preferences, on its held-out rows or on others: facts, loss and sentences."""
    base, story = opened.base, opened.run
    assert isinstance(base, Base)
    adapter = opened.adapters[0][0] if opened.adapters else None
    told = {name: value for name, value in story["settings"].items() if name in TrainSettings.model_fields}
    trained = TrainSettings(**told | {"objective": story["objective"]})
    objective = trained.objective
    own = settings.data is None
    table = read_preferences(held_out_file(settings) if own else Path(str(settings.data)), {} if own else settings.columns)
    rows = as_labels(table.rows) if objective == "kto" and table.format == PAIRS else table.rows
    if objective != "kto" and table.format != PAIRS:
        raise DataError(f"{objective} compares two answers to one prompt", where=str(table.path), hint="chosen and rejected")
    renderer = Renderer(base.tokenizer, opened.template, trained.max_length or min(base.context, 2048))
    invocation = adapter.spec.invocation if adapter is not None else ()
    choices = [choice for _, choice in make_choices(renderer, rows, None, invocation, objective == "kto")]
    packing = (BATCH_TOKENS, 1, trained.seed)
    task: ChoiceTask
    before, reference = _reference(opened, trained, preference_options(trained), story)
    if objective == "reward":
        task = RewardTask(base, choices, choices, *packing)
    else:
        task = PreferenceTask(objective, preference_options(trained), base, choices, choices, *packing)
        task.reference = reference
    found = judge_preferences(task, objective, before, opened.route)
    result: dict[str, Any] = {"base": base.name, "run": str(settings.run), "rows": len(rows), "objective": objective}
    for when, route in (("before", before), ("after", opened.route)):
        result[when] = {"loss": task.held_out_loss(route), "general_loss": general_loss(base, route)} | found[when]
    result["forgetting"] = result["after"]["general_loss"] - result["before"]["general_loss"]
    return result | {"reference": found.get("reference"), "verdict": found["verdict"]}


def _reference(
    opened: Opened, trained: TrainSettings, options: PreferenceOptions, story: Mapping[str, Any]
) -> tuple[Route | None, Reference | None]:
    """What a run was compared with, loaded again: the adapter that it went on from, where it did, and the reference."""
    before, digest = started_from(opened, trained, story["preferences"].get("start"))
    compared = trained.objective in COMPARED
    return before, choose_reference(options, before, digest, 0.0) if compared else None


def started_from(opened: Opened, trained: TrainSettings, expected: str | None) -> tuple[Route | None, str | None]:
    """The adapter that a run went on from, loaded again, and its hash; nothing where it began anew.

    Raises `DataError` where it is not the `expected` one any more.
    """
    start = trained.options.get("start")
    over = [opened.over] if opened.over is not None else []
    if start is None:
        return (over[0], opened.run["over"]) if over else (None, None)
    folder = adapter_folder(Path(str(start)))
    digest = str(read_story(folder).get("hash", ""))
    if digest != expected:
        why = f"its hash was {str(expected)[:12]}, and is {digest[:12]}"
        raise DataError("the adapter that the run went on from has changed", where=str(folder), why=why)
    route = load_adapter(folder, opened.base, "start").route
    return Route.together([route, *over]), digest
