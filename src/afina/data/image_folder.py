"""Folders of pictures, as the convention `imagefolder` has them.

FOLDER/cat/1.png                        a folder for each class
FOLDER/train/cat/1.png, FOLDER/test/... the parts of a data set; `validation` or `test` is the eval
                                        part
FOLDER/metadata.csv, metadata.jsonl     a row for each picture, whose column file_name is its path
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from afina.data.images import IMAGE_SUFFIXES, read_image
from afina.data.input_file import InputFile
from afina.data.readers import Record, read_records
from afina.errors import DataError

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "test", "testing")  # the first one is evaluated
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_COLUMN = "file_name"


class SplitFolders(NamedTuple):
    """The parts of a folder of pictures; `others` are further parts for evaluation."""

    train: Path
    eval: Path
    others: tuple[Path, ...]


def find_split_folders(path: Path) -> SplitFolders | None:
    """Return the parts of a folder; None where its subfolders are classes.

    Subfolders are parts where all have the names of parts, and the pictures are below classes or
    have metadata: `train` and `test` with pictures in them are classes.
    """
    if not path.is_dir():
        return None
    folders = {folder.name.lower(): folder for folder in path.iterdir() if folder.is_dir()}
    train = next((folders[name] for name in TRAIN_NAMES if name in folders), None)
    evals = [folders[name] for name in EVAL_NAMES if name in folders]
    if train is None or not evals or len(folders) > 1 + len(evals):
        return None
    has_classes = any(child.is_dir() for child in train.iterdir())
    if not has_classes and _metadata_file(train) is None and _metadata_file(path) is None:
        return None
    return SplitFolders(train, evals[0], tuple(evals[1:]))


def _metadata_file(path: Path) -> Path | None:
    return next((path / name for name in METADATA_FILES if (path / name).is_file()), None)


def read_image_folder(path: Path) -> tuple[list[Record], str]:
    """Return one record per image, and the sha256 of their names and contents.

    Raises:
        DataError: there is no image, or one cannot be read.
    """
    metadata = _find_metadata(path)
    if metadata is not None:
        records = list(_read_metadata(path, metadata))
        if not records:
            raise DataError("no picture of this folder has a row", where=str(metadata))
    else:
        records = list(_read_classes(path))
    digest = hashlib.sha256()
    for where, record in records:
        if isinstance(record, DataError):
            continue
        content = hashlib.sha256(record["image"]).digest()
        digest.update(Path(where).relative_to(path).as_posix().encode() + content)
        if metadata is not None:
            digest.update(repr(sorted((k, v) for k, v in record.items() if k != "image")).encode())
    return records, digest.hexdigest()


def has_metadata(path: Path) -> bool:
    """Return whether the pictures of a folder have columns."""
    return _find_metadata(path) is not None


def _find_metadata(path: Path) -> Path | None:
    """Return the metadata of a folder; that of a part can stand next to it, for all parts."""
    is_part = path.name.lower() in (*TRAIN_NAMES, *EVAL_NAMES)
    return _metadata_file(path) or (_metadata_file(path.parent) if is_part else None)


def _images(path: Path, pattern: str) -> list[Path]:
    return sorted(file for file in path.glob(pattern) if file.suffix.lower() in IMAGE_SUFFIXES)


def _read_classes(path: Path) -> Iterator[Record]:
    files = _images(path, "*/*")
    if not files:
        hint = "one folder per class: DATA/cat/1.png, DATA/dog/2.png, ...; or metadata.csv"
        raise DataError("no pictures here", where=str(path), hint=hint)
    for file in files:
        yield str(file), {"image": read_image(file), "label": file.parent.name}


def _read_metadata(path: Path, metadata: Path) -> Iterator[Record]:
    """Yield the pictures below `path` with their columns, and pictures without a row as errors."""
    named: set[Path] = set()
    table = InputFile.open(metadata)
    for where, row in read_records(table, lambda names: True, lambda names: True):
        if isinstance(row, DataError):
            yield where, row
            continue
        name = row.get(FILE_COLUMN)
        if not isinstance(name, str) or not name:
            hint = (
                f"a column {FILE_COLUMN} with the path of the picture, relative to {metadata.name}"
            )
            raise DataError(f"no {FILE_COLUMN}", where=where, hint=hint)
        file = metadata.parent / name
        if not file.resolve().is_relative_to(path.resolve()):
            if metadata.parent == path:
                what = f"the picture {name!r} is not in this folder"
                yield where, DataError(what, where=f"{where}:{FILE_COLUMN}")
            continue
        named.add(file.resolve())
        if not file.is_file():
            what = f"no such picture: {name}"
            yield where, DataError(what, where=f"{where}:{FILE_COLUMN}")
            continue
        rest = {key: value for key, value in row.items() if key != FILE_COLUMN}
        yield str(file), {"image": read_image(file)} | rest
    for file in _images(path, "**/*"):
        if file.resolve() not in named:
            what = f"the picture has no row in {metadata.name}"
            yield str(file), DataError(what, where=str(file), hint="--skip-bad-rows leaves it out")
