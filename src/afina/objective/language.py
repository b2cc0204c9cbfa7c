"""Next-token objectives: supervised fine-tuning on the answers, and continued pretraining on whole texts.

    loss = - sum over labelled t of log p(token[t+1] | tokens up to t)   /   number of labelled t

The two differ only in which tokens carry a label.
"""

from collections.abc import Sequence

from torch import Tensor

from afina.base.model import Base
from afina.data.batches import FlatBatch
from afina.data.formats import Row
from afina.data.template import Example, Renderer
from afina.errors import DataError


def choose(objective: str, rows: Sequence[Row]) -> str:
    """The objective meant by "auto": pretrain for plain text, sft for everything with an answer."""
    plain = [row.text is not None for row in rows]
    if objective == "auto":
        return "pretrain" if all(plain) else "sft"
    if objective == "sft" and any(plain):
        where = rows[plain.index(True)].where
        raise DataError("plain text has no answers to learn", where=where, hint="--objective pretrain")
    if objective == "pretrain" and not all(plain):
        where = rows[plain.index(False)].where
        raise DataError("pretraining takes plain text, these are rows with answers", where=where, hint="--objective sft")
    return objective


def make_examples(objective: str, renderer: Renderer, rows: Sequence[Row], skipped: list[str] | None) -> list[Example]:
    """Rows as labelled tokens. A row that cannot be used is an error, or is listed in `skipped` when that is given."""
    examples: list[Example] = []
    for row in rows:
        try:
            examples += renderer.texts(row, renderer.max_length) if objective == "pretrain" else [renderer.example(row)]
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(f"{error.where or row.where}: {error.what}")
    if not examples:
        raise DataError("no row is left to learn from", why=f"{len(skipped or [])} rows were skipped")
    return examples


def token_loss(base: Base, batch: FlatBatch) -> Tensor:
    """Sum over the batch's labels of the cross-entropy in nats; divide by `batch.label_count` for the mean."""
    return base.loss(batch.tokens, batch.positions, batch.bounds, batch.labels)
