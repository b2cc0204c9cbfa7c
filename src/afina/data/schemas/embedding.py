"""Rows for embeddings: two texts that belong together, others that do not, or two with a score.

pairs        {"anchor", "positive"}, {"query", "passage"}, {"sentence1", "sentence2"}, ...
triplets     {"anchor", "positive", "negative"}; a positive or negative can be a list of texts,
             and further columns negative_1, negative_2, ... are negatives too
scored       {"sentence1", "sentence2", "score"}: how similar two texts are, a number
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.columns import ColumnMapping, RawRecord, finite_number, usable_text
from afina.data.proposals import ask_for_reading
from afina.data.schemas.base import Schema, register_schema
from afina.errors import DataError

TEXT_PAIRS, TRIPLETS, SCORED = "text-pairs", "triplets", "scored-pairs"  # the formats
_NUMBERED_NEGATIVE = re.compile(r"(hard_)?neg(ative)?_?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class EmbeddingRow:
    """A text, the texts that are close to it, and those that are not.

    Attributes:
        where: Location of the row.
        anchor: The text, or a query.
        positives: Texts that belong to it; of a scored pair the second text.
        negatives: Texts that do not.
        score: How similar the two texts of a scored pair are.
    """

    where: str
    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    score: float | None = None

    def record(self) -> dict[str, Any]:
        """Return the row as a record that `read_table` reads again as this row."""
        record: dict[str, Any] = {"anchor": self.anchor, "positive": list(self.positives)}
        record |= {"negative": list(self.negatives)} if self.negatives else {}
        return record | ({} if self.score is None else {"score": self.score})


@register_schema("embedding")
class EmbeddingSchema(Schema[EmbeddingRow]):
    """Pairs of texts, triplets, and pairs with a score."""

    name = "embedding"
    fields = ("anchor", "positive", "negative", "score")
    aliases = {
        "anchor": (
            "query",
            "question",
            "sentence1",
            "sentence_1",
            "sentence_A",
            "text1",
            "text_a",
            "question1",
            "premise",
        ),
        "positive": (
            "positives",
            "pos",
            "sentence2",
            "sentence_2",
            "sentence_B",
            "text2",
            "text_b",
            "question2",
            "hypothesis",
            "passage",
            "document",
            "answer",
        ),
        "negative": ("negatives", "neg", "hard_negative", "hard_negatives"),
        "score": ("similarity", "similarity_score", "relatedness_score", "label"),
    }

    def is_header(self, fields: set[str]) -> bool:
        """Return whether a CSV header names both texts."""
        return {"anchor", "positive"} <= fields

    def recognizes(self, records: Sequence[RawRecord]) -> str | None:
        """Return the format of a record that names a positive by that name; else None.

        Other pairs of texts can be questions with answers, or texts with a label.
        """
        if not records:
            return None
        first = records[0]
        names = {name.lower() for name in first.raw}
        has_names = names & {"anchor", "query", "question"} and names & {"positive", "pos"}
        return (TRIPLETS if first.has("negative") else TEXT_PAIRS) if has_names else None

    def objective(self, format: str) -> str:
        """Return "embed"."""
        return "embed"

    def find_format(self, path: Path, mapping: ColumnMapping) -> str:
        """Return "", since the rows decide; raises `DataError` without two columns of texts."""
        if not {"anchor", "positive"} <= mapping.fields_in(mapping.names):
            raise ask_for_reading(path, mapping, "no two columns of texts that belong together")
        return ""

    def parse(self, record: RawRecord) -> EmbeddingRow:
        """Return the texts of a record; raises `DataError`."""
        anchor = record.text("anchor")
        positives, negatives = _texts(record, "positive"), _texts(record, "negative")
        for name in filter(_NUMBERED_NEGATIVE.fullmatch, record.raw):
            record.columns_read.add(name)
            negatives += _as_texts(record.value_of(name), f"{record.where}:{name}")
        if not positives:
            raise DataError("the field is empty", where=record.field_location("positive"))
        same = set(positives) & set(negatives)
        if same:
            where = record.field_location("negative")
            raise DataError("a text is positive and negative", where=where, why=repr(same.pop()))
        score = None
        if record.has("score") and record.get("score") != "":
            score = finite_number(record.get("score"), record.field_location("score"))
            if len(positives) > 1 or negatives:
                what = "a score with several texts: it belongs to two"
                raise DataError(what, where=record.field_location("score"))
        return EmbeddingRow(record.where, anchor, positives, negatives, score)

    def format_of_rows(
        self, path: Path, format: str, records: Sequence[RawRecord], rows: Sequence[EmbeddingRow]
    ) -> str:
        """Return "scored-pairs", "triplets" or "text-pairs"; raises `DataError` for a mixture."""
        scored = [row.score is not None for row in rows]
        if any(scored) and not all(scored):
            odd = rows[scored.index(False)]
            why = f"the row of {rows[scored.index(True)].where} has one"
            raise DataError("the score is missing", where=odd.where, why=why)
        if any(scored):
            return SCORED
        return TRIPLETS if any(row.negatives for row in rows) else TEXT_PAIRS


def _texts(record: RawRecord, name: str) -> tuple[str, ...]:
    if not record.has(name):
        return ()
    return _as_texts(record.get(name), record.field_location(name))


def _as_texts(value: Any, where: str) -> tuple[str, ...]:
    """Return a text, or the texts of a list, each once; raises `DataError`."""
    if value in (None, ""):
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(usable_text(text, where) for text in values))
