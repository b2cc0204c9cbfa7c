"""Verdict on a run, in sentences: is the task learned, why not, does it overfit, what is forgotten.

The task's own score decides; the loss is reported too, and decides where there is no score. The
thresholds are rules of thumb, defined here once: a change under 0.02 nats per token counts as
none; an eval loss that improved less than the train loss by 15% of itself is overfitting. Where the
rows are too few for a sentence (its 95% confidence interval includes the opposite), the verdict
says nothing else.
"""

import math
from dataclasses import dataclass

from afina.errors import pluralize
from afina.evaluation.cause import Cause, RunFigures, find_cause
from afina.evaluation.intervals import LossChange
from afina.objectives.base import Units
from afina.objectives.task_score import MIN_DECISIVE_ROWS, TaskScore

MIN_LOSS_CHANGE = 0.02  # nats per token
OVERFIT_RATIO = 0.15
LEARNED_RATIO = 0.5  # fall of the train loss from which few rows count as learned

# Rise of the perplexity of general text, with the word for it. What a rise means follows from the
# scaling law L = E + 406 / N^0.34 + ...: half as many parameters cost 8% at 2 billion and 20% at
# 135 million; there, a quarter of them costs 52% and an eighth 105%.
# Hoffmann et al. 2022, arXiv 2203.15556, equation 10.
FORGETTING_LEVELS = (
    (0.05, "No forgetting"),
    (0.15, "Slight forgetting"),
    (0.5, "Marked forgetting"),
    (1.0, "Strong forgetting"),
    (math.inf, "Severe forgetting"),
)
MORE_EVAL_ROWS = "Use more eval rows: a larger --eval-size, or --eval-data FILE."


@dataclass(frozen=True)
class LossReport:
    """Mean losses in nats per token (or row) before and after training, on eval and training rows.

    `eval_change` and `train_change` are changes row by row, which have intervals; they may be of
    some of the `eval_rows` only. Classifiers and encoders have no retention loss.
    """

    eval_loss_before: float
    eval_loss_after: float
    train_loss_before: float
    train_loss_after: float
    eval_change: LossChange
    train_change: LossChange
    eval_rows: int
    retention_loss_before: float | None = None
    retention_loss_after: float | None = None
    best_step: int = 0
    last_step: int = 0

    @property
    def forgetting(self) -> float | None:
        """Rise of the loss on general text, in nats per token; negative where it fell."""
        if self.retention_loss_before is None or self.retention_loss_after is None:
            return None
        return self.retention_loss_after - self.retention_loss_before

    @property
    def has_few_rows(self) -> bool:
        """Whether the eval rows are too few for any statement."""
        return self.eval_rows < MIN_DECISIVE_ROWS

    @property
    def eval_improved(self) -> bool:
        """Whether the eval loss improved: by more than nothing, and its interval excludes 0."""
        interval = self.eval_change.interval
        improved = self.eval_change.mean <= -MIN_LOSS_CHANGE
        return improved and interval is not None and interval[1] < 0

    @property
    def widened_gap(self) -> LossChange:
        """How much more the train loss fell than the eval loss."""
        return self.eval_change.minus(self.train_change)

    @property
    def overfits(self) -> bool:
        """Whether the gap between train and eval loss widened beyond its limit and its noise."""
        gap = self.widened_gap
        return gap.mean > self.gap_limit and gap.interval is not None and gap.interval[0] > 0

    @property
    def gap_limit(self) -> float:
        """Widening of the gap from which it counts as overfitting, in nats."""
        return max(MIN_LOSS_CHANGE, OVERFIT_RATIO * self.eval_loss_after)


@dataclass(frozen=True)
class Verdict:
    """Sentences on a run, those on forgetting separately, and the cause of what was not learned."""

    sentences: list[str]
    forgetting: list[str]
    cause: Cause | None = None


def verdict(
    losses: LossReport,
    units: Units,
    score: TaskScore | None = None,
    train_score: TaskScore | None = None,
    figures: RunFigures | None = None,
) -> Verdict:
    """Return what was learned, the cause of what was not, overfitting, and forgetting if measured.

    Args:
        losses: The losses.
        units: What they are means over.
        score: The task's own score on eval rows.
        train_score: The same on training rows, where the eval rows are few.
        figures: The run's curve and settings; without them there is no cause.
    """
    loss = _loss_sentence(losses, units)
    sentences = [loss] if score is None else [score_sentence(score, losses), loss]
    if losses.has_few_rows:
        sentences = _few_sentences(losses, units, score, train_score)
    cause = None
    if figures is not None and not is_learned(losses, score, train_score):
        cause = find_cause(figures)
        sentences.append(cause.sentence)
    if not losses.has_few_rows:
        sentences.append(_overfitting_sentence(losses, units.unit))
    forgetting = []
    if losses.retention_loss_before is not None and losses.retention_loss_after is not None:
        sides = losses.retention_loss_before, losses.retention_loss_after
        forgetting = [forgetting_sentence(*sides)]
    return Verdict(sentences, forgetting, cause)


def is_learned(
    losses: LossReport, score: TaskScore | None, train_score: TaskScore | None = None
) -> bool:
    """Return whether the task is learned: by its score, else by the eval loss.

    With few eval rows the training rows decide: what was not learned there is nowhere.
    """
    if losses.has_few_rows:
        if train_score is not None and train_score.counts_right:
            return train_score.mostly_right
        return losses.train_loss_after <= LEARNED_RATIO * losses.train_loss_before
    if score is None or score.outcome == "unknown":
        return losses.eval_improved
    return score.outcome == "better" and score.mostly_right


