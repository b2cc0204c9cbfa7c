"""Results of `afina eval` and `afina generate`, and the rows that run cards share with them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.errors import pluralize
from afina.io.result import Content, Result, ResultTable, ResultText, next_command, optional
from afina.io.translation import Verbatim

TableRows = list[tuple[str, ...]]

LOSS_LABELS = {
    "loss": "eval loss, nats per token",
    "perplexity": "perplexity",
    "retention_loss": "retention loss, nats per token",
}
REWARD_LABELS = {
    "length": "length (tokens)",
    "stop_ratio": "stop ratio",
    "sampled_reward": "reward of sampled completions",
    "kl": "KL divergence from the reference (nats per token)",
    "entropy": "entropy (nats per token)",
    "retention_loss": "retention loss (nats per token)",
}
PREFERENCE_LABELS = {
    "rewards/accuracies": "chosen completion preferred",
    "rewards/margins": "margin of rewards",
    "logps/chosen": "log-probability of the chosen completion (nats)",
    "logps/rejected": "log-probability of the rejected completion (nats)",
    "chosen_length": "length of the chosen completion (tokens)",
    "rejected_length": "length of the rejected completion (tokens)",
    "calibration_error": "calibration error",
}
RATIOS = ("rewards/accuracies", "calibration_error")
LABEL_SCORES = {  # of several labels a row, of rankings, and of numbers
    "ndcg_at_10": ("nDCG@10", "{:.1f}%"),
    "mrr_at_10": ("MRR@10", "{:.1f}%"),
    "accuracy_at_1": ("accuracy@1", "{:.1f}%"),
    "word_accuracy": ("word accuracy", "{:.1f}%"),
    "precision": ("precision", "{:.1f}%"),
    "recall": ("recall", "{:.1f}%"),
    "accuracy": ("accuracy", "{:.1f}%"),
    "average_precision": ("average precision", "{:.1f}%"),
    "f1": ("micro F1", "{:.1f}%"),
    "macro_f1": ("macro F1", "{:.1f}%"),
    "exact": ("exact rows", "{:.1f}%"),
    "pearson": ("Pearson", "{:.3f}"),
    "spearman": ("Spearman", "{:.3f}"),
    "mae": ("mean absolute error", "{:.4g}"),
    "rmse": ("RMSE", "{:.4g}"),
}
MAX_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class EvalResult(Result):
    """Evaluation of a base and, in `after`, of the adapter on it; keys depend on the objective."""

    base: str
    run: str | None
    rows: int
    objective: str | None = optional()
    before: Mapping[str, Any] | None = optional()
    after: Mapping[str, Any] | None = optional()
    forgetting: float | None = optional()
    loss: float | None = optional()
    classes: Mapping[str, Any] | None = optional()
    wins: int | None = optional()
    losses: int | None = optional()
    ties: int | None = optional()
    win_rate: float | None = optional()
    interval: Sequence[float] | None = optional()
    reference: Mapping[str, Any] | None = optional()
    reward_functions: Sequence[Mapping[str, Any]] | None = optional()
    examples: Sequence[Mapping[str, Any]] | None = optional()
    score: Mapping[str, Any] | None = optional()
    verdict: Sequence[str] | None = optional()
    next_command: str | None = optional()

    def content(self) -> list[Content]:
        """Return what was measured before and after, examples, the verdict and the next command."""
        return [
            *self._measured(),
            *(ResultText(f"- {sentence}") for sentence in self.verdict or ()),
            *next_command(self.next_command),
        ]

    def _measured(self) -> list[Content]:
        if self.classes is not None:
            return class_scores(self.classes, "eval row")
        if self.reward_functions is not None:
            title = f"completions of {pluralize(self.rows, 'prompt')}"
            return [ResultTable(title, reward_rows(self), ("", "before", "after"))]
        if "rewards/accuracies" in (self.after or ()):
            return preferences(self)
        return self._losses_and_examples()

    def _losses_and_examples(self) -> list[Content]:
        columns = {"base": self.before, "with the adapter": self.after}
        sides = {name: side for name, side in columns.items() if side is not None}
        rows = [
            (LOSS_LABELS.get(name, f"{name}, %"), *(f"{side[name]:.3f}" for side in sides.values()))
            for name, value in (self.before or {}).items()
            if isinstance(value, float)
        ]
        table = ResultTable(pluralize(self.rows, "row"), rows, ("", *sides))
        return [table, *example_tables(self.examples or ())]


@dataclass(frozen=True, eq=False)
class GenerateResult(Result):
    """Completions of prompts; of a classifier the class with its probability (`share`, 0 to 1).

    Of an encoder, the nearest eval text, its cosine (`similarity`) and the vector (`embedding`).
    """

    base: str
    adapter: str | None
    answers: Sequence[Mapping[str, Any]]

    def content(self) -> list[Content]:
        """Return the texts, one a line."""
        return [ResultText(one["text"] + "".join(_notes(one)), wraps=False) for one in self.answers]


def _notes(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the probability of a class, or the cosine of a text."""
    if "share" in answer:
        yield f"  ({100 * answer['share']:.1f}%)"
    if "similarity" in answer:
        yield f"  (cosine {answer['similarity']:.3f})"


