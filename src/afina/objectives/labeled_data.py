"""Labeled rows and texts for classifiers and encoders: tokenized or resized, checked, split."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from afina.adapters.presets import get_preset
from afina.data.images import open_image
from afina.data.packing import content_hash
from afina.data.row_store import SelectedRows, StoredRows
from afina.data.schemas import CLASSES, LabeledRow
from afina.data.table import parse_rows
from afina.data.truncation import CutRows
from afina.errors import DataError, SettingsError, pluralize
from afina.models.classifier import Classifier
from afina.objectives.label_tasks import LabelTask
from afina.settings import TrainSettings


@dataclass(frozen=True)
class ClassificationExample:
    """A row for the model: token ids or a resized image, and the index of its class.

    `query` is the first text of a pair.
    """

    where: str
    content: Any
    target: Any
    query: str = ""

    def __reduce__(self) -> Any:
        """Return how an example is stored: a tensor takes PyTorch milliseconds to read."""
        content = self.content.numpy() if isinstance(self.content, Tensor) else self.content
        return _unpack, (self.where, content, self.target, self.query)


def _unpack(where: str, content: Any, *rest: Any) -> ClassificationExample:
    is_array = type(content).__name__ == "ndarray"
    pixels = torch.from_numpy(content) if is_array else content
    return ClassificationExample(where, pixels, *rest)


@dataclass(frozen=True)
class TokenizedText:
    """A chunk of text as token ids, with special tokens at both ends."""

    where: str
    token_ids: list[int]


def tokenize_labeled_rows(
    base: Classifier,
    rows: Iterable[LabeledRow],
    max_length: int,
    skipped: list[str] | None,
    cut_rows: CutRows | None = None,
) -> Sequence[ClassificationExample]:
    """Return labeled rows as token ids or pixels.

    Args:
        base: The classifier.
        rows: The rows.
        max_length: Longest text in tokens.
        skipped: Rows that cannot be used are added here; None makes them an error.
        cut_rows: Longer texts lose their end and are added here; None makes them an error.

    Raises:
        DataError: A row cannot be used, or none is left.
    """
    task = LabelTask(base.task, base.labels)

    def make(where: str, row: LabeledRow) -> ClassificationExample:
        content = encode_input(base, row.content, max_length, where, row.pair, cut_rows)
        query = "" if row.pair is None else str(row.content)
        return ClassificationExample(where, content, task.target(row), query)

    tokenized = parse_rows(((row.where, row) for row in rows), make, skipped)
    if not tokenized:
        raise DataError("no row is left to train on")
    return tokenized


def encode_input(
    base: Classifier,
    content: str | bytes,
    max_length: int,
    where: str,
    pair: str | None = None,
    cut_rows: CutRows | None = None,
) -> Any:
    """Return a text, or a pair of texts, as tokens, or the bytes of an image as a resized image.

    Raises:
        DataError: the base reads the other kind, the image cannot be read, or the text is longer
            than `max_length` tokens.
    """
    if base.images is not None:
        if isinstance(content, str):
            raise DataError("the model reads images, and this is a text", where=where)
        return base.images.resize(open_image(content, where), where)
    if isinstance(content, bytes):
        raise DataError("the model reads text, and this is an image", where=where)
    tokens = base.encode(content, pair)
    if len(tokens) > max_length and cut_rows is not None:
        cut_rows.rows.add(where)
        return base.encode(content, pair, max_length)
    if len(tokens) > max_length:
        hint = "raise --max-length, cut the text with --truncate, or leave the row out"
        hint += " with --skip-bad-rows"
        raise DataError(
            f"{len(tokens):,} tokens, more than the {max_length:,} allowed", where=where, hint=hint
        )
    return tokens


def chunk_texts(base: Classifier, rows: Sequence[Any], max_length: int) -> Sequence[TokenizedText]:
    """Return texts as chunks of at most `max_length` tokens, with the encoder's special tokens."""
    tokenizer = base.tokenizer
    assert tokenizer is not None
    if tokenizer.mask_token_id is None:
        raise DataError(
            "this model's tokenizer has no mask token",
            hint="--objective pretrain, for a causal language model",
        )
    first, last = [
        [t] if t is not None else [] for t in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    ]

    def pieces_of(row: Any) -> Iterator[TokenizedText]:
        tokens = tokenizer(
            row.text, add_special_tokens=False, verbose=False, split_special_tokens=True
        )["input_ids"]
        for start in range(0, len(tokens), max_length - 2):
            piece = [*first, *tokens[start : start + max_length - 2], *last]
            if len(piece) > 2:
                yield TokenizedText(row.where, piece)

    return StoredRows(piece for row in rows for piece in pieces_of(row))


