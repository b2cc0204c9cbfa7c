"""Somebody who has read nothing, a CSV of their own, and `afina compare`: what each error says to type leads to a report.

And what nobody types on purpose: kill -9 in the middle.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afina.cli.main import run
from afina.comparison import compare as module
from afina.comparison.cost_probe import measure
from helpers import ENVIRONMENT

SMALL = "--methods lora,full --num-seeds 1 --num-trials 1 --max-steps 2 --limit 3 --max-new-tokens 4 --rank 2 --time-budget 20m"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spreadsheet's export: semicolons, a byte order mark, names of its own, a column too many, cells left empty."""
    lines = ["Pregunta;Respuesta correcta;Notas"] + [
        f"¿Cuánto es {n} más {n}?;{n + n};x" for n in range(14)
    ]
    lines += ["¿Cuánto es cien?;;falta", ";12;falta"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        module, "measure_in_subprocess", lambda settings, seconds: measure(settings)
    )
    (tmp_path / "mis datos.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    return tmp_path / "mis datos.csv"


def said(command: str, capsys: pytest.CaptureFixture[str], status: int) -> str:
    """What a command says on standard error; it ends with `status`."""
    assert run(shlex.split(command)) == status
    return capsys.readouterr().err


@pytest.mark.slow
def test_what_the_errors_say_leads_to_a_report(
    own: Path, tiny: Path, general: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is typed here that an error did not say."""
    command = f"compare 'mis dato.csv' --base {tiny} --retention-text {general} {SMALL}"
    name = re.search(r"did you mean '(.+)'", said(command, capsys, 1))
    assert name
    command = command.replace("mis dato.csv", name[1])
    columns = re.search(r"--columns '.+'", said(command, capsys, 1))
    assert (
        columns and columns[0] == "--columns '{prompt: Pregunta, completion: Respuesta correcta}'"
    )
    command += " " + columns[0]
    empty = said(command, capsys, 1)
    assert "mis datos.csv:16:Respuesta correcta: the field is empty" in empty
    leave_out = re.search(r"--skip-bad-rows", empty)
    assert leave_out
    assert "14 to judge by" not in said(command + " " + leave_out[0], capsys, 0)
    report = (own.parent / "runs" / "compare-mis datos" / "report.md").read_text()
    assert "2 rows (lines 16, 17)" in report and "Skipped rows" in report


MISTAKES = [  # (what is typed after the data, what is said, what it says to do)
    ("--methods lora,mroa", "unknown method 'mroa'", "did you mean 'mora'?"),
    ("--methods lora,lora", "at least one method, each once", "the methods to compare"),
    ("--method lora", "unknown flag --method", "did you mean '--methods'?"),
    ("--methods dpo", "dpo is an objective", "--objective dpo"),
    ("--time-budget soon", "a number and s, m or h", "90s, 30m, 2h"),
    ("--time-budget 30", "a number and s, m or h", "90s, 30m, 2h"),
    ("--num-seeds three", "num_seeds cannot be 'three'", "runs of each method"),
    (
        "--columns Pregunta",
        "columns cannot be 'Pregunta'",
        "{prompt: question, completion: answer}",
    ),
    (
        "--columns 'prompt: Pregunta, completion: Respuesta'",
        "no column 'Respuesta'",
        "did you mean 'Respuesta correcta'?",
    ),
    ("--columns '{question: Pregunta}'", "unknown field 'question'", "prompt"),
    ("--metric bleu", "metric cannot be 'bleu'", "exact_match"),
]


@pytest.mark.parametrize(
    ("typed", "what", "then"), MISTAKES, ids=[typed for typed, _, _ in MISTAKES]
)
def test_each_mistake_says_what_to_do(
    typed: str, what: str, then: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = (
        ""
        if "--columns" in typed
        else " --columns 'prompt: Pregunta, completion: Respuesta correcta' --skip-bad-rows"
    )
    error = said(
        f"compare '{own}' {typed}{told}",
        capsys,
        1 if "no column" in what or "unknown field" in what else 2,
    )
    assert what in error and then in error and "Value error" not in error
    assert not (own.parent / "runs").exists() or not list((own.parent / "runs").glob("*/runs"))


def test_files_that_are_none(own: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name one file" in said(f"compare {own.parent}", capsys, 2)
    one = own.parent / "one.csv"
    one.write_text("prompt,completion\na,b\n")
    assert (
        "1 row: too few" in (error := said(f"compare {one}", capsys, 1)) and "at least 10" in error
    )
    one.write_bytes("prompt,completion\ncañón,b\n".encode("latin-1"))  # read as Windows-1252
    assert "1 row: too few" in said(f"compare {one}", capsys, 1)
    one.write_text("prompt,completion\n" + "a,b\n" * 3)
    missing = said(f"compare {one} --base ./no/such/base", capsys, 1)
    assert "too few" in missing  # rows first: they cost nothing to look at


@pytest.mark.slow
def test_a_budget_in_which_nothing_fits_says_which_one_would(
    own: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = f"compare '{own}' --columns 'prompt: Pregunta, completion: Respuesta correcta' --skip-bad-rows --base {tiny}"
    error = said(f"{told} {SMALL} --time-budget 1s", capsys, 2)
    assert "the budget of 1s is too small" in error
    assert re.search(r"next: --time-budget \d+m", error)


@pytest.mark.slow
@pytest.mark.timeout(600)  # five processes, each of which loads torch
def test_killed_at_any_moment_it_goes_on(
    tiny: Path, chats: Path, general: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at three moments, as the folder grows; what comes out is what one run gives, to the last digit.

    The process that is killed is one of its own; what follows, and the uninterrupted run, are not.
    """

    def command(out: Path) -> list[str]:
        told = f"compare {chats} --base {tiny} --retention-text {general} --methods lora,mora,full --num-seeds 2 --num-trials 2 --max-steps 6 --limit 4"
        return shlex.split(
            f"{told} --rank 2 --max-new-tokens 4 --output-dir {out} --time-budget 2h"
        )

    killed = 0
    for moment in ("cost/mora.json", "trials", "judged/mora-0.json"):
        process = subprocess.Popen(
            [sys.executable, "-m", "afina", *command(tmp_path / "cut")],
            start_new_session=True,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        while process.poll() is None and not (tmp_path / "cut" / moment).exists():
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed == 3
    monkeypatch.setattr(
        module, "measure_in_subprocess", lambda settings, seconds: measure(settings)
    )
    assert run(command(tmp_path / "cut")) == run(command(tmp_path / "whole")) == 0
    one, other = (
        json.loads((tmp_path / name / "compare.json").read_text()) for name in ("cut", "whole")
    )
    for name in ("lora", "mora", "full"):
        figures = ("score", "loss", "forgetting", "overfitting", "learning_rate", "tried")
        assert {key: one["methods"][name][key] for key in figures} == {
            key: other["methods"][name][key] for key in figures
        }
    assert (tmp_path / "cut" / "report.html").is_file()
