"""From settings to a base and a task with its data: one function a kind of model. Nothing is attached yet."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from afina.adapters.presets import get_preset
from afina.data.packing import train_eval_split
from afina.data.renderer import Example, Renderer
from afina.data.schemas import LABELED, SFT, LabeledRow, SFTRow, class_names
from afina.data.table import detect_schema, read_table
from afina.errors import DataError, SettingsError
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier, load_classifier, load_masked
from afina.models.loading import load_base
from afina.objectives.classification import (
    ClassificationObjective,
    MaskedLMObjective,
    chunk_texts,
    tokenize_labeled_rows,
)
from afina.objectives.language_modeling import (
    LanguageModelingObjective,
    infer_objective,
    tokenize_rows,
)
from afina.settings import POLICIES, PREFERENCES, TrainSettings
from afina.training.setup.prepare_policy import prepare_policy
from afina.training.setup.prepare_preferences import prepare_preferences
from afina.training.setup.prepared import (
    PreparedData,
    Units,
    describe_data,
    resolve_invocation,
)

Piece = TypeVar("Piece")


def resolve_objective(settings: TrainSettings) -> str:
    """The objective as told; by itself, it is what the rows are for: labels beside texts or pictures, pairs of answers."""
    if settings.objective != "auto" or settings.data is None:  # a plan without data is for texts
        return settings.objective
    detected = detect_schema(settings.data, settings.columns)
    return "auto" if detected is None else detected.schema.objective(detected.format)


def prepare(settings: TrainSettings, base: CausalLM | Classifier | None = None) -> PreparedData:
    """Load, read, render and check; raises the error of the first thing that is wrong.

    `base` is a language model that is loaded already, and on which others learn, or a classifier made in Python.
    """
    objective = resolve_objective(settings)
    if isinstance(base, Classifier) and objective not in ("auto", "classify"):
        raise SettingsError(
            f"a classifier cannot learn by {objective}",
            where="objective",
            hint="--objective classify",
        )
    if objective == "classify" or isinstance(base, Classifier):
        return _classifier(settings, base if isinstance(base, Classifier) else None)
    if objective in PREFERENCES:
        return prepare_preferences(settings.model_copy(update={"objective": objective}), base)
    if objective in POLICIES:
        return prepare_policy(settings, base)
    return _masked(settings) if objective == "mlm" else _language(settings, base)


# ---- language models


@dataclass(frozen=True)
class TokenizedRows:
    """Rows as labelled tokens, to learn from and to judge by; needs a tokenizer, and no model."""

    table: Any
    renderer: Renderer
    objective: str
    invocation: tuple[int, ...]
    train: list[Example]
    eval_examples: list[Example]
    held_rows: list[SFTRow]
    skipped: list[str]

    @property
    def counts(self) -> dict[str, Any]:
        """The table for `afina plan`."""
        tokens, labels = (
            sum(len(e.token_ids) for e in self.train),
            sum(sum(e.loss_mask) for e in self.train),
        )
        longest = max(len(e.token_ids) for e in self.train)
        return {
            "train": len(self.train),
            "held_out": len(self.eval_examples),
            "tokens": tokens,
            "longest": longest,
            "labelled_percent": 100.0 * labels / tokens,
        }


def read_examples(
    settings: TrainSettings, table: Any, tokenizer: Any, context: int
) -> TokenizedRows:
    """The rows of `table` rendered, checked and split, for a model that reads `context` tokens."""
    renderer = Renderer(
        tokenizer, settings.chat_template, settings.max_length or min(context, 2048)
    )
    objective = infer_objective(settings.objective, table.rows)
    invocation = (
        resolve_invocation(renderer, settings)
        if get_preset(settings.method, 1).is_activated
        else ()
    )
    skipped = list(table.skipped)
    train, held, held_rows = _split(settings, table.rows, renderer, objective, skipped, invocation)
    return TokenizedRows(table, renderer, objective, invocation, train, held, held_rows, skipped)


def _language(settings: TrainSettings, base: CausalLM | None) -> PreparedData:
    table = read_table(settings.data, SFT, settings.columns, settings.skip_bad_rows)
    base = base or load_base(
        settings.base,
        settings.revision,
        settings.trust_remote_code,
        settings.dtype,
        settings.place,
        get_preset(settings.method, 1).quantization,
    )
    own_tokens = base.add_tokens(settings.new_tokens)
    made = read_examples(settings, table, base.tokenizer, base.max_positions)
    records = [row.record() for row in made.held_rows] or [
        {"text": base.decode(example.token_ids)} for example in made.eval_examples
    ]
    return PreparedData(
        base=base,
        task=LanguageModelingObjective(
            base,
            made.train,
            made.eval_examples,
            settings.max_tokens_per_batch,
            settings.gradient_accumulation_steps,
            settings.seed,
        ),
        objective=made.objective,
        data_info=describe_data(table, len(made.eval_examples)),
        skipped=made.skipped,
        example=made.renderer.format_loss_mask(made.train[0]),
        eval_records=records,
        invocation=made.invocation,
        trainable_tokens=own_tokens,
        max_length=made.renderer.max_length,
        counts=made.counts,
    )


def _split(
    settings: TrainSettings,
    all_rows: list[SFTRow],
    renderer: Renderer,
    objective: str,
    skipped: list[str],
    invocation: tuple[int, ...],
) -> tuple[list[Example], list[Example], list[SFTRow]]:
    """Examples to learn from, examples to judge by, and the rows of the latter."""
    leave_out = skipped if settings.skip_bad_rows else None
    if objective == "sft":
        renderer.check_template(all_rows)
    if settings.eval_data is not None:
        table = read_table(settings.eval_data, SFT, settings.columns, settings.skip_bad_rows)
        infer_objective(objective, table.rows)
        skipped += table.skipped
        train = tokenize_rows(objective, renderer, all_rows, leave_out, invocation)
        held = tokenize_rows(objective, renderer, table.rows, leave_out, invocation)
        there = {example.where for example in held}
        return train, held, [row for row in table.rows if row.where in there]
    if objective == "pretrain":  # one long text is one row: hold out chunks of it instead
        chunks = tokenize_rows(objective, renderer, all_rows, leave_out, invocation)
        train, held = hold_out_every_nth(chunks, settings.eval_size, settings.data)
        return train, held, []
    made = {e.where: e for e in tokenize_rows(objective, renderer, all_rows, leave_out, invocation)}
    rows, held_rows = train_eval_split(
        [row for row in all_rows if row.where in made], settings.eval_size, settings.seed
    )
    return [made[row.where] for row in rows], [made[row.where] for row in held_rows], held_rows


# ---- classifiers and encoders


def _classifier(settings: TrainSettings, model: Classifier | None) -> PreparedData:
    _refuse_prefixes(settings)
    table = read_table(settings.data, LABELED, settings.columns, settings.skip_bad_rows)
    pictures = table.format == "pictures"
    classes = class_names(table.rows)
    if len(classes) < 2:
        why = f"all rows are {classes[0]!r}"
        raise DataError("fewer than two classes", where=str(settings.data), why=why)
    if settings.eval_data is not None:
        rows, held_rows = (
            table.rows,
            read_table(settings.eval_data, LABELED, settings.columns, settings.skip_bad_rows).rows,
        )
    else:
        rows, held_rows = _split_by_class(table.rows, settings.eval_size, settings.seed)
    base = model or load_classifier(
        settings.base,
        classes,
        pictures,
        settings.revision,
        settings.trust_remote_code,
        settings.dtype,
        settings.place,
    )
    skipped = list(table.skipped)
    leave_out = skipped if settings.skip_bad_rows else None
    length = settings.max_length or min(base.max_positions, 512)
    train, held = (
        tokenize_labeled_rows(base, rows, length, leave_out),
        tokenize_labeled_rows(base, held_rows, length, leave_out),
    )
    return PreparedData(
        base=base,
        task=ClassificationObjective(
            base,
            train,
            held,
            _rows_a_batch(settings, base, train),
            settings.gradient_accumulation_steps,
            settings.seed,
        ),
        objective="classify",
        data_info=describe_data(table, len(held)) | {"labels": list(classes)},
        skipped=skipped,
        example=f"{rows[0].where if pictures else str(rows[0].content)} -> {rows[0].label}",
        eval_records=[row.record() for row in held_rows],
        modules_to_save=base.new_modules,
        max_length=length if base.images is None else None,
        counts={"train": len(train), "held_out": len(held), "classes": len(classes)},
        words=Units("row", "classes", "picture" if pictures else "token"),
    )


def _masked(settings: TrainSettings) -> PreparedData:
    _refuse_prefixes(settings)
    table = read_table(settings.data, SFT, settings.columns, settings.skip_bad_rows)
    infer_objective("pretrain", table.rows)
    base = load_masked(
        settings.base, settings.revision, settings.trust_remote_code, settings.dtype, settings.place
    )
    length = settings.max_length or min(base.max_positions, 128)
    pieces = chunk_texts(base, table.rows, length)
    train, held = hold_out_every_nth(pieces, settings.eval_size, settings.data)
    assert base.tokenizer is not None
    return PreparedData(
        base=base,
        task=MaskedLMObjective(
            base,
            train,
            held,
            _rows_a_batch(settings, base, train),
            settings.gradient_accumulation_steps,
            settings.seed,
        ),
        objective="mlm",
        data_info=describe_data(table, len(held)),
        skipped=list(table.skipped),
        example=str(base.tokenizer.decode(train[0].token_ids)),
        eval_records=[
            {"text": str(base.tokenizer.decode(t.token_ids, skip_special_tokens=True))}
            for t in held
        ],
        modules_to_save=base.new_modules,
        max_length=length,
        counts={
            "train": len(train),
            "held_out": len(held),
            "tokens": sum(len(t.token_ids) for t in train),
        },
        words=Units("hidden token"),
    )


def _refuse_prefixes(settings: TrainSettings) -> None:
    for name in ("init_adapter", "frozen_adapter"):
        if getattr(settings, name) is not None:
            raise SettingsError(
                "only language models begin with an adapter so far",
                where=name,
                hint=f"leave {name} out",
            )
    meant = get_preset(settings.method, 1)
    if meant.is_activated:
        raise SettingsError(
            "an activated adapter needs a text with an answer",
            where="method",
            hint=f"--method {meant.method}",
        )
    if meant.quantization != "none":
        raise SettingsError(
            "4-bit storage is for language models so far",
            where="method",
            hint=f"--method {meant.method}",
        )


def _rows_a_batch(settings: TrainSettings, base: Classifier, rows: Sequence[Any]) -> int:
    """Rows in one pass: `batch_tokens` tokens of text, or for pictures as many patches of 16 x 16 pixels."""
    if base.images is not None:
        height, width = base.images.size
        size = max(16.0, height * width / 256)
    else:
        size = sum(len(getattr(row, "token_ids", None) or row.content) for row in rows) / len(rows)
    return max(1, round(settings.max_tokens_per_batch / size))


def _split_by_class(
    rows: list[LabeledRow], share: float, seed: int
) -> tuple[list[LabeledRow], list[LabeledRow]]:
    """About `share` of each class held out, at least one row; equal texts stay on one side."""
    groups: dict[tuple[str, Any], list[LabeledRow]] = {}
    for row in rows:
        groups.setdefault((row.label, row.content), []).append(row)
    by_label: dict[str, list[list[LabeledRow]]] = {}
    for (label, _), group in sorted(groups.items(), key=lambda item: item[1][0].where):
        by_label.setdefault(label, []).append(group)
    train, held = [], []
    for label, of_label in by_label.items():
        if len(of_label) < 2:
            hint = "at least two that differ, one to judge by"
            raise DataError(
                f"class {label!r} has one row only", where=of_label[0][0].where, hint=hint
            )
        random.Random(f"{seed}{label}").shuffle(of_label)
        cut = min(len(of_label) - 1, max(1, round(share * len(of_label))))
        held += [row for group in of_label[:cut] for row in group]
        train += [row for group in of_label[cut:] for row in group]
    return train, held


# ---- shared


def hold_out_every_nth(
    pieces: list[Piece], share: float, where: Path
) -> tuple[list[Piece], list[Piece]]:
    """Pieces of a text to learn from, and every n-th one to judge by."""
    if len(pieces) < 2:
        raise DataError(
            "too little text to hold some out",
            where=str(where),
            hint="a smaller --max-length, or --holdout FILE",
        )
    step = min(len(pieces), max(2, round(1 / share)))
    held = pieces[step - 1 :: step]
    return [piece for number, piece in enumerate(pieces) if number % step != step - 1], held
