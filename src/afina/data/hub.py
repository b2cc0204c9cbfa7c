"""Data sets of the Hugging Face Hub by name, read by the library `datasets`.

hf:owner/name                       its split "train"
hf:owner/name:config[validation]    a configuration and a split; a part of one is [train[:10%]]
hf:./folder                         a folder that `save_to_disk` of the library wrote
"""

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from afina.errors import DataError

HUB_PREFIX = "hf:"
_NAMED = re.compile(r"hf:(?P<name>[^:\[\]]+)(?::(?P<config>[^\[\]]+))?(?:\[(?P<split>.+)\])?")


def is_hub_dataset(path: Path) -> bool:
    """Return whether a path names a data set of the Hub."""
    return str(path).startswith(HUB_PREFIX) and not path.exists()


def read_hub_dataset(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Return the rows of a data set, and the sha256 of their contents.

    Raises:
        DataError: `datasets` is not installed, or the data set cannot be loaded.
    """
    name = path.as_posix()
    rows = _load(name)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(sorted(row.items())).encode())
    return [(f"{path}:row {n}", row) for n, row in enumerate(rows, 1)], digest.hexdigest()


@lru_cache(maxsize=4)
def _load(text: str) -> list[dict[str, Any]]:
    found = _NAMED.fullmatch(text)
    if found is None:
        hint = "hf:owner/name, hf:owner/name:config or hf:owner/name:config[train]"
        raise DataError("not the name of a data set", where=text, hint=hint)
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        hint = 'pip install "afina[datasets]", or a file of its rows: --data FILE'
        raise DataError("a data set of the Hub needs datasets", where=text, hint=hint) from None
    name, config, split = found["name"], found["config"], found["split"]
    try:
        if Path(name).is_dir() and any(Path(name).glob("dataset*.json")):
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, dict):
                if (split or "train") not in loaded:
                    known = ", ".join(f"hf:{name}[{one}]" for one in loaded)
                    what = f"no split {split or 'train'!r}"
                    raise DataError(what, where=text, hint=f"its splits: one of {known}")
                loaded = loaded[split or "train"]
            elif split is not None:
                raise DataError("this data set has no splits", where=text, hint=f"hf:{name}")
        else:
            loaded = datasets.load_dataset(name, config, split=split or "train")
    except (OSError, ValueError, LookupError, ImportError, RuntimeError) as error:
        local = f"hf download {name} --repo-type dataset --local-dir DIR"
        raise DataError(
            f"the data set {name} cannot be loaded",
            where=text,
            why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            hint=f"check the name, the split and the network; or, where there is one, {local}, "
            "then --data DIR/FILE",
        ) from None
    return _records(datasets, loaded)


def _records(datasets: Any, loaded: Any) -> list[dict[str, Any]]:
    """Return rows with the names of their classes, and pictures as the bytes of their files."""
    names = {}
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):
            names[column] = feature.names
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
    rows = [dict(row) for row in loaded]
    for row in rows:
        for column, known in names.items():
            value = row[column]
            row[column] = known[value] if value is not None and value >= 0 else None
    return rows
