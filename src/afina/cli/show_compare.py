"""`afina compare` and `afina advise` as a person runs them: what goes on, and what came out."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from afina.comparing.compare import compare as compare_methods
from afina.comparing.report import view
from afina.config import CompareSettings

console = Console()


def compare(settings: CompareSettings) -> dict[str, Any]:
    """Compare, and say what is being done on standard error."""
    return compare_methods(settings, say=lambda text: print(f"afina: {text}", file=sys.stderr, flush=True))


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
