"""`afina annotate`: a person's keys become pairs; blind, in random order, resumable."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afina import train
from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.cli.annotate import annotate
from afina.data.schemas import PREFERENCE, PROMPT
from afina.data.table import read_table
from afina.engine.request import Completion, SamplingParams
from afina.errors import DataError, SettingsError
from afina.evaluation.intervals import wilson_interval
from afina.settings import AnnotateSettings
from conftest import WORDS
from helpers import write_rows

PROMPTS = [f"say {word}" for word in WORDS]


@pytest.fixture(scope="module")
def run(tiny: Path, general: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefer")
    data = write_rows(
        folder / "sft.jsonl", *({"prompt": f"say {w}", "completion": f"{w} {w}"} for w in WORDS)
    )
    return train(
        data,
        base=str(tiny),
        output_dir=folder / "run",
        max_steps=2,
        eval_steps=2,
        learning_rate=1e-4,
        retention_text=general,
    ).folder


def said(
    _: Any,
    prompts: list[list[int]],
    sampling: SamplingParams,
    active: ActiveAdapters = BASE_ONLY,
    stop_token_ids: Any = (),
) -> list[Completion]:
    """An answer of some words, drawn from the seed; the same each time at temperature 0."""
    return [
        Completion(f"sol {sampling.seed}" if sampling.temperature else "sol", tokens, True)
        for tokens in prompts
    ]


@pytest.fixture
def sit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """A sitting with scripted keys: its result, and what was shown."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def sitting(keys: str, **values: Any) -> tuple[dict[str, Any], str]:
        words: Iterator[str] = iter(keys.split())

        def read(_: str = "") -> str:
            word = next(words, None)
            if word is None:
                raise EOFError
            return word

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(
            "afina.cli.annotate.generate_completions", said
        )  # a random model mostly says nothing, which is skipped
        told = {
            "prompts": tmp_path / "prompts.txt",
            "adapter": run,
            "output_dir": tmp_path / "out",
            "max_new_tokens": 6,
            "temperature": 2.0,
        }
        result = annotate(AnnotateSettings(**told | values))
        assert next(words, None) is None, "keys were left over"
        return result, capsys.readouterr().err

    return sitting


def judgements(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_keys_become_the_pairs_that_dpo_reads(
    sit: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    result, shown = sit("1 2 t x 1 skip 2")
    assert {key: result[key] for key in ("pairs", "ties", "skipped", "left")} == {
        "pairs": 4,
        "ties": 1,
        "skipped": 1,
        "left": 6,
    }
    assert str(run) not in shown and "say sol" in shown  # blind
    lines = judgements(tmp_path / "out")
    assert [line["choice"] for line in lines] == [
        "first",
        "second",
        "tie",
        "first",
        "skip",
        "second",
    ]
    decided = [line for line in lines if line["choice"] in ("first", "second")]
    rows = read_table(tmp_path / "out" / "pairs.jsonl", PREFERENCE).rows
    for line, row in zip(decided, rows, strict=True):
        texts = [answer["text"] for answer in line["answers"]]
        assert [row.chosen, row.rejected] == (
            texts if line["choice"] == "first" else texts[::-1]
        ) and row.prompt == line["prompt"]
    won = sum(
        line["answers"][line["choice"] == "second"]["responder"] == str(run) for line in decided
    )
    assert result["wins"] == {str(run): won, "base": 4 - won}
    assert result["interval"] == wilson_interval(won, 4)


@pytest.mark.slow
def test_a_sitting_goes_on_where_it_was(sit: Callable[..., Any], tmp_path: Path) -> None:
    sit("1 2 t 1 1 2 1 2 1 2 1 2", output_dir=tmp_path / "whole")
    sit("1 2 t q")
    with (tmp_path / "out" / "judgements.jsonl").open("a") as stream:
        stream.write('{"key": "cut o')  # the machine stopped here
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:3], *PROMPTS[3:]]))
    result, shown = sit("1 1 2 1 2 1 2 1 2")
    assert (
        result["left"] == 0 and "say luna\n" not in shown
    )  # what was judged is not asked again, ties neither
    assert judgements(tmp_path / "out") == judgements(tmp_path / "whole")
    assert (tmp_path / "out" / "pairs.jsonl").read_text() == (
        tmp_path / "whole" / "pairs.jsonl"
    ).read_text()


@pytest.mark.slow
def test_the_order_is_random_and_seeded(sit: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    keys = " ".join("1" for _ in PROMPTS)
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sit(keys, output_dir=tmp_path / name, seed=seed)
        orders.append([line["answers"][0]["responder"] for line in judgements(tmp_path / name)])
    assert orders[0] == orders[1] != orders[2]
    assert 2 <= orders[0].count("base") <= len(PROMPTS) - 2


def test_other_answers_need_another_folder(sit: Callable[..., Any]) -> None:
    sit("1")
    with pytest.raises(SettingsError, match="about other answers") as caught:
        sit("", temperature=1.0)
    assert "temperature was 2.0, and is 1.0" in str(caught.value)


def test_two_samples_of_one_differ_or_are_refused(
    sit: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    result, _ = sit("1 1", against="same")
    assert result["wins"].keys() == {str(run), f"{run}, again"} and result["pairs"] == 2
    for values in ({"against": "same"}, {"against": str(run)}):
        with pytest.raises(SettingsError, match="would be the same"):
            sit("", temperature=0.0, **values)


def test_equal_answers_are_a_tie_without_a_question(
    sit: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    """A fresh copy of the run's folder under another name answers alike at temperature 0."""
    shutil.copytree(run, tmp_path / "twin")
    result, _ = sit("", against=str(tmp_path / "twin"), temperature=0.0)
    assert result["ties"] + result["skipped"] == len(PROMPTS) and result["win_rate"] is None


def test_prompts_come_from_lines_or_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    user, said = {"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}
    rows = write_rows(
        tmp_path / "b.jsonl", {"prompt": "one", "completion": "1"}, {"messages": [user, said]}
    )
    assert [row.prompt for row in read_table(tmp_path / "a.txt", PROMPT).rows] == ["one", "two"]
    assert [row.prompt for row in read_table(rows, PROMPT).rows] == ["one", (user,)]
    with pytest.raises(DataError, match="no prompt"):
        read_table(write_rows(tmp_path / "c.jsonl", {"text": "one"}), PROMPT)


def test_wilson() -> None:
    """Against Newcombe 1998, Stat. Med. 17, table I: 81 of 263 is 0.2553 to 0.3662; 15 of 148 is 0.0624 to 0.1605."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 5)[0] == pytest.approx(0.0, abs=1e-12)
