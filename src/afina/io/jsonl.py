"""Files of JSON lines: logs that survive a crash, and tables of rows."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from afina.io.atomic import translate_os_errors, write_text


def to_jsonl(records: Iterable[Mapping[str, Any]]) -> str:
    """Return records as JSON lines."""
    return "".join(json_line(record) + "\n" for record in records)


def json_line(record: Mapping[str, Any], sort_keys: bool = False) -> str:
    """Return one record as JSON without a line break."""
    return json.dumps(record, ensure_ascii=False, sort_keys=sort_keys)


def append_jsonl(
    file: Path, record: Mapping[str, Any], sort_keys: bool = False, sync: bool = True
) -> None:
    """Append a record to a log; with `sync` it is on the disk when this returns."""
    with translate_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json_line(record, sort_keys) + "\n")
            if sync:
                stream.flush()
                os.fsync(stream.fileno())


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log without incomplete lines (after a crash); none without a file."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def write_jsonl(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by these records, atomically."""
    write_text(file, to_jsonl(records))