def score_sentence(score: TaskScore, losses: LossReport | None = None) -> str:
    """Return the sentence on the task's own score, which decides whether the task is learned."""
    measured = score.sentence()
    if score.outcome == "too few":
        return f"Too few eval rows to tell: {measured}. {MORE_EVAL_ROWS}"
    if score.counts_right and score.after == 0:
        though = ", although eval loss improved" if losses and losses.eval_improved else ""
        return f"Not yet right: {measured}; no answer is right{though}."
    if score.outcome == "better":
        if score.mostly_right:
            return f"Learned: {measured}."
        return f"Partly learned: {measured}; most rows are still wrong."
    if score.outcome == "worse":
        return f"Worse than before: {measured}."
    if score.outcome == "unknown":
        return f"Score: {measured}."
    return f"No clear change: {measured}; the interval includes no change."


def _few_sentences(
    losses: LossReport, units: Units, score: TaskScore | None, train_score: TaskScore | None
) -> list[str]:
    """Return what few eval rows show, without a judgement, and what the training rows show."""
    parts = (
        [] if score is None else [f"{score.name} {' to '.join(filter(None, score.cells()[1:]))}"]
    )
    sides = losses.eval_loss_before, losses.eval_loss_after
    parts.append(f"eval loss {_sides(*sides)} nats per {units.unit}")
    rows = pluralize(losses.eval_rows, "eval row")
    few = f"Too few eval rows to tell ({rows}): {', '.join(parts)}. {MORE_EVAL_ROWS}"
    fell = _sides(losses.train_loss_before, losses.train_loss_after)
    trained = f"loss {fell} nats per {units.unit}"
    if train_score is not None:
        trained = f"{train_score.sentence()}, {trained}"
    return [few, f"On training rows: {trained}."]


def _sides(before: float, after: float) -> str:
    return f"{before:.3f} to {after:.3f}"


def _loss_sentence(losses: LossReport, units: Units) -> str:
    """Return the sentence on eval loss; a change counts if its interval excludes 0."""
    change, interval = losses.eval_change.mean, losses.eval_change.interval
    rows = pluralize(losses.eval_rows, "eval row")
    measured = f"{change:+.3f} nats per {units.unit}"
    if interval is None:
        return f"Too few to tell whether eval loss changed: {measured} on {rows}. {MORE_EVAL_ROWS}"
    low, high = interval
    measured += f" (95% CI {low:+.3f} to {high:+.3f}, {rows})"
    if low <= 0.0 <= high and max(-low, high) > MIN_LOSS_CHANGE:
        return f"Too few to tell whether eval loss changed: {measured}. {MORE_EVAL_ROWS}"
    if abs(change) < MIN_LOSS_CHANGE:
        return f"Eval loss hardly changed: {measured}."
    if change > 0:
        return f"Eval loss got worse: {measured}."
    improved = f"Eval loss improved by {-change:.3f} nats per {units.unit} "
    improved += f"(95% CI {-high:.3f} to {-low:.3f}, {rows})"
    if not units.choices:
        return f"{improved}."
    before, after = (
        f"{math.exp(loss):.2f}" if loss < 20 else f"e^{loss:.0f}"
        for loss in (losses.eval_loss_before, losses.eval_loss_after)
    )
    return f"{improved}; perplexity {before} to {after}."


def _overfitting_sentence(losses: LossReport, unit: str) -> str:
    """Return the sentence on overfitting: the gap that training widened, not the gap itself.

    Eval rows may have been harder than training rows from the start.
    """
    gap, limit = losses.widened_gap, losses.gap_limit
    is_earlier = losses.best_step < losses.last_step
    note = f" The best state, of step {losses.best_step}, was kept." if is_earlier else ""
    trained, new = -losses.train_change.mean, -losses.eval_change.mean
    fell = f"train loss fell by {trained:.3f}, eval loss by {new:.3f} nats per {unit}"
    if gap.interval is None:
        return f"Too few to tell whether it overfits: {fell}.{note}"
    if losses.overfits:
        return f"It overfits: {fell}.{note}"
    if gap.mean > limit:
        return f"Too few to tell whether it overfits: {fell}; rows vary by more than that.{note}"
    if gap.interval[1] > limit:
        return f"No sign of overfitting, but too few eval rows to be sure: {fell}.{note}"
    return f"No overfitting: eval loss fell about as much as train loss.{note}"


def forgetting_sentence(before: float, after: float) -> str:
    """Return the sentence on the loss on general text (nats per token) before and after."""
    rise = math.expm1(min(after - before, 20.0))  # beyond that the figure no longer matters
    kind = next(word for limit, word in FORGETTING_LEVELS if rise < limit)
    form = ".1f" if abs(rise) < 0.1 else ".0f"
    sentence = f"{kind}: retention loss {_sides(before, after)} nats per token"
    sentence += f", the perplexity of general text {100 * rise:+{form}}%."
    if rise < FORGETTING_LEVELS[0][0]:
        return sentence
    return (
        f"{sentence} Fewer steps, a lower learning rate or rank, or general rows in the training "
        "data reduce it."
    )
