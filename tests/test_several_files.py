"""Several files of rows: how they are named, mixed by weights and split, and what is refused."""

import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from afina.data.packing import train_eval_split
from afina.data.schemas import EMBEDDING, LABELED, SFT, SFTRow
from afina.data.several_files import (
    check_one_kind,
    describe_files,
    file_number,
    join_tables,
    mix_rows,
)
from afina.data.table import FileRows, read_table
from afina.errors import AfinaError, DataError, SettingsError
from afina.objectives.registry import OBJECTIVES
from afina.planning.plan import plan
from afina.settings import TrainSettings, make_settings, resolved
from afina.settings.data_files import DataFile, parse_data
from afina.training.setup.set_up import default_out
from afina.training.train import train
from helpers import write_rows

A, B = DataFile(path=Path("a.jsonl"), weight=0.7), DataFile(path=Path("b.jsonl"), weight=0.3)
PLAIN = DataFile(path=Path("a.jsonl")), DataFile(path=Path("b.jsonl"))
NAMED: list[tuple[Any, Any]] = [
    ("a.jsonl", Path("a.jsonl")),
    (Path("a.jsonl"), Path("a.jsonl")),
    ("a.jsonl:0.7,b.jsonl:0.3", (A, B)),
    (" a.jsonl:0.7 , b.jsonl:.3 ", (A, B)),
    (["a.jsonl:0.7", "b.jsonl:0.3"], (A, B)),
    ({"a.jsonl": 0.7, "b.jsonl": 0.3}, (A, B)),
    ("{a.jsonl: 0.7, b.jsonl: 0.3}", (A, B)),
    ([{"path": "a.jsonl", "weight": 0.7}, B], (A, B)),
    ("[{path: a.jsonl, weight: 0.7}, 'b.jsonl:0.3']", (A, B)),
    ("a.jsonl,b.jsonl", PLAIN),
    (["a.jsonl"], Path("a.jsonl")),
    (r"C:\rows\a.jsonl", Path(r"C:\rows\a.jsonl")),
    (
        r"C:\a.jsonl:2,D:\b.jsonl:1",
        (
            DataFile(path=Path(r"C:\a.jsonl"), weight=2),
            DataFile(path=Path(r"D:\b.jsonl"), weight=1),
        ),
    ),
    (None, None),
]


@pytest.mark.parametrize(("given", "files"), NAMED)
def test_files_are_named_in_a_flag_a_list_or_a_mapping(given: Any, files: Any) -> None:
    assert parse_data(given) == files
    if given is not None:
        settings = make_settings(TrainSettings, {"data": given})
        assert make_settings(TrainSettings, resolved(settings)).data == settings.data == files
        assert len(settings.data_files) == (1 if isinstance(files, Path) else len(files))


