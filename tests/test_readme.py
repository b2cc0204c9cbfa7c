"""The two READMEs say the same, and what they say to type works."""

import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path

import pytest

import afina
from afina.cli.main import parse
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.errors import DataError
from afina.settings import TrainSettings

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.es.md"]
CPU_INDEX = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = {  # shown in this order
    "jsonl": ["polite.jsonl", "pairs.jsonl"],
    "csv": ["questions.csv", "reviews.csv"],
    "yaml": ["sweep.yaml", "settings.yaml"],
    "py": ["rules.py"],
}
VISION = (
    "google/vit-base-patch16-224-in21k"  # nothing is downloaded in a test: a tiny one stands for it
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, kind: str | None = None) -> list[str]:
    """The code blocks of a file, of one kind or as (kind, text) run together."""
    found = BLOCK.findall(read(name))
    return [text if kind else f"{k}\n{text}" for k, text in found if kind in (None, k)]


def prose(name: str) -> str:
    return BLOCK.sub("", read(name))


def commands() -> list[str]:
    """The lines of README.md that call afina; --help and --version aside."""
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    return [
        line
        for line in lines
        if line.startswith("afina ") and not {"--help", "--version"} & set(line.split())
    ]


def headings(name: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(name), re.MULTILINE)]


def table_rows(name: str, columns: int) -> list[list[str]]:
    """Rows of all tables with so many columns: the cells, without the heading rows' lines."""
    lines = [line for line in prose(name).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == columns and not set(row[0]) <= {"-"}]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that README.md shows, as the reader would have it."""
    for kind, names in FILES.items():
        for name, block in zip(names, blocks("README.md", kind), strict=True):
            (tmp_path / name).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_twins_have_the_same_shape() -> None:
    english, spanish = READMES
    assert headings(english) == headings(spanish)
    assert blocks(english) == blocks(spanish)
    assert len(re.findall(r"^[-*] ", prose(english), re.MULTILINE)) == len(
        re.findall(r"^[-*] ", prose(spanish), re.MULTILINE)
    )
    assert [len(table_rows(english, n)) for n in (2, 3)] == [
        len(table_rows(spanish, n)) for n in (2, 3)
    ]


def test_what_stands_between_backticks_is_the_same() -> None:
    """Names of flags, files and methods are not translated; the question put to the demo is."""
    english, spanish = (set(re.findall(r"`([^`\n]+)`", prose(name))) for name in READMES)
    assert english ^ spanish == {
        "Correct: the dogs runs in the park",
        "Corrige: los perros corre en el parque",
    }


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md", "docs/serving.md"])
def test_links_lead_somewhere(name: str) -> None:
    titles = re.findall(r"^#+ (.+)$", prose(name), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith(("http://", "https://")):
            assert (ROOT / target.partition("#")[0]).exists(), target


def test_the_changelog_has_this_version() -> None:
    assert re.search(rf"^## \[{re.escape(afina.__version__)}\]", read("CHANGELOG.md"), re.MULTILINE)


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line: str, workplace: Path) -> None:
    settings = workplace / "runs" / "polite" / "settings.yaml"  # what the run before it leaves
    settings.parent.mkdir(parents=True)
    settings.write_text("data: polite.jsonl\n", encoding="utf-8")
    parse(shlex.split(line, comments=True)[1:])


def test_defaults_of_the_settings_table() -> None:
    rows = [row for row in table_rows("README.md", 3) if row[0].startswith("`--")]
    assert len(rows) == 12
    for flag, default, _ in rows:
        field = TrainSettings.model_fields[flag.strip("`-").replace("-", "_")]
        if default.startswith("`") and flag != "`--out`":
            assert default == f"`{field.default}`", flag


def test_the_methods_named_are_there() -> None:
    from afina.adapters.presets import get_preset
    from afina.adapters.registry import registered_methods

    rows = table_rows("README.md", 3)
    start = rows.index(["method", "what learns", "when"]) + 1
    table = takewhile(lambda row: row[0].startswith("`"), rows[start:])
    named = [row[0].strip("`") for row in table if re.fullmatch(r"`[a-z]+`", row[0])]
    assert {"lora", "full", "freeze"} <= set(named)
    for name in named:
        assert get_preset(name, blocks=4).method in registered_methods()


def test_the_error_shown_is_the_real_one(workplace: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_table(Path("questions.csv"), SFT)
    assert blocks("README.md", "text") == [f"afina: {caught.value}\n"]


def make_pictures(folder: Path) -> None:
    """Pictures of two classes, one more, and a tiny ViT to learn them."""
    from PIL import Image
    from transformers import ViTConfig, ViTModel

    for label, grey in (("cat", 40), ("dog", 200)):
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (12, 12), (grey + number,) * 3).save(
                folder / "pictures" / label / f"{number}.png"
            )
    Image.new("RGB", (12, 12), (50, 50, 50)).save(folder / "photo.png")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder / "vit")


@contextmanager
def served(line: str, environment: dict[str, str], key: Path) -> Iterator[None]:
    """A command that serves until it is stopped, run while the block is; its port is the one that README names."""
    server = subprocess.Popen(shlex.split(line), env=environment, stderr=subprocess.PIPE)
    try:
        assert server.stderr is not None
        told = b""
        while b"Uvicorn running" not in told:
            line_told = server.stderr.readline()
            assert line_told, told.decode()
            told += line_told
        threading.Thread(target=server.stderr.read, daemon=True).start()
        assert key.is_file()
        yield
    finally:
        server.terminate()
        assert server.wait(60) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)  # two dozen processes, each of which loads torch
def test_the_reader_who_types_everything(workplace: Path, request: pytest.FixtureRequest) -> None:
    """All commands but the demo (which has a test of its own), in order, in an empty folder; then the Python block."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    make_pictures(workplace)
    script = [line.replace(VISION, "vit") for line in commands() if "demo" not in line]
    assert len(script) > 8
    servers = ExitStack()
    request.addfinalizer(servers.close)
    for line in script:
        if line.startswith("afina serve"):
            servers.enter_context(
                served(line, environment, workplace / "runs" / "serve" / "admin.key")
            )
            continue
        done = subprocess.run(
            ["bash", "-c", line],
            stdin=subprocess.DEVNULL,
            env=environment,
            capture_output=True,
            text=True,
        )
        expected = (
            3 if line.startswith("afina audit") and "--accept" not in line else 0
        )  # a person must look first
        assert done.returncode == expected, f"{line}\n{done.stdout}\n{done.stderr}"
    client, block = blocks("README.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", client], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "please" in done.stdout
    servers.close()
    done = subprocess.run(
        [sys.executable, "-c", block], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    section = prose("README.md").partition("## The run folder")[2].partition("\n## ")[0]
    names = re.findall(r"^\| `([\w.]+)/?` \|", section, re.MULTILINE)
    assert {path.name for path in (workplace / "runs" / "polite").iterdir()} == set(names)


def test_the_small_pytorch_comes_before_what_installs_one() -> None:
    """PyPI's torch for Linux x86 is the one for CUDA, whatever constraints.txt holds: the index must be told before."""
    for name in READMES:
        text = read(name)
        assert (
            text.index(CPU_INDEX)
            < text.index("make demo")
            < text.index("pip install -c constraints.txt")
        )
    for name in ("constraints.txt", "Makefile"):
        assert CPU_INDEX in read(name)
