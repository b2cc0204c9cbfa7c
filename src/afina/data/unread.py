"""Columns that the rows of a schema do not read: named where they mean nothing, else refused.

An id, a source or a date says nothing to a model. A column that repeats what was read (the prompt
of messages that begin with it) adds nothing. Any other column whose name has a meaning for
training would change what is learned, and is an error with the option that uses it or leaves it
out.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.data.columns import RawRecord, columns_flag
from afina.data.names import CHOICES, LABEL_NAMES, SYSTEM, WORDED, meaning_of, refused_meaning
from afina.data.schemas.messages import SPEAKER_KEYS, TURN_KEYS, unread_turn_keys
from afina.errors import DataError, pluralize

if TYPE_CHECKING:
    from afina.data.schemas import Schema


class UnreadColumns:
    """Columns that were not read of the records seen so far.

    Attributes:
        counts: Number of records that have a value in a column.
    """

    def __init__(self, schema: "Schema[Any]") -> None:
        self.counts: Counter[str] = Counter()
        self._schema = schema
        self._refused: dict[str, tuple[RawRecord, str]] = {}  # the first record, and the meaning

    def add(self, record: RawRecord) -> None:
        """Look at a record that has become a row."""
        unread = record.unread() | unread_turn_keys(record)
        self.counts.update(map(str, unread))
        texts = None
        for name, value in unread.items():
            if name in self._refused or self._schema.keeps_record:
                continue
            meaning = refused_meaning(str(name), value)
            if meaning is None:
                continue
            texts = _leaves_read(record) if texts is None else texts
            if not _repeats(value, texts):
                self._refused[name] = record, meaning

    def check(self, path: Path, format: str) -> dict[str, int]:
        """Return the counts by column.

        Raises:
            DataError: the name of such a column has a meaning, and its values add something.
        """
        for name, (record, meaning) in self._refused.items():
            if format == "text" and self._schema.name == "sft" and name in LABEL_NAMES:
                continue  # labels next to texts are learned unless the text alone is requested
            count = self.counts[name]
            raise _unread_error(path, self._schema, format, record, name, meaning, count)
        return dict(self.counts)


def list_unused(counts: Mapping[str, int]) -> str:
    """Return "id (12 rows), url (12 rows)" of columns that were not used; "" for none."""
    return ", ".join(f"{name} ({pluralize(count, 'row')})" for name, count in counts.items())


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts in a value; of a turn, those that a reader of turns reads but its role."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Mapping):
        is_turn = bool(value.keys() & SPEAKER_KEYS)
        for key in TURN_KEYS - SPEAKER_KEYS if is_turn else value:
            yield from _leaves(value.get(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None and not isinstance(value, bytes):
        yield str(value)


def _leaves_read(record: RawRecord) -> list[str]:
    return [leaf for c in record.columns_read for leaf in _leaves(record.value_of(c))]


def _repeats(value: Any, texts_read: Sequence[str]) -> bool:
    """Whether all texts of a value stand in what was read, or all that was read stands in it."""
    leaves = list(_leaves(value))
    read, own = "\n".join(texts_read), "\n".join(leaves)
    # a single word stands in some text by chance
    adds_nothing = all(leaf in (read if " " in leaf else texts_read) for leaf in leaves)
    return adds_nothing or (" " in own and all(text in own for text in texts_read))


def _unread_error(
    path: Path,
    schema: "Schema[Any]",
    format: str,
    record: RawRecord,
    name: str,
    meaning: str,
    count: int,
) -> DataError:
    given = dict(record.mapping.given) | dict.fromkeys(sorted(record.mapping.left_out))
    hint = f"leave it out: {columns_flag(given | {name: None})}"
    use = _use_of(schema, record, name, given)
    return DataError(
        f"the column {name!r} would not be read, and its name means {meaning}",
        where=f"{record.where}:{name}",
        why=f"{pluralize(count, 'row')} of {path.name} have a value there; rows of format "
        f"{format} do not have it",
        hint=f"{use}; or {hint}" if use else hint,
    )


def _use_of(
    schema: "Schema[Any]", record: RawRecord, name: str, given: Mapping[str, Any]
) -> str | None:
    """Return what to type for a column to be read; None where there is no way."""
    role = meaning_of(name)
    if schema.name == "labeled" and role in WORDED:
        return f"read it as a second text: {columns_flag({**given, 'text_pair': name})}"
    is_rating = str(record.raw.get(name)).lower() in ("true", "false", "0", "1")
    if schema.name == "sft" and name in LABEL_NAMES and record.has("completion") and is_rating:
        return "learn from good and bad answers: --objective kto"
    if role == SYSTEM and schema.name in ("sft", "preference"):
        return f"read it as the system message: {columns_flag({**given, 'system': name})}"
    has_prompt = "prompt" in schema.fields and record.has("prompt")
    if role in WORDED and has_prompt and "." not in name:
        prompt = record.mapping.column_of("prompt", record.raw)
        both = f"{{{name}}}\n\n{{{prompt}}}"
        return f"put it before the prompt: {columns_flag({**given, 'prompt': both})}"
    if role == CHOICES and has_prompt:
        both = f"{{{record.mapping.column_of('prompt', record.raw)}}}\n\n{{{name}}}"
        return f"put them after the prompt: {columns_flag({**given, 'prompt': both})}"
    return None
