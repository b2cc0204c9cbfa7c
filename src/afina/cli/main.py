"""The command line: flags and YAML to settings, settings to a function call, its result to print.

Nothing heavy is imported before a command runs, so help takes a fraction of a second.
"""

import argparse
import importlib
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

import yaml

import afina
from afina.cli.command_table import COMMANDS, Command
from afina.cli.progress import signs_of_life
from afina.cli.render import print_result
from afina.cli.torchrun import is_first_failure, print_from_main_process_only
from afina.errors import AfinaError, SettingsError, did_you_mean
from afina.io.migrations import migrate_settings
from afina.io.translation import (
    ENGLISH,
    LANGUAGES,
    VARIABLE,
    language,
    translate,
    translate_error,
    use_language,
)
from afina.settings import GroupedSettings, Settings, make_settings, read_yaml, settings_groups
from afina.settings.renamed import RENAMED_COMMANDS, renamed_setting

SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")
RUN_FILES = ("checkpoint", "run.json")  # next to the settings.yaml of a run


LANGUAGE_HELP = f"language of what is printed; also by {VARIABLE}"


class _Parser(argparse.ArgumentParser):
    """argparse, with afina's errors and languages."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, add_help=False)
        self._positionals.title = translate("arguments")
        self._optionals.title = translate("options")
        self.add_argument("-h", "--help", action="help", help=translate("show this help"))

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, hint=f"{self.prog} --help")

    def format_help(self) -> str:
        return translate("usage:") + super().format_help().removeprefix("usage:")


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the complete command line, built from the settings classes.

    With `only`, the flags of that command alone are added, which takes a tenth of the time.
    """
    parser = _Parser(
        prog="afina",
        description=translate(
            "Adapt a frozen model with small adapters: train, evaluate, merge, audit, serve."
        ),
        epilog="Guide without mathematics: docs/guide/en/index.md; en español: "
        "docs/guide/es/index.md.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"afina {afina.__version__}",
        help=translate("print the version"),
    )
    _add_language(parser)
    commands = parser.add_subparsers(dest="command", metavar=translate("COMMAND"))
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=translate(command.help),
            description=translate(command.help),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        sub.add_argument(
            "--config",
            metavar="FILE",
            help=translate("a YAML file of settings; flags take precedence"),
        )
        sub.add_argument(
            "--json", action="store_true", help=translate("print one JSON object as last line")
        )
        if "lang" not in command.settings.model_fields:
            _add_language(sub)
        if only in (None, name):
            _add_settings(sub, command)
            _add_groups(sub, command)
    return parser


def _add_language(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lang", metavar="|".join(LANGUAGES), help=translate(LANGUAGE_HELP))


def _add_settings(parser: argparse.ArgumentParser, command: Command) -> None:
    for name, field in command.settings.model_fields.items():
        is_positional = name == command.positional
        if is_positional:
            count = "*" if command.is_list else "?"
            parser.add_argument(name, nargs=count, help=_help(field))
        if not (is_positional and command.is_list):  # prompts may hold the commas of lists
            _add_flag(parser, name, name, field)


def _add_groups(parser: argparse.ArgumentParser, command: Command) -> None:
    """Add the flags of settings groups, `--dpo.beta` and the others, each under its heading."""
    if not issubclass(command.settings, GroupedSettings):
        return
    for name in command.settings.group_names():
        kind = settings_groups.get(name)
        if not kind.model_fields:
            continue
        first_line = (kind.__doc__ or name).splitlines()[0]
        group = parser.add_argument_group(f"{name}: {translate(first_line)}")
        for key, field in kind.model_fields.items():
            _add_flag(group, f"{name}.{key}", key, field)


def _add_flag(parser: argparse._ActionsContainer, dest: str, name: str, field: Any) -> None:
    flag, text = "--" + dest.replace("_", "-"), _help(field)
    if _is_switch(field):
        metavar = "|".join(("true", "false", *_words(field.annotation)))
        parser.add_argument(flag, dest=dest, nargs="?", const=True, metavar=metavar, help=text)
    else:
        metavar = _metavar(field.annotation, name.upper())
        parser.add_argument(flag, dest=dest, metavar=metavar, help=text)


def _help(field: Any) -> str:
    """Return a setting's help text with its default, where there is one worth showing."""
    text, default = translate(field.description or "") + _plugins(field), field.default
    if not field.is_required() and default is not None and default not in ({}, []):
        text += f" [{str(default).lower() if isinstance(default, bool) else default}]"
    return text.replace("%", "%%")


def _plugins(field: Any) -> str:
    """Return the names that other packages add to the values of a setting, for its help text."""
    group = (field.json_schema_extra or {}).get("entry_points")
    names = sorted(point.name for point in entry_points(group=group)) if group else []
    return f"; {translate('installed')}: {', '.join(names)}" if names else ""


def _is_switch(field: Any) -> bool:
    """Return whether a flag stands for true where no value follows."""
    return bool in (field.annotation, *typing.get_args(field.annotation))


def _words(annotation: Any) -> tuple[str, ...]:
    """Return the words among the values of a setting."""
    parts = [annotation, *typing.get_args(annotation)]
    choices = [part for part in parts if typing.get_origin(part) is typing.Literal]
    return typing.get_args(choices[0]) if choices else ()


def _metavar(annotation: Any, name: str) -> str:
    """Return the choices of a setting, or its name in capitals."""
    return "|".join(_words(annotation)) or name


def _value(annotation: Any, text: Any) -> Any:
    """Return a flag's text as a value: lists may be written with commas, mappings as YAML."""
    if not isinstance(text, str):
        return text
    kinds = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    holds = {typing.get_origin(kind) or kind for kind in kinds}
    is_mapping = dict in holds and (str not in holds or text.lstrip().startswith("{"))
    if is_mapping and ":" in text and not text.lstrip().startswith(("{", "[")):
        text = "{" + text + "}"  # as it is often typed
    if is_mapping or (list in holds and text.startswith(("[", "{"))):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"cannot read {text!r}", why=str(error).splitlines()[0]) from error
    if list in holds and ("," in text or str not in holds):
        return [part.strip() for part in text.split(",")]
    return text


