"""Report of preference objectives: accuracy, margins and likelihood displacement, in sentences.

Likelihood displacement: both completions become less likely and only their distance grows; what
becomes likely instead is neither (Razin et al. 2024, arXiv 2410.08847). A fall of the chosen
completions' log-probability by 5% is reported as a warning.
"""

from typing import TYPE_CHECKING, Any

from afina.objectives.task_score import TaskScore

if TYPE_CHECKING:
    from afina.objectives.preference import PairwiseObjective

EQUAL_AT_START = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "z",
    "calibration_error",
)
DISPLACEMENT_RATIO = 0.05  # of the log-probability


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
        *_margin_sentences(objective, facts),
        *displacement_warning(facts, objective.displacement_hint),
    ]
    if objective.head:
        error = 100 * after["calibration_error"]
        sentences.append(
            f"Expected calibration error of its probabilities: {error:.1f} percentage points."
        )
    if objective.reference is not None:
        facts["reference"] = objective.reference.to_dict()
    return facts | {"verdict": sentences, "score": _score(objective, facts)}


def _score(objective: "PairwiseObjective", facts: dict[str, Any]) -> TaskScore:
    """Return the preference accuracy; half of all pairs are right by chance."""
    rows, then = facts["rows"], facts["before"].get("rewards/accuracies")
    return TaskScore.of_counts(
        "reward accuracy" if objective.head else "preference accuracy",
        round(rows * facts["after"]["rewards/accuracies"]),
        rows,
        None if then is None else 100 * then,
        chance=50.0,
        row_kind="eval completion" if objective.single else "eval pair",
    )


def _margin_sentences(objective: "PairwiseObjective", facts: dict[str, Any]) -> list[str]:
    """Return the mean margin, and what the accuracy compares; single completions have no margin."""
    if objective.single:
        return ["Right: a desirable completion became more likely, an undesirable one less likely."]
    is_relative = facts["before"].get("rewards/accuracies") is None and not objective.head
    against = ", relative to the reference" if is_relative else ""
    return [f"Mean margin of the rewards{against}: {facts['after']['rewards/margins']:+.3f}."]


def displacement_warning(facts: dict[str, Any], hint: str) -> list[str]:
    """Return a warning where the chosen completions became less likely, or nothing.

    Args:
        facts: Metrics `before` and `after`.
        hint: Settings that help, each followed by a comma.
    """
    names = "before", "after"
    chosen = [facts[name].get("logps/chosen") for name in names]
    if None in chosen or chosen[1] - chosen[0] >= -DISPLACEMENT_RATIO * abs(chosen[0]):
        return []
    rejected = [facts[name].get("logps/rejected", float("nan")) for name in names]
    return [
        "Warning: likelihood displacement: the chosen completions became less likely "
        f"({chosen[0]:.1f} to {chosen[1]:.1f} nats per completion, the rejected ones "
        f"{rejected[0]:.1f} to {rejected[1]:.1f}). Try {hint}or a lower learning rate."
    ]
