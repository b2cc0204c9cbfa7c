"""Base class of what commands and public functions return: read-only values that render themselves.

A result type lists its JSON keys as dataclass fields and describes its document in `content`; the
terminal and the Markdown form are two renderings of that one description. The module imports no
torch, and rich only while printing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

from afina.io.translation import translate

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

RESULT_FORMAT_VERSION = 2


MAX_FIGURE_LENGTH = 30  # characters of a word that is never broken; a longer one is a path or text
BORDER_WIDTH = 3  # characters of a column's border and padding in a terminal


@dataclass(frozen=True)
class ResultTable:
    """Table of a result: rows of text cells below a title.

    Without `head`, each row is a name and a value. In a narrow terminal cells wrap between words,
    and where the words do not fit, each row becomes a block of lines: no figure is ever cut.
    """

    title: str
    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()

    def __rich_console__(
        self, console: "Console", options: "ConsoleOptions"
    ) -> "Iterator[RenderableType]":
        """Yield the table for a terminal, in its language; cells are printed without markup."""
        table = self._translated()
        widths = table._column_widths(options.max_width)
        yield table._stacked() if widths is None else table._table(widths)

    def _translated(self) -> "ResultTable":
        rows = [tuple(map(translate, row)) for row in self.rows]
        return ResultTable(translate(self.title), rows, tuple(map(translate, self.head)))

    def _column_widths(self, max_width: int) -> list[int] | None:
        """Return the width of each column in characters; None where the words do not fit."""
        columns = list(zip_longest(self.head, *self.rows, fillvalue=""))
        natural = [max(len(line) for cell in c for line in cell.split("\n")) for c in columns]
        words = [[word for cell in column for word in cell.split()] for column in columns]
        least = [
            min(
                width, max((len(word) for word in own if len(word) <= MAX_FIGURE_LENGTH), default=1)
            )
            for width, own in zip(natural, words, strict=True)
        ]
        spare = max_width - 1 - BORDER_WIDTH * len(columns) - sum(least)
        if spare < 0:
            return None
        widths = list(least)
        by_need = sorted(range(len(columns)), key=lambda number: natural[number] - least[number])
        for index, number in enumerate(by_need):
            more = min(natural[number] - least[number], spare // (len(columns) - index))
            widths[number] += more
            spare -= more
        return widths

    def _table(self, widths: Sequence[int]) -> "RenderableType":
        from rich.markup import escape
        from rich.table import Table

        title = escape(self.title) if self.title else None
        table = Table(title=title, title_justify="left", show_header=bool(self.head))
        for width, name in zip_longest(widths, self.head, fillvalue=""):
            table.add_column(escape(str(name)), width=int(width or 1), overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def _stacked(self) -> "RenderableType":
        """Return a block of lines per row: its first cell, then each other one after its name."""
        from rich.text import Text

        blocks = [self.title] if self.title else []
        for first, *others in self.rows:
            is_full = len(others) == len(self.head) - 1
            names = self.head[1:] if is_full else [""] * len(others)
            lines = [
                f"  {name}: {cell}" if name else f"  {cell}" for name, cell in zip(names, others)
            ]
            blocks.append("\n".join([first, *lines]))
        return Text("\n".join(blocks), overflow="fold")

    def to_markdown(self) -> str:
        """Return the table as GitHub-flavored Markdown, its title as a bold line above it."""
        width = max((len(row) for row in self.rows), default=len(self.head))
        lines = [self.head or [""] * width, ["---"] * width, *self.rows]
        table = "\n".join(f"| {' | '.join(map(markdown_cell, row))} |" for row in lines)
        return f"**{self.title}**\n\n{table}" if self.title else table


@dataclass(frozen=True)
class ResultText:
    """Lines of a result: `style` is rich's.

    `wraps` is False for commands, to be pasted entire, and texts of models; these stay as they are
    in every language.
    """

    text: str
    style: str = ""
    wraps: bool = True

    def __rich__(self) -> "RenderableType":
        """Return the text for a terminal, without markup or highlighting."""
        from rich.text import Text

        if self.wraps:
            return Text(translate(self.text), style=self.style)
        return Text(self.text, style=self.style, no_wrap=True, overflow="ignore")

    def to_markdown(self) -> str:
        """Return the text, in bold where it has a style."""
        return f"**{self.text}**" if self.style == "bold" else self.text


Content = ResultTable | ResultText


def next_command(command: str | None) -> list[Content]:
    """Return the command to type next, alone on its line; nothing where there is none."""
    return [ResultText("next:"), ResultText(command, wraps=False)] if command else []


def optional(default: Any = None) -> Any:
    """Return a dataclass field whose key is left out of mapping and JSON while it is None."""
    return field(default=default, metadata={"omit_none": True})


class Result(Mapping[str, Any]):
    """Read-only result of a command: its JSON keys as attributes and as a mapping.

    Subclasses are frozen dataclasses (`eq=False`: equality is that of mappings) and implement
    `content`.
    """

    format_version_of_json: ClassVar[int] = RESULT_FORMAT_VERSION

    def _names(self) -> list[str]:
        return [
            each.name
            for each in fields(self)  # type: ignore[arg-type]
            if not (each.metadata.get("omit_none") and getattr(self, each.name) is None)
        ]

    def __getitem__(self, key: str) -> Any:
        """Return the value of a JSON key; raise `KeyError` for an unknown one."""
        if key not in self._names():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the JSON keys."""
        return iter(self._names())

    def __len__(self) -> int:
        """Return the number of JSON keys."""
        return len(self._names())

    def content(self) -> Sequence[Content]:
        """Return the tables and lines that are printed; nothing by default."""
        return ()

    def __rich__(self) -> "RenderableType":
        """Return the result as rich prints it."""
        from rich.console import Group

        return Group(*self.content())

    def to_markdown(self) -> str:
        """Return the result as a Markdown document."""
        return "\n\n".join(part.to_markdown() for part in self.content()) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dumps`, with the `format_version` of the keys first."""
        return {"format_version": self.format_version_of_json, **self}


def markdown_cell(text: Any) -> str:
    """Return a text as a cell of a Markdown table: one line, HTML and pipes escaped."""
    import html

    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|")


def format_bytes(count: float) -> str:
    """Return bytes with a decimal unit: 665.60 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:,.2f} B"


def format_seconds(seconds: float | None) -> str:
    """Return a duration in seconds, minutes or hours; "unknown" where it was not measured."""
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def format_value(value: Any) -> str:
    """Return a number with thousands separators, anything else as text."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
