"""SIGTERM: the step is finished and saved, the process exits with 143, and the same command resumes."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from afina.cli.main import run as run_cli
from afina.training.termination import Termination, termination
from afina.training.trainer import Trainer
from helpers import metrics


@pytest.mark.parametrize("step", [7, 12])  # 12: the last
def test_sigterm_saves_and_the_same_command_resumes(
    tiny: Path,
    chats: Path,
    general: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    flags = ["--max-steps=12", "--eval-steps=5", "--dropout=0.1", "--max-tokens-per-batch=256"]
    command = ["train", str(chats), f"--base={tiny}", f"--retention-text={general}", *flags]
    folders = [f"--output-dir={tmp_path / name}" for name in ("whole", "cut")]
    assert run_cli([*command, folders[0]]) == 0

    finish = Trainer.finish_step

    def finish_and_ask(self: Trainer, *arguments: object) -> None:
        finish(self, *arguments)  # type: ignore[arg-type]
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "finish_step", finish_and_ask)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run_cli([*command, folders[1], "--resume", "auto"])  # nothing to resume: it begins
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before and not termination.is_requested
    progress = json.loads((tmp_path / "cut" / "checkpoint" / "progress.json").read_text())
    assert progress["progress"]["step"] == step

    monkeypatch.setattr(Trainer, "finish_step", finish)
    assert run_cli([*command, folders[1], "--resume", "auto"]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut")]
    assert runs[0]["adapter"] == runs[1]["adapter"]
    # and once more: a finished run ends at once, with the same adapter
    assert run_cli([*command, folders[1], "--resume=auto"]) == 0
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["adapter"] == runs[0]["adapter"]


def test_before_the_first_step_the_process_ends_at_once() -> None:
    asked = Termination()
    with asked.handled():
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 143 and not asked.is_requested


def test_other_threads_leave_the_signal_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Termination().handled():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_auto_does_not_take_a_folder_of_something_else(
    tiny: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    command = ["train", str(chats), f"--base={tiny}", f"--output-dir={tmp_path}"]
    assert run_cli([*command, "--resume", "auto"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert run_cli([*command, "--resume", "perhaps"]) == 2
