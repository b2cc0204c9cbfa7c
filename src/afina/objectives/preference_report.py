"""The report of preference objectives: accuracy, margins and likelihood displacement, with sentences.

Likelihood displacement: both completions become less likely and only their distance grows; what
becomes likely instead is neither (Razin et al. 2024, arXiv 2410.08847). A fall of the better
completions' log-probability by 5% is reported as a warning.
"""

from typing import TYPE_CHECKING, Any

from afina.errors import pluralize

if TYPE_CHECKING:
    from afina.objectives.preference import PairwiseObjective

EQUAL_AT_START = (
    "accuracy",
    "margin",
    "z",
    "chosen_reward",
    "rejected_reward",
    "calibration_error",
)
DISPLACEMENT_RATIO = 0.05  # of the log-probability
DISPLACEMENT_HINTS = {
    "dpo": "`sft_weight: 0.2`, `loss_type: ipo`, ",
    "simpo": "`sft_weight: 0.2`, ",
    "kto": "a larger `desirable_weight`, ",
    "orpo": "a smaller `beta`, ",
}


def preference_report(
    objective: "PairwiseObjective", before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """Return the metrics before and after, the reference, and sentences as `verdict`.

    Log-probabilities and lengths are those of complete answers, in nats and tokens.
    """
    if objective.needs_reference or objective.head:  # with those, nothing is preferred at the start
        before = {name: value for name, value in before.items() if name not in EQUAL_AT_START}
    facts: dict[str, Any] = {"before": before, "after": after, "rows": len(objective.eval_rows)}
    sentences = [
        _accuracy_sentence(objective, facts),
        *displacement_warning(facts, objective.name),
    ]
    if objective.head:
        error = 100 * after["calibration_error"]
        sentences.append(
            f"Its probabilities are off by {error:.1f} points on average "
            "(expected calibration error)."
        )
    if objective.reference is not None:
        facts["reference"] = objective.reference.to_dict()
    return facts | {"verdict": sentences}


def _accuracy_sentence(objective: "PairwiseObjective", facts: dict[str, Any]) -> str:
    rows = pluralize(facts["rows"], "held-out answer" if objective.single else "held-out pair")
    share = f"{100 * facts['after']['accuracy']:.1f}% of {rows}"
    if objective.single:
        return (
            f"It tells good answers from bad ones on {share}: the former became likelier, "
            "the latter less likely."
        )
    margin = f"the mean margin is {facts['after']['margin']:+.3f}"
    if objective.head:
        return f"It gives the better answer the higher reward on {share}; {margin}."
    then = facts["before"].get("accuracy")
    before = "more than the reference does" if then is None else f"before, on {100 * then:.1f}%"
    return f"It prefers the better answer on {share} ({before}); {margin}."


def displacement_warning(facts: dict[str, Any], objective: str) -> list[str]:
    """Return a warning with a hint where the better completions became less likely, or nothing."""
    names = "before", "after"
    chosen = [facts[name].get("chosen_logp") for name in names]
    if None in chosen or chosen[1] - chosen[0] >= -DISPLACEMENT_RATIO * abs(chosen[0]):
        return []
    rejected = [facts[name].get("rejected_logp", float("nan")) for name in names]
    return [
        "Warning: the better answers themselves became less likely "
        f"({chosen[0]:.1f} to {chosen[1]:.1f} nats an answer, the worse ones {rejected[0]:.1f} "
        f"to {rejected[1]:.1f}): likelihood displacement. Try "
        f"{DISPLACEMENT_HINTS.get(objective, '')}or a lower learning rate."
    ]