def _fields(command: Command) -> dict[str, Any]:
    """Return every setting of a command by the name of its flag, those of groups as "dpo.beta"."""
    fields: dict[str, Any] = dict(command.settings.model_fields)
    if issubclass(command.settings, GroupedSettings):
        for group in command.settings.group_names():
            own = settings_groups.get(group).model_fields
            fields |= {f"{group}.{key}": field for key, field in own.items()}
    return fields


def _normalize(command: Command, arguments: Sequence[str]) -> list[str]:
    """Return the words after the command in the form that argparse expects.

    `--max_steps` becomes `--max-steps`, and `--resume DATA` becomes `--resume=true DATA`: a
    switch takes true or false, and no other word.
    """
    fields = _fields(command).items()
    switches = {
        "--" + name.replace("_", "-"): (*SWITCH_WORDS, *_words(field.annotation))
        for name, field in fields
        if _is_switch(field)
    }
    words = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        is_flag = flag.startswith("--")
        words.append((flag.replace("_", "-") if is_flag else flag) + equals + value)
    following = [word.lower() for word in (*words[1:], "")]
    return [
        f"{word}=true" if word in switches and after not in switches[word] else word
        for word, after in zip(words, following, strict=False)
    ]


def parse(arguments: Sequence[str]) -> tuple[str, Settings, bool]:
    """Return the command's name, its settings, and whether JSON is to be printed.

    Raises:
        SettingsError: A command, flag or value is unknown or does not fit.
    """
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is None:
        return _without_command(arguments)
    if name not in COMMANDS:
        new = RENAMED_COMMANDS.get(name)
        hint = f"use afina {new}" if new else did_you_mean(name, COMMANDS)
        raise SettingsError(f"unknown command {name!r}", hint=hint)
    command = COMMANDS[name]
    known, unknown = build_parser(name).parse_known_args(
        [name, *_normalize(command, arguments[1:])]
    )
    for word in unknown:
        raise _unknown_word(name, command, word)
    given = {key: value for key, value in vars(known).items() if key != "command"}
    as_json, file = given.pop("json", False), given.pop("config", None)
    fields = _fields(command)
    if "lang" not in fields:
        given.pop("lang", None)
    elif given.get("lang") is None and language() != ENGLISH:
        given["lang"] = language()
    values = {
        key: _value(fields[key].annotation, value)
        for key, value in given.items()
        if value not in (None, [])
    }
    if file is None:
        return name, make_settings(command.settings, _nested(values)), as_json
    values = _merged(_read_settings(Path(file), bool(values.get("resume"))), _nested(values))
    return name, make_settings(command.settings, values, where=file), as_json


