"""The rows of a run: read from its files, and split into training and eval rows."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from afina.data.image_folder import find_split_folders
from afina.data.packing import train_eval_split
from afina.data.row_store import SelectedRows
from afina.data.schemas import Schema
from afina.data.several_files import HasLocation, file_number, join_tables
from afina.data.table import Table, read_table
from afina.errors import DataError
from afina.settings import TrainSettings
from afina.settings.data_files import DataFile, DataFiles

Piece = TypeVar("Piece", bound=HasLocation)
RowT = TypeVar("RowT")


def hold_out_every_nth(
    pieces: Sequence[Piece], share: float, table: Table[Any]
) -> tuple[Sequence[Piece], Sequence[Piece]]:
    """Return training chunks of a text and every n-th chunk as eval rows, `share` of each file.

    Raises:
        DataError: No file has two chunks.
    """
    number, by_file = file_number(table.files), dict[int, list[int]]()
    for index, piece in enumerate(pieces):
        by_file.setdefault(number(piece), []).append(index)
    train: list[int] = []
    eval_pieces: list[int] = []
    for own in by_file.values():
        step = min(len(own), max(2, round(1 / share)))
        chosen = [len(own) > 1 and n % step == step - 1 for n in range(len(own))]
        train += [piece for piece, is_eval in zip(own, chosen, strict=True) if not is_eval]
        eval_pieces += [piece for piece, is_eval in zip(own, chosen, strict=True) if is_eval]
    if not eval_pieces:
        raise DataError(
            "too little text to hold some out",
            where=str(table.path),
            hint="a smaller --max-length, or --eval-data FILE",
        )
    return SelectedRows(pieces, train), SelectedRows(pieces, eval_pieces)


def with_split_folders(settings: TrainSettings) -> TrainSettings:
    """Return settings with the parts of a folder of pictures as training and eval rows."""
    parts = find_split_folders(settings.data) if isinstance(settings.data, Path) else None
    if parts is None:
        return settings
    update: dict[str, Any] = {"data": parts.train}
    update |= {"eval_data": parts.eval} if settings.eval_data is None else {}
    return settings.model_copy(update=update)


def unread_folders(settings: TrainSettings) -> list[str]:
    """Return the parts of a folder of pictures that a run neither trains nor evaluates on."""
    parts = find_split_folders(settings.data) if isinstance(settings.data, Path) else None
    if parts is None:
        return []
    evaluated = (settings.eval_data or parts.eval).resolve()
    return [str(part) for part in (parts.eval, *parts.others) if part.resolve() != evaluated]


def split_eval_rows(
    settings: TrainSettings,
    table: Table[RowT],
    schema: Schema[RowT],
    key: Callable[[RowT], object],
    skipped: list[str],
) -> tuple[Sequence[RowT], Sequence[RowT]]:
    """Return training rows and eval rows: those of `eval_data`, or some held out of each file.

    Rows with an equal `key` are on one side; rows of `eval_data` that cannot be used are added to
    `skipped` where they may be left out.
    """
    if settings.eval_data is not None:
        other = read_table(settings.eval_data, schema, settings.columns, settings.skip_bad_rows)
        skipped += other.skipped
        return table.rows, other.rows
    group = file_number(table.files)
    return train_eval_split(table.rows, settings.eval_size, settings.seed, key, group)


def read_files(settings: TrainSettings, schema: Schema[RowT]) -> Table[RowT]:
    """Return the rows of all files of a run; raises `DataError` as `read_table` does."""
    skip = settings.skip_bad_rows
    files = settings.data_files

    def read(file: DataFile) -> Table[RowT]:
        try:
            return read_table(file.path, schema, file.columns, skip)
        except DataError as error:
            error.hint = _hint_for_one(error.hint, file, files)
            raise

    return join_tables(list(map(read, files)), [file.weight for file in files])


def _hint_for_one(hint: str | None, file: DataFile, files: DataFiles) -> str | None:
    """Return a hint about `--columns` for one of several files: the others have other columns."""
    mapping = re.search(r"--columns '(\{.*?\})'", hint or "")
    if mapping is None or len(files) == 1:
        return hint
    items = []
    for other in files:
        parts = [f"path: {other.path}"]
        parts += [f"weight: {other.weight:g}"] if other.weight is not None else []
        parts += [f"columns: {mapping[1]}"] if other is file else []
        items.append(f"{{{', '.join(parts)}}}")
    return f"{hint}\n        for this file alone: --data '[{', '.join(items)}]'"
