"""Where rows come from beside single files: folders of pictures with parts and metadata, the Hub."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from afina.data.image_folder import find_split_folders
from afina.data.renderer import Renderer
from afina.data.schemas import LABELED, SFT, SFTRow
from afina.data.table import detect_schema, read_table
from afina.errors import DataError
from afina.objectives.run_rows import with_split_folders
from afina.settings import TrainSettings

PNG = io.BytesIO()
Image.new("L", (2, 2)).save(PNG, "PNG")


def put(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PNG.getvalue())
    return folder


PARTS: list[tuple[list[str], str | None]] = [
    (["train/cat/1.png", "train/dog/1.png", "test/cat/2.png"], "test"),
    (["train/cat/1.png", "val/cat/2.png", "test/cat/3.png"], "val"),
    (["Train/cat/1.png", "Validation/cat/2.png"], "Validation"),
    (["train/cat/1.png"], None),  # a class called train would have its pictures in it
    (["train/1.png", "test/2.png"], None),  # two classes
    (["train/1.png", "car/2.png", "test/3.png"], None),
    (["cat/1.png", "dog/2.png"], None),
]


@pytest.mark.parametrize(("names", "held_out"), PARTS)
def test_parts_of_a_folder_are_the_rows_of_training_and_evaluation(
    names: list[str], held_out: str | None, tmp_path: Path
) -> None:
    folder = put(tmp_path, *names)
    found = find_split_folders(folder)
    settings = with_split_folders(TrainSettings(data=folder))
    if held_out is None:
        assert found is None and settings.data == folder and settings.eval_data is None
        return
    assert found is not None and found.eval.name == held_out
    assert settings.data == found.train and settings.eval_data == found.eval
    assert isinstance(settings.data, Path)
    rows = read_table(settings.data, LABELED).rows
    assert {row.label for row in rows} == {name.split("/")[1] for name in names if "rain" in name}
    given = TrainSettings(data=folder, eval_data=tmp_path)
    assert with_split_folders(given).eval_data == tmp_path


@pytest.mark.parametrize("where", ["part", "root"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_gives_pictures_their_labels(name: str, where: str, tmp_path: Path) -> None:
    folder = put(tmp_path, "train/1.png", "train/more/2.png", "test/3.png")
    prefix = "train/" if where == "root" else ""
    pairs = [(f"{prefix}1.png", "cat"), (f"{prefix}more/2.png", "dog")]
    pairs += [("test/3.png", "cat")] if where == "root" else []
    lines = ["file_name,label,id", *(f"{file},{label},7" for file, label in pairs)]
    if name.endswith("jsonl"):
        lines = [f'{{"file_name": "{f}", "label": "{label}", "id": 7}}' for f, label in pairs]
    file = folder / ("" if where == "root" else "train") / name
    file.write_text("\n".join(lines))
    assert find_split_folders(folder) is not None
    table = read_table(folder / "train", LABELED)
    assert [(Path(row.where).name, row.label) for row in table.rows] == [
        ("1.png", "cat"),
        ("2.png", "dog"),
    ]
    assert table.unused_columns == {"id": 2} and table.format == "pictures"
    assert read_table(folder / "train", LABELED, {"id": None}).unused_columns == {}
    digest = table.digest
    file.write_text(file.read_text().replace("dog", "cow"))
    assert read_table(folder / "train", LABELED).digest != digest


def test_faults_of_metadata_are_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "pics", "1.png", "2.png")
    for text, what, where in (
        ("file_name,label\n1.png,cat\n9.png,dog\n2.png,cat\n", "no such picture: 9.png", ":3"),
        ("file_name,label\n1.png,cat\n", "the picture has no row in metadata.csv", "2.png"),
        ("file_name,label\n../x.png,cat\n", "is not in this folder", ":2"),
        ("name,label\n1.png,cat\n", "no file_name", "metadata.csv:2"),
    ):
        (folder / "metadata.csv").write_text(text)
        with pytest.raises(DataError) as caught:
            read_table(folder, LABELED)
        assert what in caught.value.what and where in str(caught.value.where)
    (folder / "metadata.csv").write_text("file_name,label\n1.png,cat\n9.png,dog\n")
    table = read_table(folder, LABELED, skip_bad_rows=True)
    assert len(table.rows) == 1 and len(table.skipped) == 2


def test_a_data_set_of_the_hub_is_read_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    rows = datasets.Dataset.from_dict(
        {"text": ["a b", "c d", "e f"], "label": [0, 1, 0]}, features=datasets.Features(features)
    )
    both = datasets.DatasetDict({"train": rows, "test": rows.select([1])})
    both.save_to_disk(str(tmp_path / "both"))
    name = Path(f"hf:{tmp_path}/both")
    detected = detect_schema(name, {})
    assert detected is not None and detected.schema is LABELED
    table = read_table(name, LABELED)
    assert [(row.where, row.label) for row in table.rows][:2] == [
        (f"{name}:row 1", "no"),
        (f"{name}:row 2", "yes"),
    ]
    test = read_table(Path(f"{name}[test]"), LABELED)
    assert [row.label for row in test.rows] == ["yes"] and test.digest != table.digest
    with pytest.raises(DataError, match="no split 'dev'") as caught:
        read_table(Path(f"{name}[dev]"), LABELED)
    assert "both[test]" in str(caught.value.hint)
    assert TrainSettings(data="hf:owner/name:main[train]").data_name == "name-main-train"


def test_without_datasets_or_network_the_error_has_what_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs datasets") as caught:
        read_table(Path("hf:nobody/nothing"), SFT)
    assert 'pip install "afina[datasets]"' in str(caught.value.hint)

    class Offline:
        @staticmethod
        def load_dataset(*given: Any, **named: Any) -> Any:
            raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setitem(sys.modules, "datasets", Offline)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        read_table(Path("hf:nobody/nothing"), SFT)
    assert "hf download nobody/nothing" in str(caught.value.hint)
    with pytest.raises(DataError, match="not the name of a data set"):
        read_table(Path("hf:"), SFT)


@pytest.mark.parametrize("template", ["chatml", "plain", None])
def test_an_answer_ends_with_one_stop_token(
    template: str | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    renderer = Renderer(tokenizer, template, 500)
    question, eos = {"role": "user", "content": "hi"}, str(tokenizer.eos_token)

    def chat(answer: str) -> list[int]:
        messages = (question, {"role": "assistant", "content": answer})
        return renderer.examples(SFTRow("a:1", messages=messages))[0].token_ids

    for end in (eos, eos * 2, f" {eos}\n", renderer.template.stop_text):
        assert chat(f"It is me.{end}") == chat("It is me.")
        assert chat(f"It is {end} me.") != chat("It is me.")  # elsewhere it is text
    assert renderer.counts["stop_tokens_in_answers"] == 1
    with pytest.raises(DataError, match="a stop token alone"):
        chat(eos)
    rows = [SFTRow("a:1", prompt="Who?", completion=f" me{end}") for end in ("", eos, eos * 3)]
    assert len({tuple(renderer.examples(row)[0].token_ids) for row in rows}) == 1
    texts = [SFTRow("a:1", text=f"The sea{end}") for end in ("", eos, eos * 3)]
    assert len({tuple(renderer.chunk_text(row, 100)[0].token_ids) for row in texts}) == 1
