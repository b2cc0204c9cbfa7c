"""Base class of what commands and public functions return: read-only values that render themselves.

A result type lists its JSON keys as dataclass fields and describes its document in `content`; the terminal and the
Markdown form are two renderings of that one description. The module imports no torch, and rich only while printing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rich.console import RenderableType

RESULT_FORMAT_VERSION = 2


@dataclass(frozen=True)
class ResultTable:
    """Table of a result: rows of text cells below a title; without `head`, each row is a name and a value."""

    title: str
    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()

    def __rich__(self) -> "RenderableType":
        """Return the table for a terminal; cells are printed as they are, without markup."""
        from rich.markup import escape
        from rich.table import Table

        title = escape(self.title) if self.title else None
        table = Table(title=title, title_justify="left", show_header=bool(self.head))
        for name in self.head:
            table.add_column(escape(name))
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def to_markdown(self) -> str:
        """Return the table as GitHub-flavored Markdown, its title as a bold line above it."""
        width = max((len(row) for row in self.rows), default=len(self.head))
        lines = [self.head or [""] * width, ["---"] * width, *self.rows]
        table = "\n".join(f"| {' | '.join(map(markdown_cell, row))} |" for row in lines)
        return f"**{self.title}**\n\n{table}" if self.title else table


@dataclass(frozen=True)
class ResultText:
    """Lines of a result: `style` is rich's; `wraps` is False where a line can be pasted into a shell."""

    text: str
    style: str = ""
    wraps: bool = True

    def __rich__(self) -> "RenderableType":
        """Return the text for a terminal, without markup or highlighting."""
        from rich.text import Text

        if self.wraps:
            return Text(self.text, style=self.style)
        return Text(self.text, style=self.style, no_wrap=True, overflow="ignore")

    def to_markdown(self) -> str:
        """Return the text, in bold where it has a style."""
        return f"**{self.text}**" if self.style == "bold" else self.text


Content = ResultTable | ResultText


def next_command(command: str | None) -> list[Content]:
    """Return the command to type next, alone on its line; nothing where there is none."""
    return [ResultText("next:"), ResultText(command, wraps=False)] if command else []


def optional(default: Any = None) -> Any:
    """Return a dataclass field whose key is left out of the mapping and the JSON form while it is None."""
    return field(default=default, metadata={"omit_none": True})


class Result(Mapping[str, Any]):
    """Read-only result of a command: its JSON keys as attributes and as a mapping.

    Subclasses are frozen dataclasses (`eq=False`, so that equality is that of mappings) and implement `content`.
    """

    format_version_of_json: ClassVar[int] = RESULT_FORMAT_VERSION

    def _names(self) -> list[str]:
        return [
            each.name
            for each in fields(self)  # type: ignore[arg-type]
            if not (each.metadata.get("omit_none") and getattr(self, each.name) is None)
        ]

    def __getitem__(self, key: str) -> Any:
        """Return the value of a JSON key; raises `KeyError` for a key that the result does not have."""
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
    """Return a text as it may stand in a cell of a Markdown table: one line, HTML and pipes escaped."""
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
