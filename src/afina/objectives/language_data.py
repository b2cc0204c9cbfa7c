"""SFT rows to examples: tokenized, checked, split into training and eval rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from afina.adapters.active import last_start
from afina.data.packing import train_eval_split
from afina.data.renderer import Example, Renderer
from afina.data.row_store import SelectedRows, StoredRows
from afina.data.schemas import SFT, SFTRow
from afina.data.several_files import file_number, mix_rows
from afina.data.table import Table, iter_parsed, read_table, summarize_skipped
from afina.errors import DataError, SettingsError
from afina.objectives.prepared import activation_tokens, count_rows
from afina.objectives.run_rows import hold_out_every_nth
from afina.settings import TrainSettings


def infer_objective(objective: str, rows: Sequence[SFTRow]) -> str:
    """Return the objective of "auto": pretrain for plain text, sft for rows with a completion.

    Raises:
        DataError: A row is plain text, and the objective is sft or other rows have a completion.
    """
    plain = [row.text is not None for row in rows]
    if objective == "auto" and all(plain):
        return "pretrain"
    if objective in ("auto", "sft") and any(plain):
        other = None if all(plain) else rows[plain.index(False)].where
        raise DataError(
            "plain text has no completion to train on",
            where=rows[plain.index(True)].where,
            why=other and f"{other} has a completion",
            hint="--objective pretrain" + (" trains all tokens of both" if other else ""),
        )
    return "sft" if objective == "auto" else objective


def tokenize_rows(
    objective: str,
    renderer: Renderer,
    rows: Sequence[SFTRow],
    skipped: list[str] | None,
    invocation: tuple[int, ...] = (),
) -> StoredRows[Example]:
    """Return rows as token ids with a loss mask.

    Args:
        objective: sft, or pretrain: then a text becomes chunks of at most `max_length` tokens.
        renderer: Renders the rows.
        rows: The rows.
        skipped: Rows that cannot be used are added here; None makes them an error.
        invocation: Only tokens after its last occurrence are targets, as the adapter is inactive
            before it.

    Raises:
        DataError: A row cannot be used, or none is left.
    """

    def make(where: str, row: SFTRow) -> list[Example]:
        if objective == "pretrain":
            tokenized = renderer.chunk_text(row, renderer.max_length)
        else:
            tokenized = renderer.examples(row)
        if not invocation:
            return tokenized
        return [mask_before_invocation(example, invocation) for example in tokenized]

    parsed = iter_parsed(((row.where, row) for row in rows), make, skipped)
    examples = StoredRows(example for tokenized in parsed for example in tokenized)
    if not examples:
        why = f"skipped: {summarize_skipped(skipped or [])}"
        raise DataError("no row is left to train on", why=why)
    return examples


def mask_before_invocation(example: Example, invocation: tuple[int, ...]) -> Example:
    """Return the example with targets only where an activated adapter is active.

    Raises:
        DataError: It is active on no token, or on none that is a target.
    """
    start = last_start(example.token_ids, invocation)
    if start is None:
        hint = "--invocation TEXT that stands in every row, or --skip-bad-rows"
        raise DataError("the invocation does not occur in this row", where=example.where, hint=hint)
    labels = [label and position > start for position, label in enumerate(example.loss_mask)]
    if not any(labels):
        what = "no target token follows the invocation"
        raise DataError(what, where=example.where, hint="--skip-bad-rows")
    return replace(example, loss_mask=labels)


@dataclass(frozen=True)
class TokenizedRows:
    """Training and eval rows as token ids; needs a tokenizer, and no model."""

    renderer: Renderer
    objective: str
    train: Sequence[Example]
    eval_examples: Sequence[Example]
    eval_sft_rows: Sequence[SFTRow]
    skipped: list[str]

    @property
    def counts(self) -> dict[str, Any]:
        """Figures of the rows, for `afina plan`."""
        targets = sum(sum(e.loss_mask) for e in self.train)
        counts = count_rows(self.train, self.eval_examples)
        return counts | {
            "longest": max(len(e.token_ids) for e in self.train),
            "labelled_percent": 100.0 * targets / counts["tokens"],
            **self.renderer.counts,
        }


def read_examples(settings: TrainSettings, table: Any, renderer: Renderer) -> TokenizedRows:
    """Return the rows of `table` rendered, checked and split."""
    objective = infer_objective(settings.objective, table.rows)
    if objective == "pretrain" and settings.truncate:
        why = "texts of any length are trained in chunks of max_length tokens"
        raise SettingsError(
            "truncate has no effect here", where="truncate", why=why, hint="leave it out"
        )
    skipped = list(table.skipped)
    train, eval_examples, eval_sft_rows = _split(settings, table, renderer, objective, skipped)
    train = mix_rows(train, table.files, settings.seed)
    return TokenizedRows(renderer, objective, train, eval_examples, eval_sft_rows, skipped)


def _split(
    settings: TrainSettings,
    source: Table[SFTRow],
    renderer: Renderer,
    objective: str,
    skipped: list[str],
) -> tuple[Sequence[Example], Sequence[Example], Sequence[SFTRow]]:
    """Return training examples, eval examples, and the rows of the latter."""
    invocation = activation_tokens(renderer, settings)
    leave_out = skipped if settings.skip_bad_rows else None
    if objective == "sft":
        renderer.check_template(source.rows)
    tokenized = tokenize_rows(objective, renderer, source.rows, leave_out, invocation)
    if settings.eval_data is not None:
        table = read_table(settings.eval_data, SFT, settings.columns, settings.skip_bad_rows)
        infer_objective(objective, table.rows)
        skipped += table.skipped
        held_out = tokenize_rows(objective, renderer, table.rows, leave_out, invocation)
        there = {example.where for example in held_out}
        kept = (n for n, row in enumerate(table.rows) if row.where in there)
        return tokenized, held_out, SelectedRows(table.rows, kept)
    if objective == "pretrain":  # one long text is one row: hold out chunks of it instead
        return *hold_out_every_nth(tokenized, settings.eval_size, source), []
    by_row: dict[str, list[int]] = {}
    for index, example in enumerate(tokenized):
        by_row.setdefault(example.where, []).append(index)
    with_examples = (n for n, row in enumerate(source.rows) if row.where in by_row)
    usable = SelectedRows(source.rows, with_examples)
    rows, eval_sft_rows = train_eval_split(
        usable, settings.eval_size, settings.seed, file_of=file_number(source.files)
    )
    train, eval_examples = (
        SelectedRows(tokenized, (index for row in some for index in by_row[row.where]))
        for some in (rows, eval_sft_rows)
    )
    return train, eval_examples, eval_sft_rows