def reward_rows(found: Mapping[str, Any]) -> TableRows:
    """Return rows (what, before, after) about the completions of eval prompts."""
    before, after = found["before"], found["after"]
    parts = {
        name: f"reward, {name.removeprefix('reward_')}"
        for name in after
        if name.startswith("reward_")
    }
    labels = {"reward": "reward", **parts, **REWARD_LABELS}
    return [
        (label, f"{before[name]:.3f}", f"{after[name]:.3f}")
        for name, label in labels.items()
        if name in after
    ]


def preference_rows(found: Mapping[str, Any]) -> TableRows:
    """Return rows (label, before, after) of eval preferences or scores; cells may be empty."""
    rows: TableRows = []
    forms = {
        name: (label, "{:.1%}" if name in RATIOS else "{:.3f}")
        for name, label in PREFERENCE_LABELS.items()
    }
    for name, (label, form) in (forms | LABEL_SCORES).items():
        if name in found["after"]:
            sides = (found["before"].get(name), found["after"][name])
            rows.append((label, *("" if side is None else form.format(side) for side in sides)))
    return rows


def preferences(found: Mapping[str, Any]) -> list[Content]:
    """Return the table of eval preferences or of scores, and what the policy was compared with."""
    title = pluralize(found["rows"], "eval row")
    table = ResultTable(title, preference_rows(found), ("", "before", "after"))
    return [table, *reference_line(found.get("reference"))]


def reference_line(reference: Mapping[str, Any] | None) -> list[Content]:
    """Return the line that names the reference policy and why it is the reference."""
    if not reference:
        return []
    return [ResultText(f"reference policy: {reference['of']}: {reference['why']}")]


def class_scores(classes: Mapping[str, Any], row_kind: str) -> list[Content]:
    """Return the scores on `row_kind` rows, and a table of entities or where the confusion is."""
    if "confusion" not in classes:
        shown = [
            f"{label} {form.format(classes[name])}"
            for name, (label, form) in LABEL_SCORES.items()
            if classes.get(name) is not None
        ]
        line = ResultText(f"{', '.join(shown)} on {pluralize(classes['rows'], row_kind)}")
        return [line, *_entity_table(classes.get("entities") or {})]
    return [
        ResultText(
            f"accuracy {classes['accuracy']:.1f}%, F1 {classes['f1']:.1f}% "
            f"on {pluralize(classes['rows'], row_kind)}; confusion matrix: {classes['picture']}"
        )
    ]


def _entity_table(entities: Mapping[str, Mapping[str, float]]) -> list[Content]:
    """Return the table of the scores of each type of entity."""
    names = ("precision", "recall", "f1")
    rows = [
        (kind, *(f"{found[name]:.1f}%" for name in names), f"{found['count']:,}")
        for kind, found in entities.items()
    ]
    head = ("entity", "precision", "recall", "F1", "in the eval rows")
    return [ResultTable("", rows, head)] if rows else []


def example_tables(examples: Sequence[Mapping[str, Any]]) -> list[Content]:
    """Return a table for each of the first examples: prompt, expected, base and adapter."""
    labels = {"prompt": "prompt", "expected": "expected", "before": "base", "after": "adapter"}
    return [
        ResultTable(
            "", [(label, Verbatim(one[name])) for name, label in labels.items() if name in one]
        )
        for one in examples[:MAX_EXAMPLES]
    ]
