"""Rows with a label: text in CSV, JSONL or Parquet, pictures in folders named after their classes or in Parquet."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.formats import read_records
from afina.errors import DataError

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TEXT_NAMES, LABEL_NAMES = ("text", "sentence", "prompt"), ("label", "class", "category")
IMAGE_NAMES = ("image", "img", "picture")


@dataclass(frozen=True)
class Labelled:
    """One row: where it came from, what is to be classified (text, or an opened picture), its class."""

    where: str
    content: Any
    label: str


@dataclass(frozen=True)
class LabelledTable:
    """All rows of a source, and the classes in order of their names."""

    path: Path
    format: str  # "pictures" or "text"
    rows: list[Labelled]
    skipped: list[str]
    digest: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, sorted; numbers by their value."""
        names = {row.label for row in self.rows}
        return tuple(sorted(names, key=lambda name: (0, int(name), "") if name.isdigit() else (1, 0, name)))


def read_labelled(path: Path, columns: Mapping[str, str], skip_bad_rows: bool = False) -> LabelledTable:
    """Labelled rows of a folder of pictures or of a table; raises `DataError` with file:line:field."""
    table = _read_folder(path, skip_bad_rows) if path.is_dir() else _read_file(path, columns, skip_bad_rows)
    if len(table.labels) < 2:
        only = table.labels[0] if table.labels else "bad"
        raise DataError("fewer than two classes", where=str(path), why=f"all rows are {only!r}")
    return table


def _read_folder(path: Path, skip_bad_rows: bool) -> LabelledTable:
    """path/CLASS/picture.png: the class is the name of the folder."""
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in PICTURES)
    if not files:
        raise DataError("no pictures here", where=str(path), hint="one folder a class: DATA/cat/1.png, DATA/dog/2.png, ...")
    digest, rows, skipped = hashlib.sha256(), [], []
    for file in files:
        content = file.read_bytes()
        digest.update(file.relative_to(path).as_posix().encode() + hashlib.sha256(content).digest())
        try:
            rows.append(Labelled(str(file), _open(content, str(file)), file.parent.name))
        except DataError as error:
            if not skip_bad_rows:
                raise
            skipped.append(f"{error.where}: {error.what}")
    return LabelledTable(path, "pictures", rows, skipped, digest.hexdigest())


def _open(content: bytes, where: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise DataError("not a picture, or a damaged one", where=where, hint="--skip-bad-rows leaves it out") from error
    return image


def _read_file(path: Path, columns: Mapping[str, str], skip_bad_rows: bool) -> LabelledTable:
    """A table with a column of text or pictures and one of labels."""
    wanted = {columns.get("label")} if "label" in columns else set(LABEL_NAMES)
    records, digest = read_records(path, lambda names: bool(wanted & set(names)))
    rows, skipped = [], []
    pictures = False
    for where, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            row = _row(where, record, columns)
        except DataError as error:
            if not skip_bad_rows:
                raise
            skipped.append(f"{error.where}: {error.what}")
            continue
        pictures = pictures or not isinstance(row.content, str)
        rows.append(row)
    return LabelledTable(path, "pictures" if pictures else "text", rows, skipped, digest)


def _row(where: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> Labelled:
    label = _pick(record, columns.get("label"), LABEL_NAMES)
    picture = _pick(record, columns.get("image"), IMAGE_NAMES)
    text = _pick(record, columns.get("text", columns.get("prompt")), TEXT_NAMES)
    if label is None or (text is None and picture is None):
        hint = f"its columns are {', '.join(map(str, record))}; name yours: --columns '{{text: sentence, label: class}}'"
        raise DataError(f"no {'label' if label is None else 'text or image'}", where=where, hint=hint)
    if picture is not None:
        content = picture["bytes"] if isinstance(picture, dict) else picture
        if not isinstance(content, bytes):
            raise DataError("not a picture", where=f"{where}:image", why="expected its bytes")
        return Labelled(where, _open(content, where), str(label))
    if not isinstance(text, str) or not text.strip():
        raise DataError("empty text", where=f"{where}:text")
    return Labelled(where, text, str(label))


def _pick(record: Mapping[str, Any], told: str | None, usual: tuple[str, ...]) -> Any:
    names = (told,) if told else usual
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)
