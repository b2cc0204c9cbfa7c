"""Embeddings: texts that belong together get vectors of a high cosine.

pairs         loss = - sum over anchors of log softmax(scale * cos(anchor, candidate))[positive]
scored pairs  loss =   sum over pairs of (cos(first, second) - score)^2

The candidates are the positives and negatives of a micro-batch, each text once; the anchor itself
and its other positives are left out. Gradient accumulation adds up the gradients of micro-batches
and makes no negatives across them. An evaluation compares with the texts of all its rows instead,
so that it does not depend on the size of a batch.

References: Henderson et al. 2017, arXiv 1705.00652; Reimers and Gurevych 2019, arXiv 1908.10084.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.data.packing import BatchSampler, group_in_order
from afina.data.schemas import EMBEDDING, SCORED, EmbeddingRow
from afina.data.several_files import check_one_kind, mix_rows
from afina.data.table import Table, read_table
from afina.data.truncation import CutRows
from afina.errors import SettingsError
from afina.models.encoder import EMBEDDING_KEY, EmbeddingConfig, Encoder, load_encoder
from afina.models.loading import resolve_model_dir
from afina.objectives.base import LossSum, Units
from afina.objectives.label_tasks import regression_scores
from afina.objectives.labeled_data import check_encoder_settings
from afina.objectives.padded import PaddedObjective
from afina.objectives.prepared import (
    PreparedData,
    ShownExample,
    describe_cut_rows,
    describe_data,
    eval_source,
    trained_settings,
)
from afina.objectives.ranking_scores import RankedItems, ranking_scores
from afina.objectives.registry import register_objective
from afina.objectives.run_rows import read_files, split_eval_rows
from afina.objectives.task_score import TaskScore
from afina.objectives.text_pairs import (
    PairBatch,
    PairExample,
    PairTable,
    Tokens,
    known_positives,
    tokenize_pairs,
)
from afina.settings import TrainSettings
from afina.settings.eval import EvalSettings
from afina.settings.objectives import EmbedSettings

BY_QUERY = "ndcg_by_query"  # percent, for the interval of the change
EVAL_TOKENS = 8192  # of a forward pass without gradients
EVAL_SCORES = 1 << 22  # cosines that are computed at once


@register_objective("embed")
class EmbeddingObjective(PaddedObjective):
    """Contrastive loss with in-batch negatives on pairs, squared error of the cosine on scores."""

    schema = "embedding"
    units = Units("pair", "texts")
    report_key = EMBEDDING_KEY
    # On 300 pairs of text and code (MBPP) the eval loss of all-MiniLM-L6-v2 falls in two epochs
    # from 0.798 to 0.613 at a quarter of the full rate, and to 0.652 at a tenth.
    default_learning_rate_factor = 0.25
    settings_class = EmbedSettings
    base: Encoder

    def __init__(
        self,
        base: Encoder,
        train: Sequence[PairExample],
        eval_rows: Sequence[PairExample],
        batch_tokens: int,
        accumulate: int,
        seed: int,
        options: EmbedSettings | None = None,
    ) -> None:
        super().__init__(base, train, eval_rows, batch_tokens, accumulate, seed)
        self.options = options or EmbedSettings()
        # not sorted by length: negatives of the same length would be the same in each epoch
        lengths = [self.length(row) for row in train]
        if self.options.pairs_per_batch is not None:
            batch_tokens, lengths = self.options.pairs_per_batch, [1] * len(train)
        self._sampler = BatchSampler(train, batch_tokens, accumulate, seed, lengths)
        self.is_scored = eval_rows[0].score is not None
        if self.is_scored:
            self.units = Units("pair", "")
        self._known = known_positives(train, eval_rows)

    @classmethod
    def prepare(cls, settings: TrainSettings, base: Encoder | None = None) -> PreparedData:
        """Read, tokenize, check and split the pairs; load the base, unless it is given."""
        check_encoder_settings(settings)
        options = settings.group("embed")
        table = read_files(settings, EMBEDDING)
        check_one_kind(table, lambda format: "scores" if format == SCORED else "no scores")
        _check_options(options, table)
        skipped = list(table.skipped)
        rows, eval_rows = split_eval_rows(
            settings, table, EMBEDDING, lambda row: row.anchor, skipped
        )
        base = base or load_encoder(
            settings.base,
            _embedding_config(settings, options),
            settings.revision,
            settings.trust_remote_code,
            settings.dtype,
            settings.load_device,
        )
        length = settings.max_length or default_length(base)
        leave_out = skipped if settings.skip_bad_rows else None
        cut_rows = CutRows() if settings.truncate else None
        train, held_out = (
            tokenize_pairs(base, some, length, options.max_score, leave_out, cut_rows)
            for some in (rows, eval_rows)
        )
        train = mix_rows(train, table.files, settings.seed)
        budget, accumulate = settings.max_tokens_per_batch, settings.gradient_accumulation_steps
        task = cls(base, train, held_out, budget, accumulate, settings.seed, options)
        tokens = sum(map(task.length, train))
        batches = task.steps_per_epoch * accumulate
        size = {} if task.is_scored else {"pairs_per_batch": -(-len(train) // batches)}
        return PreparedData(
            task=task,
            data_info=describe_data(table, task)
            | describe_cut_rows(cut_rows)
            | {EMBEDDING_KEY: base.embedding.record()},
            skipped=skipped,
            show=partial(_show, base),
            eval_records=[row.record() for row in eval_rows],
            max_length=length,
            counts={"train": len(train), "held_out": len(held_out), "tokens": tokens}
            | describe_cut_rows(cut_rows)
            | size,
        )

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "EmbeddingObjective":
        """Return the objective with the pairs that `afina eval` evaluates."""
        base: Any = opened.base
        trained = trained_settings(opened.run)
        options = trained.group("embed")
        file, columns = eval_source(settings)
        rows = read_table(file, EMBEDDING, columns).rows
        length = trained.max_length or default_length(base)
        cut_rows = CutRows() if trained.truncate else None
        pairs = tokenize_pairs(base, rows, length, options.max_score, None, cut_rows)
        objective = cls(base, pairs, pairs, EVAL_TOKENS, 1, 0, options)
        objective.num_rows = len(rows)
        return objective

    def next_command(self, folder: Path) -> str:
        """Return the command that finds the nearest of the eval texts."""
        return f'afina generate "some text" --adapter {folder}'

    def length(self, row: PairExample) -> int:
        """Return the tokens of a pair with its negatives."""
        return sum(map(len, row.texts))

    def collate(self, rows: Sequence[PairExample], seed: int) -> PairBatch:
        """Return the texts of some pairs, each once, as model inputs."""
        table = PairTable.of(rows, self._known)
        return PairBatch(self.base.batch([list(text) for text in table.texts]), table)

    def num_targets(self, batch: PairBatch) -> int:  # type: ignore[override]
        """Return the number of pairs."""
        return len(batch.table.targets)

    def vectors(self, inputs: dict[str, Tensor], active: ActiveAdapters) -> Tensor:
        """Return the vector of each text of a batch `(num_texts, width)`."""
        with self.base.forward_context.use(active.row_segments()):
            return self.base.embed(inputs)

    def loss(  # type: ignore[override]
        self, batch: PairBatch, active: ActiveAdapters
    ) -> Tensor:
        """Return the sum of the losses of the pairs, in nats; squared errors of scored pairs."""
        return self._losses(self.vectors(batch.inputs, active), batch.table).sum()

    def _losses(self, vectors: Tensor, table: PairTable) -> Tensor:
        """Return the loss of each pair `(num_pairs,)` from the vectors of all texts."""
        table = _on(table, vectors.device)
        units = F.normalize(vectors, dim=-1)
        anchors = units[table.anchors]
        if self.is_scored:
            cosines = (anchors * units[table.positives]).sum(-1)
            return (cosines - table.targets.to(cosines.dtype)) ** 2
        scores = self.options.scale * (anchors @ units[table.candidates].T)
        scores = scores.index_put(tuple(table.left_out), scores.new_tensor(-torch.inf))
        return F.cross_entropy(scores, table.targets, reduction="none")

    @torch.no_grad()
    def encode(self, texts: Sequence[Tokens], active: ActiveAdapters) -> Tensor:
        """Return the vectors of texts `(num_texts, width)`, float64, in their order."""
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        lengths, is_padded = [len(texts[n]) for n in order], self.base.packed is None
        parts = [
            self.vectors(self.base.batch([list(texts[n]) for n in some]), active)
            for some in group_in_order(lengths, EVAL_TOKENS, is_padded, order)
        ]
        return torch.cat(parts)[torch.tensor(order).argsort()].double()

    def row_losses(self, rows: Sequence[PairExample], active: ActiveAdapters) -> list[LossSum]:
        """Return the loss of each pair among the texts of all `rows`."""
        table = PairTable.of(rows, self._known)
        vectors = self.encode(table.texts, active)
        losses = [self._losses(vectors, part) for part in _parts(table)]
        return [LossSum(loss, 1) for loss in torch.cat(losses).tolist()]

    def mean_loss(self, rows: Sequence[PairExample], active: ActiveAdapters) -> float:
        """Return the mean loss of pairs among the texts of all of them."""
        return LossSum.mean(self.row_losses(rows, active))

    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return the loss of the eval pairs, and ranking scores (percent) or correlations."""
        table = PairTable.of(self.eval_rows, self._known)
        vectors = self.encode(table.texts, active)
        losses = torch.cat([self._losses(vectors, part) for part in _parts(table)])
        units = F.normalize(vectors, dim=-1)
        if self.is_scored:
            cosines = (units[table.anchors] * units[table.positives]).sum(-1).cpu()
            found = regression_scores(cosines, table.targets.double())
            scores = {name: found[name] for name in ("pearson", "spearman")}
        else:
            rankings = list(self._rankings(units, table))
            scores = ranking_scores(rankings) | {BY_QUERY: [100 * one.ndcg for one in rankings]}
        return {"loss": float(losses.mean())} | scores

    def _rankings(self, units: Tensor, table: PairTable) -> Iterator[RankedItems]:
        """Yield the ranking of all candidates for each different anchor."""
        candidates = [table.texts[n] for n in table.candidates]
        index_of = {text: n for n, text in enumerate(candidates)}
        anchors = sorted({int(n) for n in table.anchors})
        compared = units[table.candidates.to(units.device)].T
        size = max(1, EVAL_SCORES // len(candidates))
        for at in range(0, len(anchors), size):
            some = anchors[at : at + size]
            cosines = (units[some] @ compared).cpu()
            for anchor, row in zip(some, cosines, strict=True):
                text = table.texts[anchor]
                relevant = [index_of[t] for t in self._known[text] if t in index_of]
                if text in index_of and index_of[text] not in relevant:
                    row[index_of[text]] = -torch.inf  # a query does not find itself
                yield RankedItems.of(row, relevant, [1.0] * len(relevant))

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Return the scores before and after; the main one is nDCG@10 or Spearman."""
        if self.is_scored:
            values = before["spearman"], after["spearman"]
            score = (
                None
                if None in values
                else TaskScore(
                    "Spearman correlation",
                    values[1],
                    len(self.eval_rows),
                    values[0],
                    unit="",
                    counts_right=False,
                )
            )
        else:
            score = TaskScore.of_rows(
                "nDCG@10",
                before[BY_QUERY],
                after[BY_QUERY],
                counts_right=False,
                row_kind="eval query",
            )
        sides = [
            {name: value for name, value in side.items() if name not in ("loss", BY_QUERY)}
            for side in (before, after)
        ]
        return {
            "before": sides[0],
            "after": sides[1],
            "rows": len(self.eval_rows),
            "verdict": [],
            "score": score,
        }


def default_length(base: Encoder) -> int:
    """Return the longest text in tokens where none is set: the limit that the base records."""
    return min(base.max_positions, base.embedding.max_length or 512)


def _on(table: PairTable, device: torch.device) -> PairTable:
    names = ("anchors", "positives", "candidates", "targets", "left_out")
    return replace(table, **{name: getattr(table, name).to(device) for name in names})


def _parts(table: PairTable) -> Iterator[PairTable]:
    """Yield the pairs of a table in parts, whose scores fit into memory."""
    size = max(1, EVAL_SCORES // len(table.candidates))
    for at in range(0, len(table.anchors), size):
        yield table.select(slice(at, at + size))


def _embedding_config(settings: TrainSettings, options: EmbedSettings) -> EmbeddingConfig:
    """Return how the base's vectors are computed, with the pooling of the settings."""
    found = EmbeddingConfig.of(resolve_model_dir(settings.base, settings.revision))
    return found if options.pooling == "auto" else replace(found, pooling=options.pooling)


def _check_options(options: EmbedSettings, table: Table[EmbeddingRow]) -> None:
    """Raise `SettingsError` for an option that rows of this format do not read."""
    names = ("scale", "pairs_per_batch") if table.format == SCORED else ("max_score",)
    for name in names:
        value = getattr(options, name)
        if value != EmbedSettings.model_fields[name].default:
            what = f"embed.{name} {value} has no effect: the rows are {table.format}"
            raise SettingsError(what, where=f"embed.{name}", hint="leave it out")


def _show(base: Encoder, pair: PairExample) -> ShownExample:
    """Return a pair as the model reads it: what is close to the anchor, and what is not."""
    assert base.tokenizer is not None
    anchor, positive, *negatives = (str(base.tokenizer.decode([*text])) for text in pair.texts)
    if pair.score is not None:
        text = f"{anchor} | {positive} -> «{pair.score:g}»"
    else:
        text = f"{anchor} -> «{positive}»" + "".join(f" | not: {other}" for other in negatives)
    return ShownExample(pair.where, sum(map(len, pair.texts)), None, text)
