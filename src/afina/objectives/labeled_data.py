"""Labeled rows and texts for classifiers and encoders: tokenized or resized, checked, split."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from afina.adapters.presets import get_preset
from afina.data.images import open_image
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


@dataclass(frozen=True)
class TokenizedText:
    """A chunk of text as token ids, with special tokens at both ends."""

    where: str
    token_ids: list[int]


def tokenize_labeled_rows(
    base: Classifier,
    rows: Sequence[LabeledRow],
    max_length: int,
    skipped: list[str] | None,
    cut_rows: CutRows | None = None,
) -> list[ClassificationExample]:
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


def chunk_texts(base: Classifier, rows: Sequence[Any], max_length: int) -> list[TokenizedText]:
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
    pieces = []
    for row in rows:
        tokens = tokenizer(
            row.text, add_special_tokens=False, verbose=False, split_special_tokens=True
        )["input_ids"]
        for start in range(0, len(tokens), max_length - 2):
            pieces.append(
                TokenizedText(row.where, [*first, *tokens[start : start + max_length - 2], *last])
            )
    return [piece for piece in pieces if len(piece.token_ids) > 2]


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
    rows: list[LabeledRow],
    task: LabelTask,
    share: float,
    seed: int,
    file_of: Callable[[LabeledRow], int] = lambda row: 0,
) -> tuple[list[LabeledRow], list[LabeledRow]]:
    """Return training and eval rows: about `share` of each file, and there of each class.

    Rows of equal content are on one side. A class with one row, or with equal ones only, is trained
    and not evaluated.

    Raises:
        DataError: no class has two different rows.
    """
    groups: dict[tuple[Any, ...], list[LabeledRow]] = {}
    for row in rows:
        groups.setdefault((row.label, row.content, row.pair), []).append(row)
    by_label: dict[Any, list[list[LabeledRow]]] = {}
    for (label, *_), group in sorted(groups.items(), key=lambda item: item[1][0].where):
        kind = label if task.kind == CLASSES else task.kind
        by_label.setdefault((file_of(group[0]), kind), []).append(group)
    train, eval_rows = [], []
    for (_, label), of_label in by_label.items():
        random.Random(f"{seed}{label}").shuffle(of_label)
        cut = min(len(of_label) - 1, max(1, round(share * len(of_label))))
        eval_rows += [row for group in of_label[:cut] for row in group]
        train += [row for group in of_label[cut:] for row in group]
    if not eval_rows:
        counts = ", ".join(f"{label}: {len(of)}" for (_, label), of in by_label.items())
        hint = "at least two different rows of a class, one of them for evaluation"
        why = f"different rows of each class: {counts}"
        raise DataError("no row is left for evaluation", where=rows[0].where, why=why, hint=hint)
    return train, eval_rows


def rows_of_frequent_classes(
    rows: list[LabeledRow], min_rows: int, skipped: list[str]
) -> list[LabeledRow]:
    """Return the rows of classes with at least `min_rows` rows; others go to `skipped`."""
    counts = Counter(row.label for row in rows)
    kept = []
    for row in rows:
        if counts[row.label] >= min_rows:
            kept.append(row)
        else:
            found = pluralize(counts[row.label], "row")
            skipped.append(f"{row.where}: class {row.label!r} has {found}, fewer than {min_rows}")
    return kept


def known_rows(rows: list[LabeledRow], task: LabelTask, skipped: list[str]) -> list[LabeledRow]:
    """Return the eval rows whose classes occur in training; the others are added to `skipped`.

    Raises:
        DataError: none of the rows has such a class.
    """
    if task.kind != CLASSES:
        return rows
    if all(row.label not in task.labels for row in rows):
        what = f"class {rows[0].label!r} does not occur in the training rows"
        raise DataError(what, where=rows[0].where, why=f"known: {', '.join(task.labels)}")
    unknown = [row for row in rows if row.label not in task.labels]
    skipped += [
        f"{row.where}: class {row.label!r} does not occur in the training rows" for row in unknown
    ]
    return [row for row in rows if row.label in task.labels]
