"""`afina completion`: a script that completes commands, flags, values and files in a shell.

The script is static: a key press starts no Python. It is written from the command table by shtab.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.cli.command_table import COMMANDS
from afina.cli.main import build_parser
from afina.io.extras import import_extra
from afina.io.result import Content, Result, ResultText
from afina.settings import CompletionSettings, Settings


@dataclass(frozen=True, eq=False)
class CompletionResult(Result):
    """A completion script.

    Attributes:
        shell: The shell.
        script: Its script.
    """

    shell: str
    script: str

    def content(self) -> list[Content]:
        """Return the script as it is."""
        return [ResultText(self.script.expandtabs(4), wraps=False)]


def completion(settings: CompletionSettings) -> CompletionResult:
    """Return the completion script of a shell.

    Raises:
        SettingsError: shtab is not installed.
    """
    shtab = import_extra("shtab", "completion")
    parser = build_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                for one in sub._actions:
                    _describe(one, COMMANDS[name].settings, shtab.FILE)
    return CompletionResult(settings.shell, shtab.complete(parser, shell=settings.shell))


def _describe(action: argparse.Action, kind: type[Settings], file: Any) -> None:
    """Add the words that a flag takes, and that it takes a file."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if "|" in metavar:
        action.choices = metavar.split("|")
    elif action.dest == "config" or _takes_path(kind, action.dest):
        action.complete = file  # type: ignore[attr-defined]


def _takes_path(kind: type[Settings], name: str) -> bool:
    """Return whether a setting is a file or folder, or may be one."""
    field = kind.model_fields.get(name)
    return field is not None and Path in set(_types(field.annotation))


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _types(part)
