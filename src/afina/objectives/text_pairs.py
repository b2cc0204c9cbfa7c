"""Pairs of texts for embeddings: tokenized, split, and batches with each text once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afina.data.row_store import StoredRows
from afina.data.schemas import EmbeddingRow
from afina.data.table import iter_parsed
from afina.data.truncation import CutRows
from afina.errors import DataError
from afina.models.encoder import Encoder
from afina.objectives.labeled_data import encode_input

Tokens = tuple[int, ...]
KnownPositives = Mapping[Tokens, set[Tokens]]  # of each anchor


@dataclass(frozen=True)
class PairExample:
    """A pair of texts as token ids, with negatives or with a score."""

    where: str
    anchor: Tokens
    positive: Tokens
    negatives: tuple[Tokens, ...] = ()
    score: float | None = None

    @property
    def texts(self) -> tuple[Tokens, ...]:
        """All its texts."""
        return (self.anchor, self.positive, *self.negatives)


@dataclass(frozen=True)
class PairTable:
    """Which text is compared with which; texts are indices into `texts`, where each occurs once.

    Attributes:
        texts: Token ids.
        anchors: `(num_pairs,)`.
        positives: `(num_pairs,)`, the text of each pair that belongs to the anchor.
        candidates: `(num_candidates,)`, the positives and negatives of all pairs, each once.
        targets: `(num_pairs,)`: of each positive its index among the candidates, or the score.
        left_out: `(2, n)`, a pair and a candidate that is no negative of it: the anchor itself, or
            another of its positives.
    """

    texts: tuple[Tokens, ...]
    anchors: Tensor
    positives: Tensor
    candidates: Tensor
    targets: Tensor
    left_out: Tensor

    @classmethod
    def of(cls, rows: Sequence[PairExample], known: KnownPositives) -> "PairTable":
        """Return the table of some pairs; `known` has the positives of each anchor."""
        number = {text: n for n, text in enumerate(dict.fromkeys(t for r in rows for t in r.texts))}
        candidates = list(dict.fromkeys(t for row in rows for t in row.texts[1:]))
        index_of = {text: n for n, text in enumerate(candidates)}
        if rows[0].score is not None:
            targets = torch.tensor([row.score for row in rows])
        else:
            targets = torch.tensor([index_of[row.positive] for row in rows])
        left_out = [
            (n, index_of[text])
            for n, row in enumerate(rows)
            for text in {row.anchor, *known.get(row.anchor, ())} - {row.positive, *row.negatives}
            if text in index_of
        ]
        return cls(
            tuple(number),
            torch.tensor([number[row.anchor] for row in rows]),
            torch.tensor([number[row.positive] for row in rows]),
            torch.tensor([number[text] for text in candidates]),
            targets,
            torch.tensor(left_out, dtype=torch.long).view(-1, 2).T,
        )

    def select(self, pairs: slice) -> "PairTable":
        """Return the table of some of the pairs, with all candidates."""
        kept = torch.arange(len(self.anchors))[pairs]
        new = torch.full((len(self.anchors),), -1).index_copy(0, kept, torch.arange(len(kept)))
        rows, columns = self.left_out
        inside = new[rows] >= 0
        return replace(
            self,
            anchors=self.anchors[pairs],
            positives=self.positives[pairs],
            targets=self.targets[pairs],
            left_out=torch.stack([new[rows[inside]], columns[inside]]),
        )


@dataclass(frozen=True)
class PairBatch:
    """Model inputs of the texts of some pairs, and what is compared."""

    inputs: dict[str, Tensor]
    table: PairTable

    def shard(self, number: int, of: int) -> "PairBatch":
        """Return every `of`-th pair from `number` on, among all candidates, as in one process."""
        return replace(self, table=self.table.select(slice(number, None, of)))


def tokenize_pairs(
    base: Encoder,
    rows: Sequence[EmbeddingRow],
    max_length: int,
    max_score: float,
    skipped: list[str] | None,
    cut_rows: CutRows | None = None,
) -> Sequence[PairExample]:
    """Return rows as token ids, one example for each positive of a row.

    Args:
        base: The encoder.
        rows: The rows.
        max_length: Longest text in tokens.
        max_score: The score of equal texts.
        skipped: Rows that cannot be used are added here; None makes them an error.
        cut_rows: Longer texts lose their end and are added here; None makes them an error.

    Raises:
        DataError: A row cannot be used, or none is left.
    """

    def make(where: str, row: EmbeddingRow) -> list[PairExample]:
        anchor, *others = (
            tuple(encode_input(base, text, max_length, where, None, cut_rows))
            for text in (row.anchor, *row.positives, *row.negatives)
        )
        positives, negatives = others[: len(row.positives)], tuple(others[len(row.positives) :])
        score = None if row.score is None else row.score / max_score
        if score is not None and not -1 <= score <= 1:
            raise DataError(
                f"the score {row.score:g} is no cosine: it is outside -1 to 1",
                where=f"{where}:score",
                hint=f"--embed.max-score {abs(row.score or 0):g}, or the highest score there is; "
                "labels of classes are for --objective classify",
            )
        return [PairExample(where, anchor, positive, negatives, score) for positive in positives]

    parsed = iter_parsed(((row.where, row) for row in rows), make, skipped)
    tokenized = StoredRows(pair for pairs in parsed for pair in pairs)
    if not tokenized:
        raise DataError("no row is left to train on")
    return tokenized


def known_positives(*examples: Sequence[PairExample]) -> KnownPositives:
    """Return the positives of each anchor."""
    known: dict[Tokens, set[Tokens]] = {}
    for example in (one for some in examples for one in some):
        known.setdefault(example.anchor, set()).add(example.positive)
    return known