def check_encoder_settings(settings: TrainSettings) -> None:
    """Raise `SettingsError` on settings that only causal language models have."""
    for name in ("init_adapter", "frozen_adapter"):
        if getattr(settings, name) is not None:
            raise SettingsError(
                "only causal language models can start from an adapter so far",
                where=name,
                hint=f"leave {name} out",
            )
    meant = get_preset(settings.method, 1)
    if meant.is_activated:
        raise SettingsError(
            "an activated adapter needs rows with prompt and completion",
            where="method",
            hint=f"--method {meant.method}",
        )
    if meant.quantization != "none":
        raise SettingsError(
            "NF4 quantization is for causal language models so far",
            where="method",
            hint=f"--method {meant.method}",
        )


def split_rows(
    rows: Sequence[LabeledRow],
    task: LabelTask,
    share: float,
    seed: int,
    file_of: Callable[[LabeledRow], int] = lambda row: 0,
) -> tuple[Sequence[LabeledRow], Sequence[LabeledRow]]:
    """Return training and eval rows: about `share` of each file, and there of each class.

    Rows of equal content are on one side. A class with one row, or with equal ones only, is trained
    and not evaluated.

    Raises:
        DataError: no class has two different rows.
    """
    groups: dict[Any, list[int]] = {}
    firsts: list[tuple[str, Any, list[int]]] = []  # of each group where it begins, file and class
    for index, row in enumerate(rows):
        content = row.content if row.pair is None else (row.content, row.pair)
        group = groups.setdefault((row.label, content_hash(content)), [])
        if not group:
            kind = row.label if task.kind == CLASSES else task.kind
            firsts.append((row.where, (file_of(row), kind), group))
        group.append(index)
    by_label: dict[Any, list[list[int]]] = {}
    for _, kind, group in sorted(firsts, key=lambda first: first[0]):
        by_label.setdefault(kind, []).append(group)
    train: list[int] = []
    eval_rows: list[int] = []
    for (_, label), of_label in by_label.items():
        random.Random(f"{seed}{label}").shuffle(of_label)
        cut = min(len(of_label) - 1, max(1, round(share * len(of_label))))
        eval_rows += [index for group in of_label[:cut] for index in group]
        train += [index for group in of_label[cut:] for index in group]
    if not eval_rows:
        counts = ", ".join(f"{label}: {len(of)}" for (_, label), of in by_label.items())
        hint = "at least two different rows of a class, one of them for evaluation"
        why = f"different rows of each class: {counts}"
        raise DataError("no row is left for evaluation", where=rows[0].where, why=why, hint=hint)
    return SelectedRows(rows, train), SelectedRows(rows, eval_rows)


def split_labels(rows: Sequence[LabeledRow], separator: str | None) -> Sequence[LabeledRow]:
    """Return rows whose labels are the parts of a text between `separator`; None: as they are.

    Raises:
        DataError: no label has the separator.
    """
    if not separator:
        return rows
    if not any(separator in str(row.label) for row in rows):
        what, why = f"no label has the separator {separator!r}", f"the first is {rows[0].label!r}"
        hint = "leave classify.label_separator out"
        raise DataError(what, where=f"{rows[0].where}:label", why=why, hint=hint)

    def parts(row: LabeledRow) -> tuple[str, ...]:
        if isinstance(row.label, tuple):
            return row.label
        return tuple(part.strip() for part in str(row.label).split(separator) if part.strip())

    return StoredRows(replace(row, label=parts(row)) for row in rows)


def rows_of_frequent_classes(
    rows: Sequence[LabeledRow], min_rows: int, skipped: list[str]
) -> tuple[Sequence[LabeledRow], dict[str, int]]:
    """Return the rows of classes with at least `min_rows` rows, and the rows of other classes.

    The latter are added to `skipped`, and counted by class.
    """
    counts = Counter(row.label for row in rows)
    kept = []
    for index, row in enumerate(rows):
        if counts[row.label] >= min_rows:
            kept.append(index)
        else:
            found = pluralize(counts[row.label], "row")
            skipped.append(f"{row.where}: class {row.label!r} has {found}, fewer than {min_rows}")
    rare = {str(label): count for label, count in counts.items() if count < min_rows}
    return SelectedRows(rows, kept), rare


def known_rows(
    rows: Sequence[LabeledRow], task: LabelTask, skipped: list[str]
) -> Sequence[LabeledRow]:
    """Return the eval rows whose classes occur in training; the others are added to `skipped`.

    Raises:
        DataError: none of the rows has such a class.
    """
    if task.kind != CLASSES:
        return rows
    if all(row.label not in task.labels for row in rows):
        what = f"class {rows[0].label!r} does not occur in the training rows"
        raise DataError(what, where=rows[0].where, why=f"known: {', '.join(task.labels)}")
    known = []
    for index, row in enumerate(rows):
        if row.label in task.labels:
            known.append(index)
        else:
            skipped.append(f"{row.where}: class {row.label!r} does not occur in the training rows")
    return SelectedRows(rows, known)
