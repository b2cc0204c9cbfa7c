"""`afina compare` and `afina advise` as a person runs them: what goes on, and what came out."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from afina.comparison.advise import advise as advise_on
from afina.comparison.advise import ask, written
from afina.comparison.compare import compare as compare_methods
from afina.comparison.findings import SAYINGS
from afina.comparison.report import view
from afina.settings import AdviseSettings, CompareSettings

console = Console()


def compare(settings: CompareSettings) -> dict[str, Any]:
    """Compare, and say what is being done on standard error."""
    return compare_methods(
        settings, say=lambda text: print(f"afina: {text}", file=sys.stderr, flush=True)
    )


def advise(settings: AdviseSettings) -> dict[str, Any]:
    """Advise; somebody who sits at the screen is asked for what was not told."""
    return advise_on(ask(settings, _question) if sys.stdin.isatty() else settings)


def _question(text: str) -> str:
    try:
        return input(f"{text} ").strip()
    except EOFError:  # Ctrl-D: no more answers
        raise KeyboardInterrupt from None


def show_advise(result: dict[str, Any]) -> None:
    """What to use, what it would take, and why."""
    say = SAYINGS[result["lang"]]
    table = Table(title=say["title"], title_justify="left", show_header=False)
    for name, value in written(result):
        table.add_row(name, escape(value))
    console.print(table)
    for reason in result["reasons"]:
        source = (
            f" ({say['source']} {reason['source']}, {reason['link']})" if reason["source"] else ""
        )
        console.print(f"- {reason['text']}{source}", highlight=False, markup=False)


def show_compare(result: dict[str, Any]) -> None:
    """The answer, the two tables and where the report lies."""
    told = view(result, result["settings"]["lang"])
    for part in ("quality", "cost"):
        table = Table(title=told["w"][part], title_justify="left")
        for column in told[part]["head"]:
            table.add_column(column)
        for row in told[part]["rows"]:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(told["answer"], style="bold", highlight=False, markup=False)
    for line in [*told["reasons"], *told["notes"]]:
        console.print(f"- {line}", highlight=False, markup=False)
    console.print(f"{result['folder']}/report.html", highlight=False, markup=False)
