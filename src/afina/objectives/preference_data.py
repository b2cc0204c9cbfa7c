"""Preference rows to examples: tokenized, checked, split into training and eval rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
from afina.data.several_files import file_number
from afina.data.table import Table, parse_rows, read_table, summarize_skipped
from afina.errors import DataError
from afina.objectives.language_data import mask_before_invocation
from afina.objectives.prepared import ShownExample
from afina.settings import TrainSettings

MAX_MISMATCH_TRIES = 8  # other rows whose completion is tried with a prompt
TokenizedPreferences = Sequence[tuple[PreferenceRow, "PreferenceExample"]]


@dataclass(frozen=True)
class PreferenceExample:
    """A row as token ids: the chosen and the rejected completion, each with its prompt.

    A labeled row has one of them. `mismatched` is the prompt with the completion of another row,
    for KTO's z.
    """

    where: str
    chosen: Example | None
    rejected: Example | None
    mismatched: Example | None = None

    @property
    def completions(self) -> list[Example]:
        """The chosen completion, then the rejected one; a labeled row has one of them."""
        return [example for example in (self.chosen, self.rejected) if example is not None]

    @cached_property
    def token_ids(self) -> list[int]:
        """The tokens of all completions with their prompts, by which rows are packed."""
        return [token for example in self.completions for token in example.token_ids]


def tokenize_preferences(
    renderer: Renderer,
    rows: Sequence[PreferenceRow],
    skipped: list[str] | None,
    invocation: tuple[int, ...],
    needs_mismatched: bool,
) -> TokenizedPreferences:
    """Return rows with their token ids.

    Args:
        renderer: Renders the rows.
        rows: The rows.
        skipped: Rows that cannot be used are added here; None makes them an error.
        invocation: Only tokens after its last occurrence are targets: before it policy and
            reference are the base.
        needs_mismatched: Whether each prompt also gets the completion of another row.

    Raises:
        DataError: A row cannot be used, or none is left.
    """

    def example(row: PreferenceRow, answer: Any, by: Renderer = renderer) -> Example:
        tokenized = by.example(row.row(answer))
        return mask_before_invocation(tokenized, invocation) if invocation else tokenized

    strict = partial(example, by=renderer.without_cutting)

    def make(where: str, number: int) -> tuple[PreferenceRow, PreferenceExample]:
        row = rows[number]
        fitted = renderer.fit_prompt(
            row.prompt, lambda prompt: renderer.num_tokens(row.answered(prompt)), where
        )
        row = replace(row, prompt=fitted)
        good, bad = (
            example(row, answer) if answer is not None else None
            for answer in (row.chosen, row.rejected)
        )
        if good is not None and bad is not None and good.token_ids == bad.token_ids:
            raise DataError("the two completions have the same tokens", where=where)
        mismatched = _mismatched(strict, rows, number) if needs_mismatched else None
        return row, PreferenceExample(where, good, bad, mismatched)

    tokenized = parse_rows(((row.where, number) for number, row in enumerate(rows)), make, skipped)
    if not tokenized:
        raise DataError(
            "no row is left to train on", why=f"skipped: {summarize_skipped(skipped or [])}"
        )
    return tokenized


def _mismatched(example: Any, rows: Sequence[PreferenceRow], number: int) -> Example | None:
    """Return the prompt of a row with the completion of an earlier one that has another prompt.

    None if no completion of MAX_MISMATCH_TRIES rows fits.
    """
    row, tries = rows[number], 0
    for distance in range(1, len(rows)):
        other = rows[number - distance]
        if prompt_key(other) == prompt_key(row):
            continue
        try:
            return example(row, other.chosen if other.chosen is not None else other.rejected)
        except DataError:  # too long, or a text where messages are needed
            tries += 1
            if tries == MAX_MISMATCH_TRIES:
                return None
    return None


def read_comparable(
    path: Path, columns: Columns, objective: str, single: bool, skip_bad_rows: bool = False
) -> Table[PreferenceRow]:
    """Return pairs, or with `single` one completion and its label per row (pairs are split)."""
    table = read_table(path, PREFERENCE, columns, skip_bad_rows)
    if table.format == LABELS and not single:
        hint = "--objective kto"
        raise DataError(
            f"{objective} compares two completions of one prompt",
            where=str(path),
            why="these rows have one completion and a label",
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
) -> tuple[TokenizedPreferences, TokenizedPreferences]:
    """Return training and eval rows; those of one prompt are on one side."""
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
        rows, eval_preferences = table.rows, other.rows
    else:
        rows, eval_preferences = train_eval_split(
            table.rows, settings.eval_size, settings.seed, prompt_key, file_number(table.files)
        )
    train, eval_rows = (
        tokenize_preferences(renderer, some, leave_out, invocation, single)
        for some in (rows, eval_preferences)
    )
    return train, eval_rows


def show_preference(renderer: Renderer, choice: PreferenceExample) -> ShownExample:
    """Return a row as the model reads it, its completions marked."""
    sides = (("better", choice.chosen), ("worse", choice.rejected))
    text = "\n".join(
        f"{name}: {renderer.format_loss_mask(example)}"
        for name, example in sides
        if example is not None
    )
    targets = sum(sum(example.loss_mask) for example in choice.completions)
    return ShownExample(choice.where, len(choice.token_ids), targets, text)
