"""Preference rows to examples: tokenized, checked, split into training and eval rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from afina.data.columns import Columns
from afina.data.packing import train_eval_split
from afina.data.renderer import Example, Renderer
from afina.data.schemas import (
    LABELS,
    PAIRS,
    PREFERENCE,
    PreferenceRow,
    prompt_key,
    split_pairs,
)
from afina.data.table import Table, parse_rows, read_table, summarize_skipped
from afina.errors import DataError
from afina.objectives.language_data import mask_before_invocation
from afina.settings import TrainSettings

MATE_TRIES = 8  # other rows looked at for one whose answer fits to a prompt

Made = list[tuple[PreferenceRow, "PreferenceExample"]]


@dataclass(frozen=True)
class PreferenceExample:
    """A row as tokens: the better answer and the worse one (with a label, one of them), each with its prompt.

    `mate` is the prompt with the answer of another row, which KTO's z is an average over.
    """

    where: str
    chosen: Example | None
    rejected: Example | None
    mismatched: Example | None = None

    @property
    def completions(self) -> list[Example]:
        """The better completion, then the worse one, as far as there are both."""
        return [example for example in (self.chosen, self.rejected) if example is not None]

    @cached_property
    def token_ids(self) -> list[int]:
        """All that passes through the model, by which rows are packed."""
        return [
            token
            for example in (self.chosen, self.rejected)
            if example
            for token in example.token_ids
        ]


def tokenize_preferences(
    renderer: Renderer,
    rows: Sequence[PreferenceRow],
    skipped: list[str] | None,
    invocation: tuple[int, ...],
    mates: bool,
) -> list[tuple[PreferenceRow, PreferenceExample]]:
    """Rows with their tokens. One that cannot be used is an error, or is listed in `skipped` when that is given.

    With an `invocation`, only what follows its last occurrence counts: before it policy and reference are the base.
    """

    def example(row: PreferenceRow, answer: Any) -> Example:
        made = renderer.example(row.row(answer))
        return mask_before_invocation(made, invocation) if invocation else made

    def make(where: str, number: int) -> tuple[PreferenceRow, PreferenceExample]:
        row = rows[number]
        good, bad = (
            example(row, answer) if answer is not None else None
            for answer in (row.chosen, row.rejected)
        )
        if good is not None and bad is not None and good.token_ids == bad.token_ids:
            raise DataError("the two answers are the same tokens", where=where)
        return row, PreferenceExample(
            where, good, bad, _mate(example, rows, number) if mates else None
        )

    made = parse_rows(((row.where, number) for number, row in enumerate(rows)), make, skipped)
    if not made:
        raise DataError(
            "no row is left to learn from", why=f"skipped: {summarize_skipped(skipped or [])}"
        )
    return made


def _mate(example: Any, rows: Sequence[PreferenceRow], number: int) -> Example | None:
    """The prompt of a row with the answer of one before it that has another prompt; None where there is none that fits."""
    row, tries = rows[number], 0
    for distance in range(1, len(rows)):
        other = rows[number - distance]
        if prompt_key(other) == prompt_key(row):
            continue
        try:
            return example(row, other.chosen if other.chosen is not None else other.rejected)
        except DataError:  # too long, or a text where messages are needed
            tries += 1
            if tries == MATE_TRIES:
                return None
    return None


def read_comparable(
    path: Path, columns: Columns, objective: str, single: bool, skip_bad_rows: bool = False
) -> Table[PreferenceRow]:
    """Return pairs, or with `single` one completion and its label per row (pairs are split)."""
    table = read_table(path, PREFERENCE, columns, skip_bad_rows)
    if table.format == LABELS and not single:
        hint = "--objective kto learns from labels"
        raise DataError(
            f"{objective} compares two answers to one prompt",
            where=str(path),
            why="these rows have one answer and a label",
            hint=hint,
        )
    if single and table.format == PAIRS:
        return replace(table, rows=split_pairs(table.rows))
    return table


def split_preferences(
    settings: TrainSettings,
    table: Table[PreferenceRow],
    renderer: Renderer,
    invocation: tuple[int, ...],
    skipped: list[str],
    single: bool,
) -> tuple[Made, Made]:
    """Rows to learn from and rows to judge by; those of one prompt are on one side."""
    leave_out = skipped if settings.skip_bad_rows else None
    renderer.check_template(
        [
            row.row(answer)
            for row in table.rows[:16]
            for answer in (row.chosen, row.rejected)
            if answer is not None
        ]
    )
    if settings.eval_data is not None:
        other = read_comparable(
            settings.eval_data,
            settings.columns,
            settings.objective,
            single,
            settings.skip_bad_rows,
        )
        skipped += other.skipped
        rows, held = table.rows, other.rows
    else:
        rows, held = train_eval_split(table.rows, settings.eval_size, settings.seed, prompt_key)
    return (
        tokenize_preferences(renderer, rows, leave_out, invocation, single),
        tokenize_preferences(renderer, held, leave_out, invocation, single),
    )


def format_preference(renderer: Renderer, choice: PreferenceExample) -> str:
    """Return a row as the model reads it, its completions marked."""
    sides = (("better", choice.chosen), ("worse", choice.rejected))
    return "\n".join(
        f"{name}: {renderer.format_loss_mask(example)}"
        for name, example in sides
        if example is not None
    )
