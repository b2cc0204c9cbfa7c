"""Who wins, how surely, and is the better answer itself becoming unlikely: preferences on held-out rows, before and after.

Likelihood displacement: both answers become less likely and only their distance grows; what becomes likely instead is
neither (Razin et al. 2024, arXiv 2410.08847). A fall of the better answers' log-probability by 5% is worth a warning.
"""

from typing import Any

from afina.errors import counted
from afina.objective.choices import ChoiceTask
from afina.route.invocation import Route

FALL = 0.05  # share of the log-probability


def judge_preferences(task: ChoiceTask, objective: str, before: Route | None, after: Route | None) -> dict[str, Any]:
    """Facts about the held-out rows under both routes, the reference, and sentences ("verdict")."""
    facts = {"before": task.facts(before), "after": task.facts(after), "rows": len(task.held)}
    reference = getattr(task, "reference", None)
    said = [_who_wins(facts, objective), *_displaced(facts, objective)]
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
    return f"It prefers the better answer on {share}; {margin} (before: {facts['before']['margin']:+.3f})."


def _calibrated(facts: dict[str, Any]) -> str:
    error = 100 * facts["after"]["calibration_error"]
    return f"Its probabilities are off by {error:.1f} points on average (expected calibration error)."


def _displaced(facts: dict[str, Any], objective: str) -> list[str]:
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
