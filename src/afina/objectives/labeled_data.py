"""Labeled rows and texts for classifiers and encoders: tokenized or resized, checked, split."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afina.adapters.presets import get_preset
from afina.data.images import open_image
from afina.data.schemas import CLASSES, LabeledRow, class_names, task_of
from afina.data.table import parse_rows
from afina.errors import DataError, SettingsError
from afina.models.classifier import Classifier
from afina.settings import TrainSettings


@dataclass(frozen=True)
class ClassificationExample:
    """A row for the model: token ids or a resized image, and the index of its class."""

    where: str
    content: Any
    target: int


@dataclass(frozen=True)
class TokenizedText:
    """A chunk of text as token ids, with special tokens at both ends."""

    where: str
    token_ids: list[int]


def tokenize_labeled_rows(
    base: Classifier, rows: Sequence[LabeledRow], max_length: int, skipped: list[str] | None
) -> list[ClassificationExample]:
    """Return labeled rows as token ids or pixels.

    Args:
        base: The classifier.
        rows: The rows.
        max_length: Longest text in tokens.
        skipped: Rows that cannot be used are added here; None makes them an error.

    Raises:
        DataError: A row cannot be used, or none is left.
    """
    numbers = {label: number for number, label in enumerate(base.labels)}

    def make(where: str, row: LabeledRow) -> ClassificationExample:
        content = encode_input(base, row.content, max_length, where, row.pair)
        return ClassificationExample(where, content, _number(row, numbers))

    tokenized = parse_rows(((row.where, row) for row in rows), make, skipped)
    if not tokenized:
        raise DataError("no row is left to train on")
    return tokenized


def _number(row: LabeledRow, numbers: dict[str, int]) -> int:
    if row.label not in numbers:
        raise DataError(
            f"class {row.label!r} does not occur in the training rows",
            where=row.where,
            why=f"known: {', '.join(numbers)}",
        )
    return numbers[row.label]


def encode_input(
    base: Classifier, content: str | bytes, max_length: int, where: str, pair: str | None = None
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
    if len(tokens) > max_length:
        hint = "raise --max-length, shorten the row, or leave it out with --skip-bad-rows"
        raise DataError(
            f"{len(tokens):,} tokens, more than the {max_length:,} allowed", where=where, hint=hint
        )
    return tokens


def check_classes(rows: Sequence[LabeledRow]) -> tuple[str, ...]:
    """Return the names of the classes of rows; raises `DataError` where labels are no classes."""
    task = task_of(rows)
    if task != CLASSES:
        raise DataError(
            f"these labels are for another task: {task}",
            where=f"{rows[0].where}:label",
            why=f"found {rows[0].label!r}; a class is a text, a whole number or a boolean",
            hint="one class per row",
        )
    return class_names(rows)


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
        tokens = tokenizer(row.text, add_special_tokens=False, verbose=False)["input_ids"]
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


def rows_per_batch(settings: TrainSettings, base: Classifier, rows: Sequence[Any]) -> int:
    """Return the rows of a micro-batch of `max_tokens_per_batch` tokens.

    A patch of 16 x 16 pixels counts as a token.
    """
    if base.images is not None:
        height, width = base.images.size
        size = max(16.0, height * width / 256)
    else:
        size = sum(len(getattr(row, "token_ids", None) or row.content) for row in rows) / len(rows)
    return max(1, round(settings.max_tokens_per_batch / size))


def split_by_class(
    rows: list[LabeledRow], share: float, seed: int
) -> tuple[list[LabeledRow], list[LabeledRow]]:
    """Return training and eval rows: about `share` of each class, at least one row, for eval.

    Rows of equal content are on one side.
    """
    groups: dict[tuple[Any, ...], list[LabeledRow]] = {}
    for row in rows:
        groups.setdefault((row.label, row.content, row.pair), []).append(row)
    by_label: dict[str, list[list[LabeledRow]]] = {}
    for (label, *_), group in sorted(groups.items(), key=lambda item: item[1][0].where):
        by_label.setdefault(label, []).append(group)
    train, eval_rows = [], []
    for label, of_label in by_label.items():
        if len(of_label) < 2:
            hint = "at least two different rows, one of them for evaluation"
            raise DataError(
                f"class {label!r} has one row only", where=of_label[0][0].where, hint=hint
            )
        random.Random(f"{seed}{label}").shuffle(of_label)
        cut = min(len(of_label) - 1, max(1, round(share * len(of_label))))
        eval_rows += [row for group in of_label[:cut] for row in group]
        train += [row for group in of_label[cut:] for row in group]
    return train, eval_rows
