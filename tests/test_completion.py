"""`afina completion`: a static script that completes commands, flags, values and files."""

import shutil
import subprocess
from pathlib import Path

import pytest

from afina.cli.completion import completion
from afina.cli.main import COMMANDS
from afina.settings import CompletionSettings, make_settings

REASON = "needs the extra completion: pip install 'afina[completion]'"


def script(shell: str) -> str:
    pytest.importorskip("shtab", reason=REASON)
    return completion(make_settings(CompletionSettings, {"shell": shell})).script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_has_every_command(shell: str) -> None:
    text = script(shell)
    assert all(name in text for name in COMMANDS) and "learning-rate" in text
    if program := shutil.which(shell):
        done = subprocess.run([program, "-n"], input=text, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tra", ["train"]),
        ("train --scal", ["--scaling"]),
        ("train --scaling ''", ["lora", "rslora"]),
        ("train --dpo.loss", ["--dpo.loss-type"]),
        ("train some", ["some.jsonl"]),
    ],
)
def test_bash_completes(words: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "afina.bash").write_text(script("bash"))
    (tmp_path / "some.jsonl").write_text("")
    program = (
        f"source ./afina.bash; COMP_WORDS=(afina {words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        'COMPREPLY=(); _shtab_afina; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, text=True, capture_output=True)
    assert sorted(done.stdout.split()) == expected, done.stderr
