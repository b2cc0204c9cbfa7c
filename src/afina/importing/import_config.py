"""`afina import`: a configuration of another trainer as settings of `afina train`."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from afina.errors import SettingsError, did_you_mean, pluralize
from afina.importing.combine import combine
from afina.importing.conversion import Conversion, ImportedKey
from afina.importing.read_config import read_config
from afina.importing.rules import apply, infer_trainer
from afina.importing.tool_table import tool_table
from afina.io.atomic import write_text
from afina.io.result import Content, Result, ResultTable, ResultText, next_command
from afina.io.translation import Verbatim
from afina.settings import ImportSettings, TrainSettings, make_settings

MAX_SHOWN = 60  # characters of a value in a table


@dataclass(frozen=True, eq=False)
class ImportResult(Result):
    """Settings of `afina train` from a configuration of another trainer.

    Attributes:
        tool: The trainer.
        file: Its configuration.
        output: The settings file.
        settings: The settings.
        imported: What became of each key: key, value, outcome (setting, default, comment or
            missing), settings and note.
    """

    tool: str
    file: str
    output: str
    settings: Mapping[str, Any]
    imported: Sequence[dict[str, Any]]

    def content(self) -> list[Content]:
        """Return the keys that became settings, those that did not, and the next command."""
        taken = [
            (
                Verbatim(one["key"]),
                Verbatim(_short(one["value"])),
                Verbatim(", ".join(one["settings"])),
            )
            for one in self.imported
            if one["outcome"] == "setting"
        ]
        notes = [
            (Verbatim(one["key"]), one["note"])
            for one in self.imported
            if one["outcome"] == "setting" and one["note"]
        ]
        defaults = [
            (
                Verbatim(one["key"]),
                Verbatim(_short(one["value"])),
                Verbatim(", ".join(one["settings"])),
            )
            for one in self.imported
            if one["outcome"] == "default" and one["settings"]
        ]
        left = [
            (Verbatim(one["key"]), Verbatim(_short(one["value"])), one["note"] or "")
            for one in self.imported
            if one["outcome"] == "comment"
        ]
        tables = [
            ResultTable(f"settings from {self.tool}", taken, ("key", "value", "setting")),
            ResultTable("notes", notes, ("key", "note")),
            ResultTable("defaults of that tool", defaults, ("key", "value", "setting")),
            ResultTable("without a setting", left, ("key", "value", "reason")),
        ]
        return [
            *(table for table in tables if table.rows),
            ResultText(f"written to {self.output}"),
            *next_command(f"afina train --config {self.output}"),
        ]


def import_config(settings: ImportSettings) -> ImportResult:
    """Read a configuration of another trainer and write the settings that mean the same.

    Raises:
        SettingsError: The file is of no known tool, a key without a twin would change what is
            learned, or the settings file exists.
    """
    config = read_config(settings.file, settings.tool)
    table = tool_table(config.tool)
    trainer = infer_trainer(config.tool, config.keys, config.trainer)
    _check_names(settings, {*config.keys, *config.unread})
    conversion = Conversion(table, config.keys, trainer, settings.leave_out, config.unread)
    for key, source in config.row_calls.items():
        conversion.part_comment(
            key, source, "the script changes rows; here they are read as stored"
        )
    _convert(conversion, config.tool, trainer, settings.file)
    values = dict(conversion.settings)
    values |= {n: v for n in ("base", "data") if (v := getattr(settings, n)) is not None}
    keys = [one for one in conversion.finish() if not (settings.data and one.key == "dataset_name")]
    _check_missing(settings, keys)
    for name in ("base", "data"):
        if name not in values:
            raise SettingsError(
                f"the configuration names no {name}", where=str(settings.file), hint=f"--{name} ..."
            )
    make_settings(TrainSettings, values, where=str(settings.file))
    output = settings.output or Path(f"{settings.file.stem}.afina.yaml")
    if output.exists() and not settings.overwrite:
        raise SettingsError("the file exists", where=str(output), hint="--overwrite, or --output")
    write_text(output, _to_yaml(settings.file, table.title, values, keys))
    plain = [asdict(one) for one in keys]
    return ImportResult(table.title, str(settings.file), str(output), values, plain)


def _convert(conversion: Conversion, tool: str, trainer: str, file: Path) -> None:
    """Turn keys into settings; raise `SettingsError` where a nested value has another form."""
    try:
        chosen = apply(tool, conversion, trainer, file.absolute().parent)
        combine(conversion, *chosen)
    except (AttributeError, TypeError, ValueError) as error:
        what = "a value of the configuration has another form than its key needs"
        raise SettingsError(what, where=str(file), why=str(error)) from error


def _check_names(settings: ImportSettings, keys: set[str]) -> None:
    """Raise `SettingsError` where a key to leave out is not in the configuration."""
    for name in settings.leave_out:
        if name.partition(".")[0] not in {key.partition(".")[0] for key in keys}:
            hint = did_you_mean(name, keys)
            raise SettingsError(
                f"the configuration has no key {name!r}", where="leave_out", hint=hint
            )


def _check_missing(settings: ImportSettings, keys: Sequence[ImportedKey]) -> None:
    """Raise `SettingsError` where keys without a twin would change what is learned."""
    missing = [one for one in keys if one.outcome == "missing"]
    if not missing:
        return
    named = "; ".join(f"{one.key}: {_short(one.value)} ({one.note})" for one in missing)
    names = ",".join([*settings.leave_out, *(one.key for one in missing)])
    raise SettingsError(
        f"{pluralize(len(missing), 'key')} without a setting would change what is learned",
        where=str(settings.file),
        why=named,
        hint=f"--leave-out {names} imports the rest",
    )


def _to_yaml(file: Path, title: str, values: Mapping[str, Any], keys: Sequence[ImportedKey]) -> str:
    """Return the settings with the keys that they are from, and the others as comments."""
    sources: dict[str, list[str]] = {}
    for one in keys:
        for name in one.settings:
            source = one.key if one.outcome == "setting" else f"default of {one.key}"
            sources.setdefault(name.partition(".")[0], []).append(source)
    lines = [f"# Settings of afina train, from {file.name} ({title})."]
    for name, value in values.items():
        text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True).rstrip()
        comment = f"  # {', '.join(sources[name])}" if name in sources else ""
        is_block = "\n" in text
        lines += [f"#{comment[3:]}", text] if is_block and comment else [text + comment]
    left = [one for one in keys if one.outcome == "comment"]
    if left:
        lines += ["", "# Keys without a setting:"]
    for one in left:
        text = f"{one.key}: {_short(one.value)} - {one.note}"
        lines += textwrap.wrap(text, 96, initial_indent="# ", subsequent_indent="#   ")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    """Return a value on one line, as YAML writes it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    text = text.removesuffix("...\n").strip()
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
