"""Rows for token labels: the words of a text with a tag each, such as the entities of NER.

{"tokens": [...], "ner_tags": [...]}   tags are texts, or integers; {"names": [...]} in the row or
                                       --tag.names gives integers their names
CoNLL files (.conll)                   a word a line, its tag in the last column, blank lines
                                       between sentences
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.columns import ColumnMapping, RawRecord, kind_of, list_columns, usable_text
from afina.data.schemas.base import Schema, register_schema
from afina.errors import DataError, pluralize

TAGGED_WORDS = "tagged-words"  # the format of such rows


@dataclass(frozen=True)
class TaggedRow:
    """The words of a text, and the tag of each."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return the row as a record that `read_table` reads again as this row."""
        return {"tokens": list(self.words), "tags": list(self.tags)}


@register_schema("tagged")
class TaggedSchema(Schema[TaggedRow]):
    """Words with a tag each."""

    name = "tagged"
    fields = ("tokens", "tags", "names")
    aliases = {
        "tokens": ("words", "text", "sentence"),
        "tags": ("ner_tags", "ner", "pos_tags", "upos", "labels", "label"),
        "names": ("label_names", "tag_names"),
    }

    def is_header(self, fields: set[str]) -> bool:
        """Return False: CSV cells hold no lists."""
        return False

    def recognizes(self, records: Sequence[RawRecord]) -> str | None:
        """Return the format of a record with two lists of the same length; else None."""
        if not records:
            return None
        words, tags = records[0].peek("tokens"), records[0].peek("tags")
        are_lists = isinstance(words, list) and isinstance(tags, list)
        if not are_lists or not words or not all(isinstance(word, str) for word in words):
            return None
        return TAGGED_WORDS if len(words) == len(tags) else None

    def objective(self, format: str) -> str:
        """Return "tag"."""
        return "tag"

    def find_format(self, path: Path, mapping: ColumnMapping) -> str:
        """Return the format; raises `DataError` without words or tags."""
        missing = {"tokens", "tags"} - mapping.fields_in(mapping.names)
        if missing:
            raise DataError(
                f"no column of {' and of '.join(sorted(missing))}",
                where=str(path),
                why=f"columns found: {list_columns(mapping.names)}",
                hint="lists of words and of tags: --columns '{tokens: words, tags: ner}'",
            )
        return TAGGED_WORDS

    def parse(self, record: RawRecord) -> TaggedRow:
        """Return the words of a record with their tags; raises `DataError`."""
        words = _items(record, "tokens")
        tags = _items(record, "tags")
        where = record.field_location("tags")
        for word in words:
            usable_text(word, record.field_location("tokens"))
        if len(words) != len(tags):
            what = f"{pluralize(len(words), 'word')} and {pluralize(len(tags), 'tag')}"
            raise DataError(what, where=where, hint="one tag for each word")
        names = record.get("names") if record.has("names") else None
        return TaggedRow(record.where, tuple(words), tuple(_name(t, names, where) for t in tags))


def _items(record: RawRecord, name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list) or not value:
        what = f"expected a list of {name}, found {kind_of(value)}"
        raise DataError(what, where=record.field_location(name))
    return value


def _name(tag: Any, names: Any, where: str) -> str:
    """Return the name of a tag; a number without names is its own name; raises `DataError`."""
    if isinstance(tag, str) and tag.strip():
        return tag.strip()
    if not isinstance(tag, int) or isinstance(tag, bool):
        raise DataError(f"expected the name or number of a tag, found {tag!r}", where=where)
    if names is None:
        return str(tag)
    if not isinstance(names, list) or not 0 <= tag < len(names):
        raise DataError(f"tag {tag} has no name", where=where, why=f"names: {names!r:.80}")
    return str(names[tag])