def _without_command(arguments: Sequence[str]) -> NoReturn:
    parser = build_parser("")
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = ["--help", "--version", "--lang", *COMMANDS]
        raise SettingsError(f"unknown flag {unknown[0]}", hint=did_you_mean(unknown[0], known))
    parser.print_help()
    raise SystemExit(0)


def _unknown_word(name: str, command: Command, word: str) -> SettingsError:
    """Return the error of a word that is no flag and no value."""
    if not word.startswith("--"):
        return SettingsError(f"unexpected word {word!r}", hint=f"afina {name} --help")
    flag = word.partition("=")[0]
    old = flag.removeprefix("--").replace("-", "_")
    kind, prefix = command.settings, ""
    if "." in old and old.partition(".")[0] in settings_groups:
        prefix, _, old = old.partition(".")
        kind, prefix = settings_groups.get(prefix), f"{prefix}."
    if renamed := renamed_setting(kind, old, prefix):
        return SettingsError(f"unknown flag {flag}: it was renamed", hint=renamed.hint)
    known = [
        f"--{field.replace('_', '-')}" for field in (*_fields(command), "config", "json", "lang")
    ]
    ends = [other for other in known if other.endswith("." + old.replace("_", "-"))]
    hint = did_you_mean(flag, known) if not ends else f"did you mean {' or '.join(ends)}?"
    return SettingsError(f"unknown flag {flag}", hint=hint)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with the settings of groups in mappings: "dpo.beta" as dpo: {beta: ...}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        group, dot, name = key.partition(".")
        if dot:
            nested.setdefault(group, {})[name] = value
        else:
            nested[key] = value
    return nested


def _merged(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file updated by those of flags; groups are joined."""
    merged = dict(file) | dict(flags)
    for name in file.keys() & flags.keys():
        if name in settings_groups and isinstance(file[name], Mapping):
            merged[name] = dict(file[name]) | flags[name]
    return merged


def _read_settings(file: Path, is_resume: bool) -> dict[str, Any]:
    """Return the settings in a YAML file; those of a run that was moved name its folder of now."""
    values = read_yaml(file)
    is_of_run = any(file.with_name(name).exists() for name in RUN_FILES)
    if is_of_run or "format_version" in values:
        values = migrate_settings(values)
    if is_resume and file.with_name("checkpoint").is_dir():
        values["output_dir"] = str(file.parent)
    return values


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit status: 0 success, 1 failure, 2 wrong settings, 130 interrupted; of `audit` also
        3 for review and 4 for block.
    """
    try:
        with use_language(_language_flag(arguments)):
            return _run(_without_language(arguments))
    except SettingsError as error:  # an unknown language
        _print_error(error, "--json" in arguments)
        return 2


def _language_flag(arguments: Sequence[str]) -> str | None:
    """Return the value of --lang, which also applies to help and to errors of other flags."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word == "--lang" or word.startswith("--lang="):
            return word.removeprefix("--lang=") if "=" in word else following
    return None


def _without_language(arguments: Sequence[str]) -> Sequence[str]:
    """Return the words without a --lang in front of the command."""
    if arguments[:1] == ["--lang"]:
        return arguments[2:]
    return arguments[1:] if arguments and arguments[0].startswith("--lang=") else arguments


def _run(arguments: Sequence[str]) -> int:
    as_json = "--json" in arguments
    try:
        name, settings, as_json = parse(arguments)
        command = COMMANDS[name]
        module, _, function = command.function.partition(":")
        with print_from_main_process_only(), signs_of_life(name, command.duration):
            call: Callable[[Any], Mapping[str, Any]] = getattr(
                importlib.import_module(module), function
            )
            result = call(settings)
            print_result(result, as_json)
        return int(result.get("exit_status", 0))
    except Exception as error:
        if not is_first_failure():
            return 1
        if not isinstance(error, AfinaError):
            raise
        _print_error(error, as_json)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        text = "interrupted. --resume continues a training run from its last checkpoint."
        print(f"\nafina: {translate(text)}", file=sys.stderr)
        return 130


def _print_error(error: AfinaError, as_json: bool) -> None:
    print(f"afina: {translate_error(error)}", file=sys.stderr)
    if as_json:
        parts = {key: getattr(error, key) for key in ("what", "where", "why", "hint")}
        print(json.dumps({"error": parts}, ensure_ascii=False))


def main() -> None:
    """Run the `afina` command."""
    sys.exit(run(sys.argv[1:]))