def test_a_file_that_exists_is_one_whatever_its_name_has(tmp_path: Path) -> None:
    for name in ("a,b.jsonl", "a.jsonl:0.5", "[a].jsonl"):
        file = write_rows(tmp_path / name, {"prompt": "a", "completion": "b"})
        assert parse_data(str(file)) == file
    two = parse_data([f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/[a].jsonl"])
    assert [file.weight for file in two] == [None, None]


REFUSED: list[tuple[Any, str, str]] = [
    ("a.jsonl:0,b.jsonl:1", "the weight 0.0 of a.jsonl is not a number above 0", "leave the file"),
    ("a.jsonl:-1,b.jsonl:1", "the weight -1.0 of a.jsonl", "leave the file out"),
    ("a.jsonl:nan,b.jsonl:1", "the weight nan of a.jsonl", "--data"),
    ("a.jsonl:inf,b.jsonl:1", "the weight inf of a.jsonl", "--data"),
    ("a.jsonl:0.5,b.jsonl", "b.jsonl has no weight", "a weight for each"),
    ("a.jsonl:0.5,a.jsonl:0.5", "a.jsonl is named twice", "name it once"),
    ("a.jsonl,./a.jsonl", "a.jsonl is named twice", "name it once"),
    (["a.jsonl:0.5"], "the weight of a.jsonl has no effect", "--data a.jsonl"),
    ([{"path": "a.jsonl", "wieght": 1}, "b.jsonl"], "unknown name 'wieght'", "weight: 0.7"),
    ([{"weight": 1}], "the path is missing", "path: a.jsonl"),
    ([], "no file is named", "--data"),
    ([1, 2], "no file: 1", "path"),
    ("[a.jsonl", "not valid YAML", "--data"),
]


@pytest.mark.parametrize(("given", "what", "hint"), REFUSED)
def test_what_cannot_be_meant_is_refused(given: Any, what: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make_settings(TrainSettings, {"data": given})
    assert what in caught.value.what and hint in str(caught.value.hint)
    assert caught.value.where == "data"


def rows_of(name: str, count: int) -> list[SFTRow]:
    return [SFTRow(f"{name}:{n}", prompt=f"{name} {n}", completion="a") for n in range(count)]


@pytest.mark.parametrize("counts", [(100, 100), (10, 1000), (7, 3), (1, 99), (1, 999)])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (7, 3), (0.5, 0.5), (1, 20)])
def test_every_row_occurs_and_each_file_has_its_ratio(
    counts: tuple[int, int], weights: tuple[float, float]
) -> None:
    files = [FileRows(n, "text", c, w) for n, c, w in zip("ab", counts, weights, strict=True)]
    rows = [row for file in files for row in rows_of(file.path, file.num_rows)]
    repeats = max(c / w for c, w in zip(counts, weights, strict=True)) * max(
        w / c for c, w in zip(counts, weights, strict=True)
    )
    if repeats > 100:
        with pytest.raises(DataError, match="times in an epoch") as caught:
            mix_rows(rows, files, 0)
        assert "a smaller weight" in str(caught.value.hint)
        return
    mixed = mix_rows(rows, files, 0)
    times = Counter(row.where for row in mixed)
    assert set(times) == {row.where for row in rows}
    described = describe_files(mixed, files, lambda row: 2)
    for file, about, weight in zip(files, described, weights, strict=True):
        own = [n for where, n in times.items() if where.startswith(f"{file.path}:")]
        assert max(own) - min(own) <= 1  # rows of a file are repeated alike
        wanted = 100 * weight / sum(weights)
        assert about["rows_percent"] == pytest.approx(wanted, abs=100 / len(mixed))
        assert about["tokens_percent"] == pytest.approx(about["rows_percent"])
    assert mixed == mix_rows(rows, files, 0)  # a pure function of the seed


def test_without_weights_rows_follow_each_other() -> None:
    files = [FileRows("a", "text", 2, None), FileRows("b", "text", 3, None)]
    rows = rows_of("a", 2) + rows_of("b", 3)
    assert mix_rows(rows, files, 0) == rows
    assert [file["rows_percent"] for file in describe_files(rows, files, lambda r: 0)] == [40, 60]


def test_each_file_has_eval_rows_and_equal_rows_are_on_one_side() -> None:
    files = [FileRows(n, "text", 20, None) for n in ("a", "b/c", "d")]
    rows = [row for file in files for row in rows_of(file.path, 20)]
    rows += [SFTRow("d:20", prompt="a 3", completion="a"), SFTRow("d:21", prompt="a", text="x")]
    train_rows, held = train_eval_split(rows, 0.1, 0, file_of=file_number(files))
    assert Counter(file_number(files)(row) for row in held).keys() == {0, 1, 2}
    twins = [row.where for row in rows if row.prompt == "a 3"]
    assert len({where in {row.where for row in held} for where in twins}) == 1
    assert len(train_rows) + len(held) == len(rows)
    # a file of one row is trained
    files.append(FileRows("e", "text", 1, None))
    one = [*rows, SFTRow("e:1", prompt="alone", completion="a")]
    assert "e:1" in {
        row.where for row in train_eval_split(one, 0.9, 0, file_of=file_number(files))[0]
    }


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    asked = [{"prompt": f"Who is {n}?", "completion": "It is me."} for n in range(12)]
    named = [{"q": f"Why {n}?", "a": "Because.", "id": n} for n in range(4)]
    return write_rows(tmp_path / "a.jsonl", *asked), write_rows(tmp_path / "b.jsonl", *named)


def test_each_file_has_its_own_columns_and_its_part_of_the_plan(
    files: tuple[Path, Path], tiny: Path
) -> None:
    a, b = files
    data = [{"path": str(a), "weight": 1}, {"path": str(b), "weight": 2}]
    data[1]["columns"] = {"prompt": "q", "completion": "a"}
    result = plan(data, base=str(tiny))
    first, second = result["data"]["files"]
    assert (first["rows"], second["rows"]) == (12, 4)
    assert first["rows_percent"] == pytest.approx(100 / 3, abs=2)
    assert result["data"]["unused_columns"] == {"id": 4}
    assert f"{b}: 4 rows; " in result.to_markdown()
    assert result["settings"]["output_dir"] == "runs/a-b-lora"
    with pytest.raises(AfinaError) as caught:
        plan(f"{a},{b}", base=str(tiny))
    assert str(b) in str(caught.value)  # its columns have other names


@pytest.mark.slow
def test_files_for_different_objectives_are_refused_by_both_names(
    files: tuple[Path, Path], tmp_path: Path, tiny: Path
) -> None:
    a, _ = files
    pairs = write_rows(
        tmp_path / "p.jsonl", *[{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in "xyz"]
    )
    text = tmp_path / "t.txt"
    text.write_text("The sea is blue.\n\n\nThe sun is red.")
    for other in (pairs, text, tmp_path / "missing.jsonl"):
        with pytest.raises(DataError) as caught:
            plan(f"{a}:1,{other}:1", base=str(tiny))
        assert str(other) in str(caught.value)
        assert str(a) in str(caught.value) or "no such file" in caught.value.what
    both = plan(f"{a},{text}", base=str(tiny), objective="pretrain")
    assert both["data"]["objective"] == "pretrain"


@pytest.mark.slow
def test_a_run_on_several_files_records_them_and_is_resumed_with_its_weights(
    files: tuple[Path, Path], tiny: Path, tmp_path: Path
) -> None:
    a, b = files
    write_rows(b, *[{"prompt": f"Why {n}?", "completion": "Because."} for n in range(4)])
    common: dict[str, Any] = {"base": str(tiny), "max_steps": 2, "eval_steps": 1}
    run = train(f"{a}:0.5,{b}:0.5", output_dir=tmp_path / "run", **common)
    record = json.loads((run.folder / "run.json").read_text())
    assert [file["path"] for file in record["data"]["files"]] == [str(a), str(b)]
    assert sum(file["rows_percent"] for file in record["data"]["files"]) == pytest.approx(100)
    assert "a.jsonl, b.jsonl" in (run.folder / "README.md").read_text()
    again = {**common, "output_dir": run.folder, "resume": True}
    assert train(f"{a}:0.5,{b}:0.5", **again).record["steps"] == 2
    with pytest.raises(AfinaError, match="the data is not what the run began with"):
        train(f"{a}:0.5,{b}:0.6", **again)


def test_a_table_alone_is_not_changed(files: tuple[Path, Path]) -> None:
    table = read_table(files[0], SFT)
    assert join_tables([table], [None]) is table
    settings = TrainSettings(data=files[0])
    assert default_out(settings).name == "a-lora"


def test_files_of_labels_and_scores_are_of_one_kind(tmp_path: Path) -> None:
    def table(name: str, *rows: dict[str, Any], schema: Any = LABELED) -> Any:
        return read_table(write_rows(tmp_path / name, *rows), schema)

    two = [{"text": f"film {n}", "label": "good"} for n in range(2)]
    check_one_kind(join_tables([table("a.jsonl", *two), table("b.jsonl", *two)], [None, None]))
    pair = {"anchor": "a b", "positive": "c d"}
    tables = [
        table("c.jsonl", pair, schema=EMBEDDING),
        table("d.jsonl", pair | {"score": 0.5}, schema=EMBEDDING),
        table("e.jsonl", pair | {"negative": "e f"}, schema=EMBEDDING),
    ]
    with pytest.raises(DataError, match="different kinds: text-pairs and scored-pairs") as caught:
        check_one_kind(join_tables(tables[:2], [1, 1]))
    assert "c.jsonl" in str(caught.value) and "d.jsonl" in str(caught.value)
    check_one_kind(join_tables(tables[::2], [1, 1]), lambda name: str(name == "scored-pairs"))


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_objective_reads_several_files_and_cuts_rows(name: str) -> None:
    source = inspect.getsource(OBJECTIVES.get(name).prepare)
    for word in ("settings.data,", "settings.data)"):
        assert f"read_table({word}" not in source
    assert "read_files(" in source or "join_tables(" in source
    if name not in ("pretrain", "mlm"):
        assert "truncate" in source or "Preparation.start(" in source
