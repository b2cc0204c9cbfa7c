"""Results render themselves: stored JSON gives the stored terminal and Markdown text, and the same JSON again.

After a change of words: `python tests/test_rendering.py` writes the texts anew, to be read before they are committed.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from afina.audit.results import AuditResult
from afina.comparison.results import AdviceResult
from afina.io.result import Result, ResultTable, ResultText, format_bytes, format_seconds
from afina.merging.results import CombineResult, MergeResult, ShowResult
from afina.planning.results import PlanResult

FOLDER = Path(__file__).parent / "data" / "results"
KINDS: dict[str, type[Result]] = {
    "plan": PlanResult,
    "merge": MergeResult,
    "combine": CombineResult,
    "show": ShowResult,
    "audit": AuditResult,
    "advise-en": AdviceResult,
    "advise-es": AdviceResult,
}


def read_result(name: str) -> Result:
    """Return the stored result of that name."""
    return KINDS[name](**json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def terminal(result: Result) -> str:
    """Return what is printed on a terminal of 100 columns, without trailing blanks."""
    stream = io.StringIO()
    Console(file=stream, width=100).print(result, crop=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


@pytest.mark.parametrize("name", KINDS)
def test_stored_result_renders_to_stored_text(name: str) -> None:
    result = read_result(name)
    assert terminal(result) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert result.to_markdown() == (FOLDER / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", KINDS)
def test_json_form_keeps_every_key_and_value(name: str) -> None:
    stored = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    written = json.loads(json.dumps(read_result(name).to_json()))
    assert written == {"format_version": written["format_version"]} | stored


METHODS = ResultTable(
    "a base, 5,244,160 parameters",
    [
        ("lora", "895.55 MB", "off", "12.3 s", "1.2 h", "24,780,123", "103 kB", "yes"),
        ("full", "this base is in 4 bits"),
    ],
    (
        *("method", "peak memory", "gradient checkpointing", "per optimizer step", "full run"),
        *("trainable parameters", "adapter file", "fits here"),
    ),
)
LOSSES = ResultTable("", [("a/long/path/" * 9, "3.2100", "0.0712")], ("of", "before", "after"))


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("table", [METHODS, LOSSES], ids=["methods", "losses"])
def test_no_figure_is_cut_and_no_line_is_longer_than_the_terminal(
    table: ResultTable, width: int
) -> None:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table, crop=False)
    text = stream.getvalue()
    words = [word for row in table.rows for cell in row for word in cell.split()]
    assert all(word in text for word in words if len(word) <= 30)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_languages_print_the_same_facts() -> None:
    english, spanish = (read_result(f"advise-{lang}") for lang in ("en", "es"))
    assert len(english.content()) == len(spanish.content())
    for one, other in zip(english["reasons"], spanish["reasons"], strict=True):
        assert (one["source"], one["link"]) == (other["source"], other["link"])


@dataclass(frozen=True, eq=False)
class Sample(Result):
    """Result with a required and an optional key."""

    name: str
    share: float | None = None

    def content(self) -> list[ResultTable | ResultText]:
        """Return text that markup and Markdown could misread."""
        return [ResultTable("[b]t[/b]", [("a|b", "<i>[red]x")]), ResultText("[bold]y[/bold]")]


def test_result_is_a_read_only_mapping() -> None:
    result = Sample("a")
    assert dict(result) == {"name": "a", "share": None} == result
    assert "name" in result and result.get("other", 3) == 3
    with pytest.raises(KeyError):
        result["content"]
    with pytest.raises(AttributeError):
        result.name = "b"  # type: ignore[misc]


def test_texts_are_printed_as_they_are() -> None:
    shown = terminal(Sample("a"))
    assert "[b]t[/b]" in shown and "<i>[red]x" in shown and "[bold]y[/bold]" in shown
    assert "| a\\|b | &lt;i&gt;[red]x |" in Sample("a").to_markdown()


def test_numbers_have_units() -> None:
    assert [format_bytes(n) for n in (5, 1500, 2e6, 3e9)] == [
        "5.00 B",
        "1.50 kB",
        "2.00 MB",
        "3.00 GB",
    ]
    seconds = (None, 0.0123, 5.0, 600.0, 7200.0)
    assert [format_seconds(n) for n in seconds] == [
        "unknown",
        "0.0123 s",
        "5.0 s",
        "10.0 min",
        "2.0 h",
    ]


if __name__ == "__main__":
    for name in KINDS:
        (FOLDER / f"{name}.txt").write_text(terminal(read_result(name)), encoding="utf-8")
        (FOLDER / f"{name}.md").write_text(read_result(name).to_markdown(), encoding="utf-8")
