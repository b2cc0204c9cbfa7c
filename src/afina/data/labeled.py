"""Rows with a label: text in CSV, JSONL or Parquet, pictures in folders named after their classes or in Parquet."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.formats import check_columns, first_names, read_records
from afina.data.skipped import parse_rows
from afina.errors import DataError, did_you_mean

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TEXT_NAMES, LABEL_NAMES = ("text", "sentence", "prompt"), ("label", "class", "category")
IMAGE_NAMES = ("image", "img", "picture")
OTHER_FORMATS = {"messages", "conversations", "prompt", "completion", "instruction", "output"}
FIELDS = ("text", "prompt", "image", "label")  # what --columns can give another name

Record = tuple[str, dict[str, Any] | DataError]


@dataclass(frozen=True)
class LabeledRow:
    """One row: where it came from, what is to be classified (text, or a picture as it lies in its file), its class."""

    where: str
    content: str | bytes
    label: str


@dataclass(frozen=True)
class LabelledTable:
    """All rows of a source, and the classes in order of their names."""

    path: Path
    format: str  # "pictures" or "text"
    rows: list[LabeledRow]
    skipped: list[str]
    digest: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, sorted; numbers by their value."""
        names = {row.label for row in self.rows}
        return tuple(
            sorted(names, key=lambda name: (0, int(name), "") if name.isdigit() else (1, 0, name))
        )


def read_labelled(
    path: Path, columns: Mapping[str, str], skip_bad_rows: bool = False
) -> LabelledTable:
    """Labelled rows of a folder of pictures or of a table; raises `DataError` with file:line:field."""
    return _read_folder(path) if path.is_dir() else _read_file(path, columns, skip_bad_rows)


def has_labels(path: Path, columns: Mapping[str, str]) -> bool:
    """Whether this is meant for a classifier: a folder, or a table with labels beside texts or pictures, and no answers."""
    if path.is_dir():
        return True
    label = columns.get("label", "label")
    try:
        names = first_names(path, lambda names: label in names)
    except DataError:  # said again, and better, by who reads it all
        return False
    content = {*TEXT_NAMES[:2], *IMAGE_NAMES, columns.get("text"), columns.get("image")}
    return label in names and not names & OTHER_FORMATS and bool(names & content)


def _read_folder(path: Path) -> LabelledTable:
    """path/CLASS/picture.png: the class is the name of the folder."""
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(
            "no pictures here",
            where=str(path),
            hint="one folder a class: DATA/cat/1.png, DATA/dog/2.png, ...",
        )
    digest, rows = hashlib.sha256(), []
    for file in files:
        content = read_picture(file)
        digest.update(file.relative_to(path).as_posix().encode() + hashlib.sha256(content).digest())
        rows.append(LabeledRow(str(file), content, file.parent.name))
    return LabelledTable(path, "pictures", rows, [], digest.hexdigest())


def read_picture(file: Path) -> bytes:
    """The bytes of a picture's file; raises `DataError` where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the picture: {error.strerror}", where=str(file)) from None


def open_picture(content: bytes, where: str) -> Any:
    """A PIL image, decoded; raises `DataError` where the bytes are none, or too many pixels to be honest."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            "not a picture, or a damaged one", where=where, hint="--skip-bad-rows leaves it out"
        ) from error
    return image


def _read_file(path: Path, columns: Mapping[str, str], skip_bad_rows: bool) -> LabelledTable:
    """A table with a column of text or pictures and one of labels."""
    check_columns(path, columns, FIELDS)
    wanted = {columns.get("label")} if "label" in columns else set(LABEL_NAMES)
    records, digest = read_records(path, lambda names: bool(wanted & set(names)))
    _check_names(path, records, columns)
    skipped: list[str] = []
    rows = parse_rows(
        records,
        lambda where, record: _row(where, record, columns),
        skipped if skip_bad_rows else None,
    )
    kinds = {type(row.content) for row in rows}
    if len(kinds) > 1:
        raise DataError(
            "some rows have a picture and some a text", where=str(path), hint="a file for each"
        )
    return LabelledTable(path, "pictures" if kinds == {bytes} else "text", rows, skipped, digest)


def _check_names(path: Path, records: list[Record], columns: Mapping[str, str]) -> None:
    """Raise `DataError` where a column that the user named, or the one of labels, is in no record."""
    names = list(
        dict.fromkeys(
            str(name) for _, record in records if isinstance(record, dict) for name in record
        )
    )
    found = ", ".join(name[:40] for name in names[:20]) or "none"
    for ours, theirs in columns.items():
        if names and theirs not in names:
            why = f"--columns calls it {ours}; columns found: {found}"
            raise DataError(
                f"no column {theirs!r}", where=str(path), why=why, hint=did_you_mean(theirs, names)
            )
    if names and "label" not in columns and not set(LABEL_NAMES) & set(names):
        hint = "name yours: --columns '{text: sentence, label: class}'"
        raise DataError(
            "no column of labels", where=str(path), why=f"columns found: {found}", hint=hint
        )


def _row(where: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> LabeledRow:
    label = _pick(record, columns.get("label"), LABEL_NAMES)
    picture = _pick(record, columns.get("image"), IMAGE_NAMES)
    text = _pick(record, columns.get("text", columns.get("prompt")), TEXT_NAMES)
    if label is None or (text is None and picture is None):
        hint = f"its columns are {', '.join(map(str, record))}; name yours: --columns '{{text: sentence, label: class}}'"
        raise DataError(
            f"no {'label' if label is None else 'text or image'}", where=where, hint=hint
        )
    if picture is not None:
        content = picture["bytes"] if isinstance(picture, dict) else picture
        if not isinstance(content, bytes):
            raise DataError("not a picture", where=f"{where}:image", why="expected its bytes")
        return LabeledRow(where, content, str(label))
    if not isinstance(text, str) or not text.strip():
        raise DataError("empty text", where=f"{where}:text")
    return LabeledRow(where, text, str(label))


def _pick(record: Mapping[str, Any], told: str | None, usual: tuple[str, ...]) -> Any:
    names = (told,) if told else usual
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)
