"""The files of a run's rows: one, or several with weights.

rows.jsonl
a.jsonl,b.jsonl                                 one after the other
a.jsonl:0.7,b.jsonl:0.3                         with their ratios of the training rows
[{path: a.jsonl, weight: 0.7, columns: {prompt: question}}, b.jsonl:0.3]
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from afina.errors import SettingsError
from afina.settings.common import Settings, setting

EXAMPLE = "--data a.jsonl:0.7,b.jsonl:0.3"


class DataFile(Settings):
    """One of several files of rows."""

    path: Path = setting("the file", ...)
    weight: float | None = setting("its part of the training rows, relative to the other weights")
    columns: dict[str, str | list[str] | None] | None = setting(
        "names of its columns; by default those that the run gives for all files"
    )

    def __str__(self) -> str:
        return f"{self.path}" if self.weight is None else f"{self.path}:{self.weight:g}"


DataFiles = tuple[DataFile, ...]


def parse_data(value: Any) -> Any:
    """Return the files that a setting names: a path, or several files.

    Raises:
        SettingsError: a file is named twice, or a weight is missing, no number or not above 0.
    """
    if isinstance(value, (str, Path)):
        value = _split(str(value))
    if isinstance(value, Mapping):
        value = [value] if "path" in value else [f"{path}:{w}" for path, w in value.items()]
    if not isinstance(value, Sequence):
        return value
    files = tuple(_parse_file(item) for item in value)
    if len(files) == 1 and files[0].columns is None and files[0].weight is None:
        return files[0].path
    _check(files)
    return files


def _split(text: str) -> Any:
    """Return the files in a flag; a name that exists is one file, whatever letters it has."""
    if Path(text).exists() or not text:
        return [{"path": text}]
    if text.lstrip().startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            why = str(error).splitlines()[0]
            raise SettingsError("not valid YAML", where="data", why=why, hint=EXAMPLE) from None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return list(parts) if len(parts) > 1 else [{"path": text}]


def _parse_file(item: Any) -> DataFile:
    if isinstance(item, DataFile):
        return item
    if isinstance(item, Path):
        item = str(item)
    if isinstance(item, Mapping):
        unknown = item.keys() - DataFile.model_fields.keys()
        if not unknown and "path" in item:
            return DataFile(**item)
        what = f"unknown name {sorted(unknown)[0]!r}" if unknown else "the path is missing"
    elif isinstance(item, str):
        path, colon, weight = item.rpartition(":")
        if colon and not Path(item).exists():
            with suppress(ValueError):
                return DataFile(path=Path(path), weight=float(weight))
            if Path(path).exists():
                what = f"the weight {weight!r} of {path} is no number"
                raise SettingsError(what, where="data", hint=EXAMPLE)
        return DataFile(path=Path(item))
    else:
        what = f"no file: {item!r}"
    hint = "{path: a.jsonl, weight: 0.7, columns: {prompt: question}}"
    raise SettingsError(what, where="data", hint=hint)


def _check(files: DataFiles) -> None:
    """Raise `SettingsError` where files cannot be read together."""
    if not files:
        raise SettingsError("no file is named", where="data", hint=EXAMPLE)
    locations = [file.path.expanduser().resolve() for file in files]
    for number, (file, location) in enumerate(zip(files, locations, strict=True)):
        if location in locations[:number]:
            hint = "name it once; a larger weight repeats its rows"
            raise SettingsError(f"{file.path} is named twice", where="data", hint=hint)
    given = [file for file in files if file.weight is not None]
    for file in given:
        weight = file.weight or 0.0
        if not (math.isfinite(weight) and weight > 0):
            what = f"the weight {file.weight} of {file.path} is not a number above 0"
            raise SettingsError(what, where="data", hint=f"leave the file out, or {EXAMPLE}")
    if len(files) == 1 and given:
        what = f"the weight of {given[0].path} has no effect: there is no other file"
        raise SettingsError(what, where="data", hint=f"--data {given[0].path}, or {EXAMPLE}")
    without = [file for file in files if file.weight is None]
    if given and without:
        why = f"{given[0].path} has a weight"
        what = f"{without[0].path} has no weight"
        raise SettingsError(what, where="data", why=why, hint=f"a weight for each: {EXAMPLE}")
