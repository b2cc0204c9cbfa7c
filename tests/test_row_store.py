"""Rows that exceed memory: read in pieces, kept in a file, and the same as in memory."""

import csv
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afina.data import row_store, table
from afina.data.packing import BatchSampler
from afina.data.renderer import Example
from afina.data.row_store import SelectedRows, StoredRows
from afina.data.schemas import SFT
from afina.errors import DataError


def _jsonl(rows: list[dict[str, str]], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _csv(rows: list[dict[str, str]], file: Path) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _parquet(rows: list[dict[str, str]], file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=64)


@pytest.mark.parametrize("write", [_jsonl, _csv, _parquet])
def test_a_file_is_never_in_memory_as_a_whole(
    write: Callable[[list[dict[str, str]], Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_store, "MAX_BYTES_IN_MEMORY", 1 << 16)
    monkeypatch.setattr(table, "SAMPLE", 16)
    rows = [{"prompt": f"{n} " + "why " * 2000, "completion": f"{n}"} for n in range(500)]
    write(rows, tmp_path / "rows")
    table.read_table(tmp_path / "rows", SFT)  # imports, and a first look at the file
    tracemalloc.start()
    found = table.read_table(tmp_path / "rows", SFT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.rows) == 500 and found.rows[499].completion == "499"
    assert peak < 500 * 8000 / 2  # bytes of the texts


def test_a_list_is_broken_where_json_says(tmp_path: Path) -> None:
    good = '[{"prompt": "a", "completion": "b"}'
    for text, line in ((good + ",]", 1), (good + "\n,{]", 2), (good + "] x", 1), (good, 1)):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(DataError, match="broken JSON") as caught:
            table.read_table(tmp_path / "rows.json", SFT)
        assert caught.value.where == f"{tmp_path / 'rows.json'}:{line}", text


@pytest.mark.parametrize("limit", [1, 1 << 24])
def test_stored_rows_are_a_sequence(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "MAX_BYTES_IN_MEMORY", limit)
    rows = [Example(f"a:{n}", [n, 70_000 + n], [False, True], 1, "é" * n) for n in range(9)]
    stored = StoredRows(rows)
    assert stored == rows and list(stored) == rows and len(stored) == 9
    assert stored[-1] == rows[-1] and stored[2:7:2] == rows[2:7:2] and stored[::-1][0] == rows[8]
    assert stored != rows[:8] and rows[3] in stored and stored.index(rows[4]) == 4
    assert SelectedRows(stored, [3, 0, 3]) == [rows[3], rows[0], rows[3]]
    with pytest.raises(IndexError):
        stored[9]


def test_batches_do_not_depend_on_where_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Example(f"a:{n}", [n] * (n % 7 + 2), [True] * (n % 7 + 2), 1, "") for n in range(60)]

    def batches(rows: Any) -> list[list[int]]:
        sampler = BatchSampler(rows, 16, 2, 0)
        return [b.token_ids.tolist() for step in range(20) for b in sampler.step_batches(step)]

    monkeypatch.setattr(row_store, "MAX_BYTES_IN_MEMORY", 1)
    assert batches(StoredRows(rows)) == batches(rows)
