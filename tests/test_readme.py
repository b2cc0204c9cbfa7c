"""README and the pages of docs: both languages have the same shape, and every command shown works."""

import os
import re
import shlex
import shutil
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
from helpers import type_line

ROOT = Path(__file__).parent.parent
TOPICS = (
    "data",
    "methods",
    "runs",
    "classifiers",
    "preferences",
    "merging",
    "exports",
    "audit",
    "exactness",
    "other_tools",
)
PAGES = {"README.md": "README.es.md"} | {f"docs/{n}.md": f"docs/es/{n}.md" for n in TOPICS}
CPU_INDEX = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = {  # file -> the page and the kind of block that shows it
    "polite.jsonl": ("README.md", "jsonl"),
    "questions.csv": ("docs/data.md", "csv"),
    "sweep.yaml": ("docs/methods.md", "yaml"),
    "settings.yaml": ("docs/runs.md", "yaml"),
    "reviews.csv": ("docs/classifiers.md", "csv"),
    "pairs.jsonl": ("docs/preferences.md", "jsonl"),
    "rules.py": ("docs/preferences.md", "py"),
    "other.yml": ("docs/other_tools.md", "yml"),
}
VISION = "google/vit-base-patch16-224-in21k"  # a tiny one stands for it: tests download nothing


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, kind: str | None = None) -> list[str]:
    """The code blocks of a page, of one kind or as (kind, text) run together."""
    found = BLOCK.findall(read(name))
    return [text if kind else f"{k}\n{text}" for k, text in found if kind in (None, k)]


def prose(name: str) -> str:
    return BLOCK.sub("", read(name))


def commands(page: str) -> list[str]:
    """The lines of a page that call afina, except the demo, which has a test of its own."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    starts = ("afina ", "torchrun ")
    return [line for line in lines if line.startswith(starts) and "demo" not in line]


def headings(name: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(name), re.MULTILINE)]


def table_rows(name: str, columns: int) -> list[list[str]]:
    """Rows of all tables with so many columns: the cells, without the heading rows' lines."""
    lines = [line for line in prose(name).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == columns and not set(row[0]) <= {"-"}]


