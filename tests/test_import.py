"""`afina import`: configurations of other trainers become settings, and each key is accounted for."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from afina.cli.main import parse, run
from afina.errors import SettingsError
from afina.importing.import_config import ImportResult, import_config
from afina.importing.python_calls import python_keys
from afina.importing.tool_table import TOOLS, tool_table
from afina.settings import ImportSettings, TrainSettings, make_settings, read_yaml
from sources import ROOT

CASES = yaml.safe_load((ROOT / "tests/data/import/cases.yaml").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a test is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(case: dict[str, Any], folder: Path) -> Path:
    file = folder / case["file"]
    if "cells" in case:
        cells = [{"cell_type": "code", "source": [text]} for text in case["cells"]]
        cells.append({"cell_type": "markdown", "source": ["r = 7"]})
        file.write_text(json.dumps({"cells": cells}))
    elif "text" in case:
        file.write_text(case["text"])
    elif file.suffix == ".json":
        file.write_text(json.dumps(case["keys"]))
    else:
        file.write_text(yaml.safe_dump(case["keys"]))
    if "info" in case:
        (folder / "dataset_info.json").write_text(json.dumps(case["info"]))
    return file


def convert(file: Path, **values: Any) -> ImportResult:
    return import_config(make_settings(ImportSettings, {"file": file, **values}))


@pytest.mark.parametrize("case", CASES, ids=[case["file"] for case in CASES])
def test_settings_mean_what_the_configuration_means(case: dict[str, Any], folder: Path) -> None:
    file, missing = write(case, folder), case.get("missing", [])
    values: dict[str, Any] = {"leave_out": missing}
    if missing:
        with pytest.raises(SettingsError) as caught:
            convert(file)
        assert f"--leave-out {','.join(sorted(missing))}" in sorted_names(caught.value.hint)
    result = convert(file, **values)
    expected = json.loads(json.dumps(case.get("settings", {})).replace("INFO", str(folder)))
    for name, value in expected.items():
        found = result.settings[name]
        assert (value.items() <= found.items()) if isinstance(value, dict) else found == value, name
    assert not result.settings.keys() & set(case.get("absent", ()))
    outcomes = {one["key"]: one["outcome"] for one in result.imported}
    assert {outcomes[name] for name in (*case.get("comments", []), *missing)} <= {"comment"}
    assert set(case.get("keys", ())) <= outcomes.keys()  # no key is dropped silently
    settings = make_settings(TrainSettings, read_yaml(Path(result.output)))
    assert settings.method == result.settings["method"]
    written = Path(result.output).read_text()
    assert all(one["key"] in written for one in result.imported if one["outcome"] == "comment")


def sorted_names(hint: str | None) -> str:
    flag, _, rest = (hint or "").partition(" ")
    names, _, rest = rest.partition(" ")
    return f"{flag} {','.join(sorted(names.split(',')))} {rest}"


def test_there_are_forty_configurations_of_five_tools() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", TOOLS)
def test_no_key_is_in_two_lists(name: str) -> None:
    table = tool_table(name)
    own = [set(table.names), set(table.neutral), set(table.comments)]
    assert not own[0] & own[2] and not own[1] & own[2] and not own[0] & own[1]
    assert set(table.defaults) <= own[0]


def test_file_is_not_replaced_unless_requested(folder: Path) -> None:
    file = write(CASES[0], folder)
    convert(file)
    with pytest.raises(SettingsError, match="the file exists"):
        convert(file)
    assert convert(file, overwrite=True, base="org/other").settings["base"] == "org/other"


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.yaml", "x: 1", "no configuration of a known tool"),
        ("a.json", "[1]", "expected a JSON object"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"a": ' * 50_000, "not valid JSON"),
        ("a.py", "x = (", "not valid Python"),
        ("a.py", "x = 1", "no configuration of a known tool"),
        ("a.sh", "echo 1", "no command of a known tool"),
        ("a.yaml", "{model_name_or_path: a, stage: sft}", "names no data"),
        ("a.yaml", "{base_model: a, datasets: [{path: b}], no_such_key: 3}", "1 key without"),
        ("a.yaml", "{base_model: a, datasets: [{path: b}], lora_r: x}", "lora_r cannot be 'x'"),
        ("a.yaml", "{model: a, data: b, iters: many}", "iters cannot be 'many'"),
        ("a.yaml", "{model: a, data: b, lora_parameters: [1]}", "lora_parameters cannot be"),
        ("a.yaml", "{model: a, data: b, lora_parameters: {rank: x}}", "has another form"),
        ("a.yaml", "{base_model: a, datasets: 3}", "has another form"),
    ],
)
def test_what_cannot_be_read_is_an_error(name: str, text: str, what: str, folder: Path) -> None:
    (folder / name).write_text(text)
    with pytest.raises(SettingsError, match=what):
        convert(folder / name)


def test_nothing_of_a_script_is_run() -> None:
    source = (
        "open('ran', 'w')\nlora = LoraConfig(r=2 ** 99, lora_alpha=2 * 3, lora_dropout=open('ran'))"
    )
    found = python_keys(Path("a.py"), source)
    assert found.keys == {"lora_alpha": 6} and set(found.unread) == {"r", "lora_dropout"}
    assert not Path("ran").exists()


def test_command_prints_what_became_of_each_key(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(CASES[0], folder)
    assert run(["import", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "lora_r" in shown and "flash_attention" in shown and "afina train --config" in shown
    assert run(["import", str(file), "--json", "--overwrite"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert parse(["train", "--config", result["output"]])[1].rank == 16
    assert result["tool"] == "Axolotl" and result["settings"]["rank"] == 16
    assert run(["import", str(file), "--lang", "es", "--overwrite"]) == 0
    assert "sin ajuste" in capsys.readouterr().out
