"""Rows for rerankers: a query, a passage, and whether the passage answers it.

{"query", "passage", "label"}: the label is 0 or 1, true or false, or a score
"""

from collections.abc import Sequence
from pathlib import Path

from afina.data.columns import ColumnMapping, RawRecord, finite_number
from afina.data.proposals import ask_for_reading
from afina.data.schemas.base import Schema, register_schema
from afina.data.schemas.labeled import LabeledRow

QUERY_PASSAGES = "query-passages"  # the format of such rows
_BOOLEAN_LABELS = {"true": 1.0, "false": 0.0}  # in a CSV file


@register_schema("relevance")
class RelevanceSchema(Schema[LabeledRow]):
    """Queries with passages, each with a label; rows are labeled pairs of texts."""

    name = "relevance"
    fields = ("query", "passage", "label")
    aliases = {
        "query": ("question", "anchor", "text", "sentence1"),
        "passage": ("document", "doc", "text_pair", "sentence2", "answer"),
        "label": ("labels", "score", "relevance", "relevance_score"),
    }

    def is_header(self, fields: set[str]) -> bool:
        """Return whether a CSV header names a query and a passage."""
        return {"query", "passage"} <= fields

    def recognizes(self, records: Sequence[RawRecord]) -> str | None:
        """Return the format of a record that names a query, a passage and a label so; else None."""
        if not records:
            return None
        names = {name.lower() for name in records[0].raw}
        wanted = ({"query", "question"}, {"passage", "document", "doc"}, {"label", "relevance"})
        return QUERY_PASSAGES if all(names & group for group in wanted) else None

    def objective(self, format: str) -> str:
        """Return "rerank"."""
        return "rerank"

    def find_format(self, path: Path, mapping: ColumnMapping) -> str:
        """Return the format; raises `DataError` without one of the columns."""
        missing = set(self.fields) - mapping.fields_in(mapping.names)
        if missing:
            raise ask_for_reading(path, mapping, f"no column for {' and '.join(sorted(missing))}")
        return QUERY_PASSAGES

    def parse(self, record: RawRecord) -> LabeledRow:
        """Return the pair of texts with its label as a number; raises `DataError`."""
        query, passage, label = record.text("query"), record.text("passage"), record.get("label")
        if isinstance(label, str):
            label = _BOOLEAN_LABELS.get(label.strip().lower(), label)
        number = finite_number(label, record.field_location("label"))
        return LabeledRow(record.where, query, number, passage)
