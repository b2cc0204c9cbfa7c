"""Reranking: the relevance of a passage to a query, from both as one sequence (a cross-encoder).

loss = - sum over rows of  y log p + (1 - y) log (1 - p)   /   rows        p = sigmoid(score)

The label y is 0 or 1, or a share between them. A base with one output, such as a published
reranker, keeps its head; for others a head is new and begins as a linear probe.

Reference: Nogueira and Cho 2019, arXiv 1901.04085.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import Adapter
from afina.adapters.load_run import LoadedRun
from afina.data.schemas import RELEVANCE, LabeledRow
from afina.data.several_files import mix_rows
from afina.data.table import read_table
from afina.data.truncation import CutRows
from afina.errors import DataError
from afina.models.classifier import RELEVANCE_TASK, Classifier, load_classifier
from afina.objectives.base import Units
from afina.objectives.classification import ClassificationObjective, show_example
from afina.objectives.labeled_data import check_encoder_settings, tokenize_labeled_rows
from afina.objectives.padded import EVAL_BATCH_TOKENS
from afina.objectives.prepared import (
    PreparedData,
    describe_cut_rows,
    describe_data,
    eval_source,
    trained_settings,
)
from afina.objectives.ranking_scores import RankedItems, ranking_scores
from afina.objectives.registry import register_objective
from afina.objectives.run_rows import read_files, split_eval_rows
from afina.objectives.task_score import TaskScore
from afina.settings import EvalSettings, TrainSettings
from afina.settings.objectives import RerankSettings

OUTPUT = "relevance"  # name of the only output
START_SCORES = ("ndcg_at_10", "accuracy")  # recorded before the first step


@register_objective("rerank")
class RerankingObjective(ClassificationObjective):
    """Binary cross-entropy of one score for each query with a passage."""

    schema = "relevance"
    units = Units("row", "")
    settings_class = RerankSettings  # type: ignore[assignment]

    @classmethod
    def prepare(cls, settings: TrainSettings, base: Classifier | None = None) -> PreparedData:
        """Read, tokenize, check and split the rows, a query on one side; load the base."""
        check_encoder_settings(settings)
        options = settings.group("rerank")
        table = read_files(settings, RELEVANCE)
        skipped = list(table.skipped)
        rows, eval_labeled = split_eval_rows(
            settings, table, RELEVANCE, lambda row: row.content, skipped
        )
        base = base or load_classifier(
            settings.base,
            (OUTPUT,),
            False,
            settings.revision,
            settings.trust_remote_code,
            settings.dtype,
            settings.load_device,
            RELEVANCE_TASK,
        )
        leave_out = skipped if settings.skip_bad_rows else None
        length = settings.max_length or min(base.max_positions, 512)
        cut_rows = CutRows() if settings.truncate else None
        train, eval_rows = (
            tokenize_labeled_rows(
                base, _scaled(some, options.max_score), length, leave_out, cut_rows
            )
            for some in (rows, eval_labeled)
        )
        train = mix_rows(train, table.files, settings.seed)
        tokens, accumulation = settings.max_tokens_per_batch, settings.gradient_accumulation_steps
        task = cls(base, train, eval_rows, tokens, accumulation, settings.seed)
        task.options = options
        facts = {"labels": [OUTPUT], "task": RELEVANCE_TASK, "pairs": True}
        return PreparedData(
            task=task,
            data_info=describe_data(table, task) | describe_cut_rows(cut_rows) | facts,
            skipped=skipped,
            show=partial(show_example, task),
            eval_records=[
                {"query": r.content, "passage": r.pair, "label": r.label} for r in eval_labeled
            ],
            modules_to_save=base.new_modules,
            max_length=length,
            counts={"train": len(train), "held_out": len(eval_rows)} | describe_cut_rows(cut_rows),
        )

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "RerankingObjective":
        """Return the objective with the rows that `afina eval` evaluates."""
        base: Any = opened.base
        file, columns = eval_source(settings)
        trained = trained_settings(opened.run)
        labeled = _scaled(
            read_table(file, RELEVANCE, columns).rows, trained.group("rerank").max_score
        )
        length = trained.max_length or min(base.max_positions, 512)
        cut_rows = CutRows() if trained.truncate else None
        rows = tokenize_labeled_rows(base, labeled, length, None, cut_rows)
        objective = cls(base, rows, rows, EVAL_BATCH_TOKENS, 1, 0)
        objective.num_rows = len(rows)
        return objective

    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return the loss of the eval rows, the scores of all, and those of each query's ranking.

        A query counts in rankings if it has several passages, and one of them is relevant.
        """
        logits, loss = self.row_logits(self.eval_rows, active)
        targets = [row.target for row in self.eval_rows]
        rankings = self._rankings(logits[:, 0])
        scores = ranking_scores(rankings) | self.task.scores(logits, targets)
        scores |= {"queries": len(rankings), "rows": len(targets), "task": self.task.kind}
        return {"loss": loss, "classes": scores}

    def _rankings(self, scores: Tensor) -> list[RankedItems]:
        """Return the ranking of each query's passages."""
        by_query: dict[str, list[int]] = {}
        for number, row in enumerate(self.eval_rows):
            by_query.setdefault(row.query, []).append(number)
        found = []
        for numbers in by_query.values():
            gains = [self.eval_rows[number].target[0] for number in numbers]
            relevant = [index for index, gain in enumerate(gains) if gain > 0]
            if relevant and len(numbers) > 1:
                found.append(
                    RankedItems.of(scores[numbers], relevant, [gains[n] for n in relevant])
                )
        return found

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Return the scores after training and, in a run, those before the first step."""
        scores, name = after["classes"], "ndcg_at_10"
        score = None
        if name in scores:
            score = TaskScore(
                "nDCG@10",
                scores[name],
                scores["queries"],
                self.probe.get(name),
                counts_right=False,
                row_kind="eval query",
            )
        start = {"probe": self.probe} if self.probe else {}
        return {**scores, **start, "score": score, "verdict": []}

    def initialize(self, adapter: Adapter) -> float | None:
        """Set a new head to the probe, and record the scores before the first step."""
        if self.base.new_modules and not self.fit_head(adapter):
            return None
        before = self.evaluate(adapter.active)
        scores: Mapping[str, Any] = before["classes"]
        numbers = {name: scores[name] for name in START_SCORES if name in scores}
        self.probe = {"loss": before["loss"], **numbers}
        return float(before["loss"])


def _scaled(rows: Sequence[LabeledRow], max_score: float) -> Iterator[LabeledRow]:
    """Yield rows with labels divided by `max_score`; raises `DataError` outside 0 to 1."""
    for row in rows:
        assert isinstance(row.label, float)
        if not 0 <= row.label <= max_score:
            raise DataError(
                f"the label {row.label:g} is outside 0 to {max_score:g}",
                where=f"{row.where}:label",
                hint="--rerank.max-score N, where N is the highest score there is",
            )
        yield replace(row, label=row.label / max_score)
