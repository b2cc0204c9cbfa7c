"""The interface of a schema: the fields of one kind of row, and how a record becomes one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from afina.data.columns import ColumnMapping, RawRecord
from afina.data.image_folder import read_image_folder
from afina.data.readers import Record
from afina.errors import DataError
from afina.settings.registry import Registry

RowT = TypeVar("RowT")


class Schema(ABC, Generic[RowT]):
    """One kind of row, read from any file format by `afina.data.table.read_table`.

    Attributes:
        name: Name under which the schema is registered.
        fields: Fields that a row can have; `--columns` gives them the file's column names.
        aliases: Other names that files use for a field; "input.messages" is `messages` in the
            object `input`. The field's own name is preferred where a record has a value under both.
        text_is_lines: Plain text has one row per line; otherwise one per document.
        reads_folders: A folder with one subfolder of images per class can be read.
        keeps_record: Rows keep their record, and any of its columns can be read later.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    text_is_lines: ClassVar[bool] = False
    reads_folders: ClassVar[bool] = False
    keeps_record: ClassVar[bool] = False

    @abstractmethod
    def is_header(self, fields: set[str]) -> bool:
        """Return whether the first line of a text is a CSV header, given the fields it names."""

    @abstractmethod
    def recognizes(self, records: Sequence[RawRecord]) -> str | None:
        """Return the format of records that are rows of this schema and of no other; else None.

        `--objective auto` calls this with the first record of a file.
        """

    def objective(self, format: str) -> str:
        """Return the objective that `--objective auto` selects for rows of this format."""
        return "auto"

    @abstractmethod
    def find_format(self, path: Path, mapping: ColumnMapping) -> str:
        """Return the format of a file with these columns; "" where only its rows decide.

        Raises:
            DataError: no row of this schema can have these columns; the hint is a `--columns`
                option.
        """

    @abstractmethod
    def parse(self, record: RawRecord) -> RowT:
        """Return the row of a record; raises `DataError` with file:line:field."""

    def format_of_rows(
        self, path: Path, format: str, records: Sequence[RawRecord], rows: Sequence[RowT]
    ) -> str:
        """Return the format of a file that was read; raises `DataError` if its rows are mixed."""
        return format

    def reading_rule(self, record: RawRecord) -> str:
        """Return how a record was read, where its shape can be read in several ways; else ""."""
        return ""

    def read_folder(self, path: Path) -> tuple[list[Record], str]:
        """Return the records of a folder and its sha256; raises `DataError`."""
        if not self.reads_folders:
            hint = "name one file in it, or --objective classify for pictures in folders"
            raise DataError("this is a folder", where=str(path), hint=hint)
        return read_image_folder(path)


ROW_SCHEMAS: Registry[type[Schema[Any]]] = Registry(
    "row schema",
    "afina.row_schemas",
    [
        f"afina.data.schemas.{name}"
        for name in ("sft", "preference", "prompt", "labeled", "embedding", "relevance", "tagged")
    ],
)
register_schema = ROW_SCHEMAS.register
