"""The guide: both languages say the same, its pictures are those that are drawn, its links lead somewhere, its commands run."""

import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from afina.cli.main import parse
from helpers import type_line
from test_readme import BLOCK, served

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guide"
sys.path[:0] = [str(ROOT / "docs"), str(GUIDE)]

import build  # noqa: E402
import draw  # noqa: E402

PAGES = sorted(file.name for file in (GUIDE / "en").glob("*.md"))


def read(language: str, page: str) -> str:
    return (GUIDE / language / page).read_text(encoding="utf-8")


def commands() -> list[str]:
    """What the guide says to type, in the order of its pages."""
    order = [
        Path(name).name
        for name in re.findall(r"\]\(([\w-]+\.md)\)", read("en", "index.md"))
        if name in PAGES
    ]
    assert sorted(order) == sorted(set(PAGES) - {"index.md"}), (
        "the first page leads to every other one, once"
    )
    blocks = [text for page in ["index.md", *order] for _, text in BLOCK.findall(read("en", page))]
    return [line for block in blocks for line in block.splitlines()]


def shape(text: str) -> dict[str, object]:
    """What two languages of a page have in common."""
    bare = BLOCK.sub("", text)
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", bare, re.MULTILINE)],
        "blocks": BLOCK.findall(text),
        "items": len(re.findall(r"^- ", bare, re.MULTILINE)),
        "paragraphs": len(re.findall(r"\n\n(?=\S)", bare.strip())),
        "bold": bare.count("**"),
        "links": re.findall(r"\]\(([^)]+)\)", bare),
        "code": set(re.findall(r"`([^`\n]+)`", bare)),
    }


def test_the_languages_have_the_same_pages() -> None:
    assert sorted(file.name for file in (GUIDE / "es").glob("*.md")) == PAGES
    asked = {
        "fine-tuning",
        "lora",
        "qlora",
        "mora",
        "alora",
        "many-adapters",
        "rlhf",
        "safety",
        "choosing",
        "report",
    }
    assert {Path(page).stem for page in PAGES} == {"index", *asked}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_and_its_twin_have_the_same_shape(page: str) -> None:
    english, spanish = (shape(read(language, page)) for language in draw.LANGUAGES)
    assert english == spanish
    words = [len(re.findall(r"\w+", read(language, page))) for language in draw.LANGUAGES]
    assert 0.75 < words[0] / words[1] < 1.33, "one of them says more"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short_and_has_a_picture_and_a_command(page: str) -> None:
    for language in draw.LANGUAGES:
        text = read(language, page)
        assert len(text.split()) < 400
        assert len(BLOCK.findall(text)) >= 1 and all(
            kind == "bash" for kind, _ in BLOCK.findall(text)
        )
        [(alt, picture)] = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", text)
        assert (
            picture == f"pictures/{Path(page).stem}.svg" and (GUIDE / language / picture).is_file()
        )
        words = yaml.safe_load((GUIDE / "words.yaml").read_text(encoding="utf-8"))
        assert alt == words[Path(page).stem]["alt"][language], (
            "who cannot see the picture reads the same"
        )


@pytest.mark.parametrize("language", draw.LANGUAGES)
@pytest.mark.parametrize("name", draw.PICTURES)
def test_pictures_are_those_that_are_drawn(name: str, language: str) -> None:
    file, text = draw.drawn(name, language)
    assert file.read_text(encoding="utf-8") == text, "python docs/guide/draw.py"
    picture = ElementTree.fromstring(text)
    boxes = [element for element in picture.iter("{http://www.w3.org/2000/svg}rect")]
    for box in boxes:
        assert (
            float(box.get("x", 0)) >= 0
            and float(box.get("x", 0)) + float(box.get("width", 0)) <= draw.WIDTH
        )
        assert float(box.get("y", 0)) >= 0 and float(box.get("y", 0)) + float(
            box.get("height", 0)
        ) <= float(picture.get("viewBox", "").split()[3])
    for one in picture.iter("{http://www.w3.org/2000/svg}text"):
        half = 0.31 * float(one.get("font-size", 0)) * len(one.text or "")
        x = float(one.get("x", 0)) + (half if one.get("text-anchor") == "start" else 0)
        assert x - half > -8 and x + half < draw.WIDTH + 8, one.text


@pytest.mark.parametrize("language", draw.LANGUAGES)
@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_sources_lead_somewhere(page: str, language: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", read(language, page)):
        if not target.startswith("https://"):
            assert (GUIDE / language / target).is_file(), target


@pytest.mark.slow
def test_the_site_is_built_without_dead_links_and_asks_nobody(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    site = build.build(tmp_path)
    assert list(build.dead(site)) == []
    for half, language in ((site, "en"), (site / "es", "es")):
        there = {file.name for file in half.glob("*.html")}
        assert {f"{Path(page).stem}.html" for page in [*PAGES, *build.SHARED.values()]} <= there
        assert f'<html lang="{language}"' in (half / "index.html").read_text(encoding="utf-8")
        assert all((half / "pictures" / f"{name}.svg").is_file() for name in draw.PICTURES)
    assert not [
        file
        for file in site.rglob("*.css")
        if re.search(rb"url\(['\"]?(https?:)?//", file.read_bytes())
    ]


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text(
        '<p id="here"></p><a href="good.html#here"></a><a href="https://elsewhere.org"></a>'
    )
    assert list(build.dead(tmp_path)) == []
    (tmp_path / "bad.html").write_text(
        '<a href="none.html"></a><a href="good.html#there"></a><script src="https://cdn.org/x.js"></script>'
        '<link rel="stylesheet" href="//fonts.org/f.css"><img src="lost.svg">'
    )
    found = list(build.dead(tmp_path))
    assert len(found) == 5 and sum("from elsewhere" in line for line in found) == 2


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's folder, as far as the guide needs it."""
    (tmp_path / "recipes").mkdir()
    for file in (ROOT / "recipes").glob("*.yaml"):
        shutil.copy(file, tmp_path / "recipes")
    shutil.copytree(ROOT / "recipes" / "data", tmp_path / "recipes" / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line: str, workplace: Path) -> None:
    command, settings, _ = parse(shlex.split(line)[1:])
    data = getattr(settings, "data", None)
    assert command == line.split()[1] and (data is None or Path(data).is_file())


def test_what_a_command_needs_was_made_before(workplace: Path) -> None:
    written: set[str] = set()
    for line in commands():
        command, settings, _ = parse(shlex.split(line)[1:])
        adapter = getattr(settings, "adapter", None)
        assert adapter is None or str(adapter) in written, line
        if command == "train":
            written.add(str(settings.output_dir))


def few_steps(line: str) -> str:
    """The command with two steps in the place of its own."""
    if line.startswith("afina train"):
        return f"{line} --max-steps 2"
    return re.sub(r"--max-steps \d+", "--max-steps 2", line)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_reader_who_types_everything(workplace: Path) -> None:
    """All commands but the demo, which has a test of its own, in order; what trains takes two steps."""
    typed = [line for line in commands() if line != "afina demo"]
    assert len(typed) > 12
    for line, following in pairwise([*typed, ""]):
        if line.startswith("afina serve"):
            with served(line, workplace):
                type_line(following, workplace)
        elif "--base-url" not in line:
            type_line(few_steps(line), workplace)
    assert (workplace / "runs" / "compare-sentiment" / "report.html").is_file()