def quoted(name: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", prose(name)))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages show, and pictures for the classifier."""
    folder = tmp_path_factory.mktemp("reader")
    for name, (page, kind) in FILES.items():
        [block] = blocks(page, kind)
        (folder / name).write_text(block, encoding="utf-8")
    make_pictures(folder)
    return folder


@pytest.fixture
def workplace(reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder in which nothing has been run yet."""
    shutil.copytree(reader, tmp_path / "work", ignore=shutil.ignore_patterns("runs"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}


def type_any(line: str, folder: Path) -> None:
    """Run one line of a page; torchrun's is processes of its own."""
    if line.startswith("torchrun "):
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    else:
        type_line(line.replace(VISION, "vit"), folder)


@pytest.fixture(scope="module")
def polite(reader: Path) -> Path:
    """The folder of a reader of README who has trained and typed the rest of its five lines."""
    for line in commands("README.md"):
        if "chat --base-url" not in line and not line.startswith("afina serve"):
            type_any(line, reader)
    return reader


@pytest.mark.parametrize("english", PAGES)
def test_both_languages_have_the_same_shape(english: str) -> None:
    spanish = PAGES[english]
    assert headings(english) == headings(spanish)
    assert blocks(english) == blocks(spanish)
    lists = [re.findall(r"^[-*] ", prose(name), re.MULTILINE) for name in (english, spanish)]
    assert len(lists[0]) == len(lists[1])
    for columns in (2, 3):
        assert len(table_rows(english, columns)) == len(table_rows(spanish, columns))


@pytest.mark.parametrize("english", PAGES)
def test_names_in_backticks_are_the_same_in_both_languages(english: str) -> None:
    """Names of flags, files and methods are not translated; the prompt of the demo is."""
    prompts = {"Correct: the dogs runs in the park", "Corrige: los perros corre en el parque"}
    assert quoted(english) ^ quoted(PAGES[english]) == (
        prompts if english == "README.md" else set()
    )


def test_readme_is_short() -> None:
    assert all(len(read(name).splitlines()) <= 250 for name in ("README.md", "README.es.md"))


OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md", "docs/serving.md", "docs/security.md"]


@pytest.mark.parametrize("name", [*PAGES, *PAGES.values(), *OTHERS])
def test_links_lead_to_existing_files(name: str) -> None:
    titles = re.findall(r"^#+ (.+)$", prose(name), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith(("http://", "https://")):
            path = (ROOT / name).parent / target.partition("#")[0]
            assert path.exists(), target


def test_changelog_has_this_version() -> None:
    assert re.search(rf"^## \[{re.escape(afina.__version__)}\]", read("CHANGELOG.md"), re.MULTILINE)


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_every_command_parses(line: str, workplace: Path) -> None:
    settings = workplace / "runs" / "polite" / "settings.yaml"  # written by the run before it
    settings.parent.mkdir(parents=True)
    settings.write_text("data: polite.jsonl\n", encoding="utf-8")
    words = shlex.split(line, comments=True)
    parse(words[words.index("afina") + 1 :])


def test_settings_table_shows_the_defaults() -> None:
    rows = [row for row in table_rows("docs/runs.md", 3) if row[0].startswith("`--")]
    assert len(rows) == 12
    for flag, default, _ in rows:
        field = TrainSettings.model_fields[flag.strip("`-").replace("-", "_")]
        if default.startswith("`") and flag != "`--output-dir`":
            assert default == f"`{field.default}`", flag


def test_methods_in_the_table_are_registered() -> None:
    from afina.adapters.presets import get_preset
    from afina.adapters.registry import registered_methods

    rows = table_rows("docs/methods.md", 3)
    start = rows.index(["method", "what is trained", "when"]) + 1
    table = takewhile(lambda row: row[0].startswith("`"), rows[start:])
    named = [row[0].strip("`") for row in table if re.fullmatch(r"`[a-z]+`", row[0])]
    assert {"lora", "full", "freeze"} <= set(named)
    for name in named:
        assert get_preset(name, num_layers=4).method in registered_methods()


def test_error_in_the_docs_is_the_real_one(workplace: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_table(Path("questions.csv"), SFT)
    assert blocks("docs/runs.md", "text") == [f"afina: {caught.value}\n"]


def make_pictures(folder: Path) -> None:
    """Pictures of two classes, one more, and a tiny ViT to learn them."""
    from PIL import Image
    from transformers import ViTConfig, ViTModel

    for label, gray in (("cat", 40), ("dog", 200)):
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (12, 12), (gray + number,) * 3).save(
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
def served(line: str, folder: Path) -> Iterator[None]:
    """A server as its command starts it, until the block ends; at the port that README names."""
    command = [sys.executable, "-m", *shlex.split(line)]
    server = subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE)
    try:
        assert server.stderr is not None
        log = b""
        while b"Uvicorn running" not in log:
            logged = server.stderr.readline()
            assert logged, log.decode()
            log += logged
        threading.Thread(target=server.stderr.read, daemon=True).start()
        assert (folder / "runs" / "serve" / "admin.key").is_file()
        yield
    finally:
        server.terminate()
        assert server.wait(60) == 0


def run_python(block: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)  # with the fixture: twenty lines, a server and two processes
def test_reader_of_readme_types_everything(polite: Path) -> None:
    """The five lines and the other commands (in the fixture), the server, and both Python blocks."""
    client, block = blocks("README.md", "python")
    server, chat = [
        line for line in commands("README.md") if re.match("afina (serve|chat -)", line)
    ]
    with ExitStack() as stack:
        stack.enter_context(served(server, polite))
        type_any(chat, polite)
        assert "please" in run_python(client, polite)
    run_python(block, polite)
    section = prose("docs/runs.md").partition("## The run folder")[2].partition("\n## ")[0]
    names = re.findall(r"^\| `([\w.]+)/?` \|", section, re.MULTILINE)
    assert {path.name for path in (polite / "runs" / "polite").iterdir()} == set(names)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and commands(page)])
def test_reader_of_a_page_types_everything(page: str, polite: Path, tmp_path: Path) -> None:
    """All commands of one page, in order, in the folder of a reader of README."""
    folder = shutil.copytree(polite, tmp_path / "work")
    for line in commands(page):
        type_any(line, folder)


def test_small_pytorch_is_named_before_what_installs_one() -> None:
    """PyPI's torch for Linux x86 is built for CUDA, whatever constraints.txt pins."""
    for name in ("README.md", "README.es.md"):
        text = read(name)
        assert (
            text.index(CPU_INDEX)
            < text.index("make demo")
            < text.index("pip install -c constraints.txt")
        )
    for name in ("constraints.txt", "Makefile"):
        assert CPU_INDEX in read(name)
