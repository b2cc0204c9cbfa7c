"""SFT rows to examples: tokenized, checked, split into training and eval rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from afina.adapters.active import last_start
from afina.data.packing import train_eval_split
from afina.data.renderer import Example, Renderer
from afina.data.schemas import SFT, SFTRow
from afina.data.table import parse_rows, read_table, summarize_skipped
from afina.errors import DataError
from afina.io.chat_format import ChatFormat
from afina.objectives.prepared import activation_tokens, hold_out_every_nth
from afina.settings import TrainSettings


def infer_objective(objective: str, rows: Sequence[SFTRow]) -> str:
    """The objective meant by "auto": pretrain for plain text, sft for everything with an answer."""
    plain = [row.text is not None for row in rows]
    if objective == "auto":
        return "pretrain" if all(plain) else "sft"
    if objective == "sft" and any(plain):
        where = rows[plain.index(True)].where
        raise DataError(
            "plain text has no answers to learn", where=where, hint="--objective pretrain"
        )
    return objective


def tokenize_rows(
    objective: str,
    renderer: Renderer,
    rows: Sequence[SFTRow],
    skipped: list[str] | None,
    invocation: tuple[int, ...] = (),
) -> list[Example]:
    """Rows as labelled tokens. A row that cannot be used is an error, or is listed in `skipped` when that is given.

    With an `invocation`, only what follows its last occurrence carries labels: before it the adapter does not act.
    """

    def make(where: str, row: SFTRow) -> list[Example]:
        made = (
            renderer.chunk_text(row, renderer.max_length)
            if objective == "pretrain"
            else renderer.examples(row)
        )
        return (
            [mask_before_invocation(example, invocation) for example in made]
            if invocation
            else made
        )

    examples = [
        example
        for made in parse_rows(((row.where, row) for row in rows), make, skipped)
        for example in made
    ]
    if not examples:
        raise DataError(
            "no row is left to learn from", why=f"skipped: {summarize_skipped(skipped or [])}"
        )
    return examples


def mask_before_invocation(example: Example, invocation: tuple[int, ...]) -> Example:
    """The example with labels only where an activated adapter acts; raises `DataError` where it never does."""
    start = last_start(example.token_ids, invocation)
    if start is None:
        hint = "--invocation TEXT that stands in every row, or --skip-bad-rows"
        raise DataError("the invocation does not occur in this row", where=example.where, hint=hint)
    labels = [label and position > start for position, label in enumerate(example.loss_mask)]
    if not any(labels):
        raise DataError(
            "nothing to learn after the invocation", where=example.where, hint="--skip-bad-rows"
        )
    return replace(example, loss_mask=labels)


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
            **self.renderer.counts,
        }


def read_examples(
    settings: TrainSettings, table: Any, tokenizer: Any, context: int
) -> TokenizedRows:
    """The rows of `table` rendered, checked and split, for a model that reads `context` tokens."""
    renderer = Renderer(
        tokenizer, ChatFormat.from_settings(settings), settings.max_length or min(context, 2048)
    )
    objective = infer_objective(settings.objective, table.rows)
    invocation = activation_tokens(renderer, settings)
    skipped = list(table.skipped)
    train, held, held_rows = _split(settings, table.rows, renderer, objective, skipped, invocation)
    return TokenizedRows(table, renderer, objective, invocation, train, held, held_rows, skipped)


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
    made: dict[str, list[Example]] = {}
    for example in tokenize_rows(objective, renderer, all_rows, leave_out, invocation):
        made.setdefault(example.where, []).append(example)
    rows, held_rows = train_eval_split(
        [row for row in all_rows if row.where in made], settings.eval_size, settings.seed
    )
    train, held = (
        [example for row in part for example in made[row.where]] for part in (rows, held_rows)
    )
    return train, held, held_rows
