"""Token labels (named entities, parts of speech): a tag for each word of a text.

loss = - sum over words of log p(tag | text)   /   words

The first token of a word carries its tag, and the others none. Words are joined by a space, so that
every tokenizer reads them as in a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.data.packing import IGNORE_INDEX
from afina.data.row_store import StoredRows
from afina.data.schemas import TAGGED, TaggedRow
from afina.data.several_files import mix_rows
from afina.data.table import parse_rows, read_table
from afina.data.truncation import CutRows
from afina.errors import DataError
from afina.models.classifier import Classifier, load_tagger
from afina.objectives.base import LossSum, Units
from afina.objectives.entity_scores import OUTSIDE, tag_scores
from afina.objectives.labeled_data import check_encoder_settings
from afina.objectives.linear_probe import MAX_PROBE_ROWS, ProbedObjective, token_features
from afina.objectives.padded import EVAL_BATCH_TOKENS, PaddedBatch
from afina.objectives.prepared import (
    PreparedData,
    ShownExample,
    describe_cut_rows,
    describe_data,
    eval_source,
    trained_settings,
)
from afina.objectives.registry import register_objective
from afina.objectives.run_rows import read_files, split_eval_rows
from afina.objectives.task_score import TaskScore
from afina.settings import EvalSettings, TrainSettings
from afina.settings.objectives import TagSettings


@dataclass(frozen=True)
class TaggedExample:
    """A text as token ids, and the tags of its words.

    Attributes:
        where: Location of the row.
        token_ids: With the tokenizer's special tokens.
        positions: Of each word its first token; -1 for a word without one.
        tags: Index of the tag of each word.
    """

    where: str
    token_ids: list[int]
    positions: tuple[int, ...]
    tags: tuple[int, ...]


@register_objective("tag")
class TaggingObjective(ProbedObjective):
    """Cross-entropy of the tags of words; the head is new, and saved with the adapter."""

    schema = "tagged"
    units = Units("word", "tags")
    has_baseline = False
    report_key = "classes"
    default_learning_rate_factor = 0.5
    settings_class = TagSettings
    probe_scores = ("f1", "word_accuracy")

    @classmethod
    def prepare(cls, settings: TrainSettings, base: Classifier | None = None) -> PreparedData:
        """Read, tokenize, check and split the texts; load the base, unless it is given."""
        check_encoder_settings(settings)
        options = settings.group("tag")
        table = read_files(settings, TAGGED)
        skipped = list(table.skipped)
        rows, eval_tagged = (
            _named(some, options.names)
            for some in split_eval_rows(settings, table, TAGGED, lambda row: row.words, skipped)
        )
        labels = sorted({tag for row in rows for tag in row.tags}, key=_tag_order)
        base = base or load_tagger(
            settings.base,
            labels,
            settings.revision,
            settings.trust_remote_code,
            settings.dtype,
            settings.load_device,
        )
        leave_out = skipped if settings.skip_bad_rows else None
        length = settings.max_length or min(base.max_positions, 512)
        cut_rows = CutRows() if settings.truncate else None
        train, eval_rows = (
            tokenize_tagged_rows(base, some, length, leave_out, cut_rows)
            for some in (rows, eval_tagged)
        )
        train = mix_rows(train, table.files, settings.seed)
        tokens, accumulation = settings.max_tokens_per_batch, settings.gradient_accumulation_steps
        task = cls(base, train, eval_rows, tokens, accumulation, settings.seed)
        task.options = options
        return PreparedData(
            task=task,
            data_info=describe_data(table, task) | describe_cut_rows(cut_rows) | {"labels": labels},
            skipped=skipped,
            show=partial(_show, base),
            eval_records=[row.record() for row in eval_tagged],
            modules_to_save=base.new_modules,
            max_length=length,
            counts={"train": len(train), "held_out": len(eval_rows), "tags": ", ".join(labels)}
            | describe_cut_rows(cut_rows),
        )

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "TaggingObjective":
        """Return the objective with the texts that `afina eval` evaluates."""
        base: Any = opened.base
        trained = trained_settings(opened.run)
        file, columns = eval_source(settings)
        tagged = _named(read_table(file, TAGGED, columns).rows, trained.group("tag").names)
        length = trained.max_length or min(base.max_positions, 512)
        cut_rows = CutRows() if trained.truncate else None
        rows = tokenize_tagged_rows(base, tagged, length, None, cut_rows)
        objective = cls(base, rows, rows, EVAL_BATCH_TOKENS, 1, 0)
        objective.num_rows = len(rows)
        return objective

    def next_command(self, folder: Path) -> str:
        """Return the command that tags a text."""
        return f'afina generate "some text" --adapter {folder}'

    def length(self, row: TaggedExample) -> int:
        """Return the tokens of a text."""
        return len(row.token_ids)

    def collate(self, rows: Sequence[TaggedExample], seed: int) -> PaddedBatch:
        """Return padded tokens, and the tags `(num_rows, longest)` of the first ones of words."""
        inputs = self.base.batch([row.token_ids for row in rows])
        targets = torch.full(inputs["input_ids"].shape, IGNORE_INDEX)
        for number, row in enumerate(rows):
            for position, tag in zip(row.positions, row.tags, strict=True):
                if position >= 0:
                    targets[number, position] = tag
        return PaddedBatch(inputs, targets.to(self.base.device))

    def loss(self, batch: PaddedBatch, active: ActiveAdapters) -> Tensor:
        """Return the sum of the cross-entropy over the words of a batch, in nats."""
        return self._token_losses(batch, active).sum()

    def _token_losses(self, batch: PaddedBatch, active: ActiveAdapters) -> Tensor:
        """Return the loss of each token `(num_tokens,)`, 0 where it carries no tag."""
        logits = self._token_logits(batch, active)
        targets = batch.targets[batch.inputs["attention_mask"].bool()]
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")

    def _token_logits(self, batch: PaddedBatch, active: ActiveAdapters) -> Tensor:
        with self.base.forward_context.use(active.row_segments()):
            return self.base.token_logits(batch.inputs)

    @torch.no_grad()
    def row_losses(self, rows: Sequence[TaggedExample], active: ActiveAdapters) -> list[LossSum]:
        """Return the loss of each text, summed over its words."""
        found: list[LossSum] = []
        for batch in self.batches(rows):
            losses = self._token_losses(batch, active).double()
            lengths = batch.inputs["attention_mask"].sum(1).tolist()
            counts = (batch.targets != IGNORE_INDEX).sum(1).tolist()
            totals = [float(part.sum()) for part in losses.split(lengths)]
            found += [LossSum(*pair) for pair in zip(totals, counts, strict=True)]
        return found

    @torch.no_grad()
    def predictions(
        self, rows: Sequence[TaggedExample], active: ActiveAdapters
    ) -> list[tuple[str, ...]]:
        """Return the likeliest tag of each word of each text; O for a word without tokens."""
        best: list[list[int]] = []
        for batch in self.batches(rows):
            lengths = batch.inputs["attention_mask"].sum(1).tolist()
            chosen = self._token_logits(batch, active).argmax(-1)
            best += [part.tolist() for part in chosen.split(lengths)]
        return [
            tuple(OUTSIDE if p < 0 else self.base.labels[tags[p]] for p in row.positions)
            for row, tags in zip(rows, best, strict=True)
        ]

    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return the loss of the eval rows (nats per word) and scores of words and entities."""
        expected = [tuple(self.base.labels[t] for t in row.tags) for row in self.eval_rows]
        scores = tag_scores(self.predictions(self.eval_rows, active), expected)
        scores |= {"rows": len(expected), "labels": list(self.base.labels)}
        return {"loss": self.eval_loss(active), "classes": scores}

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Return the scores; the main one is the F1 of entities, else the accuracy of words."""
        scores = after["classes"]
        key, label = ("f1", "entity F1") if "f1" in scores else ("word_accuracy", "word accuracy")
        score = TaskScore(label, scores[key], scores["rows"], counts_right=False)
        if key not in self.probe:
            return {**scores, "score": score, "verdict": []}
        sentence = (
            f"A linear probe of the frozen base has {label} {self.probe[key]:.1f}%; after "
            f"training it is {scores[key]:.1f}%."
        )
        return {**scores, "probe": self.probe, "score": score, "verdict": [sentence]}

    def probe_examples(self, path: str) -> tuple[Tensor, Tensor]:
        """Return features and tags of the words of training texts, spread over all of them."""
        every = -(-sum(len(row.tags) for row in self.train) // MAX_PROBE_ROWS)
        features, tags = [], []
        for batch in self.batches(sorted(self.train[::every], key=self.length)):
            targets = batch.targets[batch.inputs["attention_mask"].bool()]
            is_word = targets != IGNORE_INDEX
            features.append(token_features(self.base, path, batch.inputs)[is_word])
            tags.append(targets[is_word])
        return torch.cat(features), torch.cat(tags)


def tokenize_tagged_rows(
    base: Classifier,
    rows: Sequence[TaggedRow],
    max_length: int,
    skipped: list[str] | None,
    cut_rows: CutRows | None = None,
) -> Sequence[TaggedExample]:
    """Return tagged texts as token ids.

    Args:
        base: The model with its tokenizer.
        rows: The texts.
        max_length: Longest text in tokens.
        skipped: Rows that cannot be used are added here; None makes them an error.
        cut_rows: Longer texts lose their last words and are added here; None makes them an error.

    Raises:
        DataError: A row cannot be used, or none is left.
    """

    def make(where: str, row: TaggedRow) -> TaggedExample:
        unknown = [tag for tag in row.tags if tag not in base.labels]
        if unknown:
            what = f"tag {unknown[0]!r} does not occur in the training rows"
            raise DataError(what, where=where, why=f"known: {', '.join(base.labels)}")
        words = row.words
        token_ids, positions = encode_words(base, words)
        while len(token_ids) > max_length and cut_rows is not None and len(words) > 1:
            cut_rows.rows.add(where)
            words = words[: max(1, min(len(words) - 1, sum(n < max_length for n in positions)))]
            token_ids, positions = encode_words(base, words)
        if len(token_ids) > max_length:
            what = f"{len(token_ids):,} tokens, more than the {max_length:,} allowed"
            hint = "raise --max-length, cut the text with --truncate, or leave the row out"
            raise DataError(what, where=where, hint=f"{hint} with --skip-bad-rows")
        tags = row.tags[: len(words)]
        return TaggedExample(where, token_ids, positions, tuple(map(base.labels.index, tags)))

    tokenized = parse_rows(((row.where, row) for row in rows), make, skipped)
    if not tokenized:
        raise DataError("no row is left to train on")
    return tokenized


def encode_words(base: Classifier, words: Sequence[str]) -> tuple[list[int], tuple[int, ...]]:
    """Return the token ids of words, and of each word its first token; -1 for one without."""
    assert base.tokenizer is not None
    encoded = base.tokenizer(
        " ".join(words), return_offsets_mapping=True, verbose=False, split_special_tokens=True
    )
    starts, at = [], 0
    for word in words:
        starts.append(at)
        at += len(word) + 1
    positions = [-1] * len(words)
    index = 0
    for token, (start, end) in enumerate(encoded["offset_mapping"]):
        while index + 1 < len(words) and end > starts[index + 1]:
            index += 1
        if end > start and positions[index] < 0:
            positions[index] = token
    return encoded["input_ids"], tuple(positions)


def _named(rows: Sequence[TaggedRow], names: Sequence[str] | None) -> Sequence[TaggedRow]:
    """Return rows whose tags are numbers with names for them; raises `DataError`."""
    if names is None:
        return rows
    return StoredRows(_with_names(row, names) for row in rows)


def _with_names(row: TaggedRow, names: Sequence[str]) -> TaggedRow:
    outside = [tag for tag in row.tags if tag not in names and not _is_index(tag, names)]
    if outside:
        what = f"tag {outside[0]!r} has no name in tag.names"
        raise DataError(what, where=row.where, why=f"it has {len(names)} names")
    tags = (tag if tag in names else names[int(tag)] for tag in row.tags)
    return replace(row, tags=tuple(tags))


def _is_index(tag: str, names: Sequence[str]) -> bool:
    return tag.isdecimal() and int(tag) < len(names)


def _tag_order(tag: str) -> tuple[bool, int, str]:
    """Sort O first, numbers by value, and other tags by name."""
    return (tag != OUTSIDE, int(tag) if tag.isdecimal() else -1, tag)


def _show(base: Classifier, row: TaggedExample) -> ShownExample:
    """Return a text as the model reads it, each first token of a word with its tag."""
    assert base.tokenizer is not None
    tags = dict(zip(row.positions, row.tags, strict=True))
    tokens = base.tokenizer.convert_ids_to_tokens(row.token_ids)
    text = " ".join(
        f"{token}«{base.labels[tags[position]]}»" if position in tags else token
        for position, token in enumerate(tokens)
    )
    return ShownExample(row.where, len(tokens), len(row.tags), text)
