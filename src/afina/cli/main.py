"""`afina VERB ...`: flags and YAML into settings, settings into a call, its result onto the screen.

Nothing heavy is imported before a verb runs, so that help is instant.
"""

import argparse
import importlib
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NoReturn

import yaml

import afina
from afina import settings as all_settings
from afina.cli.render import print_result
from afina.cli.torchrun import is_first_failure, print_from_main_process_only
from afina.errors import AfinaError, SettingsError, did_you_mean
from afina.settings import Settings


@dataclass(frozen=True)
class Command:
    """A verb: its settings, the function behind it ("module:name"), and which setting is given without a flag."""

    help: str
    settings: type[Settings]
    function: str
    positional: str | None = None
    is_list: bool = False


COMMANDS = {
    "demo": Command(
        "see it work: teach the embedded base to correct sentences",
        all_settings.DemoSettings,
        "afina.demo.demo:demo",
    ),
    "plan": Command(
        "what would happen, before it does", all_settings.PlanSettings, "afina.planning.plan:plan", "data"
    ),
    "compare": Command(
        "which method for this base and these rows? A measurement",
        all_settings.CompareSettings,
        "afina.cli.commands:compare",
        "data",
    ),
    "advise": Command(
        "which method for my case? Advice with its reasons, without training",
        all_settings.AdviseSettings,
        "afina.cli.commands:advise",
    ),
    "train": Command(
        "adapt a base to your data", all_settings.TrainSettings, "afina.cli.commands:train", "data"
    ),
    "eval": Command(
        "judge an adapter against its base",
        all_settings.EvalSettings,
        "afina.evaluation.evaluate:evaluate",
        "adapter",
    ),
    "generate": Command(
        "answer prompts",
        all_settings.GenerateSettings,
        "afina.evaluation.generate:generate",
        "prompts",
        is_list=True,
    ),
    "chat": Command(
        "talk to a base or an adapter", all_settings.ChatSettings, "afina.cli.chat:chat", "adapter"
    ),
    "serve": Command(
        "answer over HTTP, as OpenAI's API does; train beside it",
        all_settings.ServeSettings,
        "afina.cli.serve:serve",
    ),
    "bench-serve": Command(
        "load a server and draw its latency", all_settings.BenchServeSettings, "afina.cli.serve:bench"
    ),
    "prefer": Command(
        "say which of two answers is better, for --objective dpo and reward",
        all_settings.AnnotateSettings,
        "afina.cli.annotate:prefer",
        "prompts",
    ),
    "merge": Command(
        "one whole model out of base and adapter, with proof",
        all_settings.MergeSettings,
        "afina.merging.merge_into_base:merge",
        "adapter",
    ),
    "combine": Command(
        "one adapter out of several",
        all_settings.CombineSettings,
        "afina.merging.combine:combine",
        "adapters",
        is_list=True,
    ),
    "extract": Command(
        "a low-rank adapter out of any adapter or tuned model",
        all_settings.ExtractSettings,
        "afina.merging.extract:extract",
        "adapter",
    ),
    "show": Command(
        "what an adapter is", all_settings.ShowSettings, "afina.merging.adapter_info:show", "adapter"
    ),
    "audit": Command(
        "is this adapter safe to load?", all_settings.AuditSettings, "afina.audit.audit:audit", "adapter"
    ),
    "remedy": Command(
        "weaken what an audit found, and say what it costs",
        all_settings.MitigateSettings,
        "afina.audit.mitigation:remedy",
        "adapter",
    ),
    "sign": Command(
        "sign an adapter with your key",
        all_settings.SignSettings,
        "afina.audit.provenance:sign",
        "adapter",
    ),
    "verify": Command(
        "who signed this adapter, and is it unchanged?",
        all_settings.VerifySettings,
        "afina.audit.provenance:verify",
        "adapter",
    ),
    "revoke": Command(
        "refuse an adapter from now on",
        all_settings.RevokeSettings,
        "afina.audit.provenance:revoke",
        "target",
    ),
    "export": Command(
        "write what other tools read",
        all_settings.ExportSettings,
        "afina.merging.export:export",
        "adapter",
    ),
}


class _Parser(argparse.ArgumentParser):
    """argparse, with our errors."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, hint=f"{self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, from the settings' declarations."""
    parser = _Parser(
        prog="afina",
        description="One frozen base, many small adapters: train, judge, merge and talk to them.",
        epilog="A guide without mathematics lies in the project's docs/guide/en/index.md; en español, docs/guide/es/index.md.",
    )
    parser.add_argument("--version", action="version", version=f"afina {afina.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, verb in COMMANDS.items():
        sub = verbs.add_parser(
            name,
            help=verb.help,
            description=verb.help,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        sub.add_argument(
            "--config", metavar="FILE", help="a YAML file of settings; a flag wins over it"
        )
        sub.add_argument("--json", action="store_true", help="one JSON object as the last line")
        for field_name, field in verb.settings.model_fields.items():
            help_text = _help((field.description or "") + _plugins(field), field.default)
            if field_name == verb.positional:
                sub.add_argument(field_name, nargs="*" if verb.is_list else "?", help=help_text)
            flag = "--" + field_name.replace("_", "-")
            if field.annotation is bool:
                sub.add_argument(
                    flag,
                    dest=field_name,
                    nargs="?",
                    const=True,
                    metavar="true|false",
                    help=help_text,
                )
            elif (
                field_name != verb.positional or not verb.is_list
            ):  # prompts have commas in them, which separate lists
                metavar = _metavar(field.annotation, field_name.upper())
                sub.add_argument(flag, dest=field_name, metavar=metavar, help=help_text)
    return parser


def _help(description: str, default: Any) -> str:
    shown = (
        default is not None
        and default not in ({}, [])
        and type(default).__name__ != "PydanticUndefinedType"
    )
    return (
        description
        + (f" [{str(default).lower() if isinstance(default, bool) else default}]" if shown else "")
    ).replace("%", "%%")


def _plugins(field: Any) -> str:
    """Return the names that other packages add to the values of a setting, for its help text."""
    group = (field.json_schema_extra or {}).get("entry_points")
    names = sorted(point.name for point in entry_points(group=group)) if group else []
    return f"; installed: {', '.join(names)}" if names else ""


def _metavar(annotation: Any, name: str) -> str:
    return (
        "|".join(typing.get_args(annotation))
        if typing.get_origin(annotation) is typing.Literal
        else name
    )


def _value(annotation: Any, text: Any) -> Any:
    """A flag's text as a value: lists may be written with commas, lists and mappings as YAML."""
    if not isinstance(text, str):
        return text
    kinds = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    holds = {typing.get_origin(kind) or kind for kind in kinds}
    if dict in holds and ":" in text and not text.lstrip().startswith(("{", "[")):
        text = "{" + text + "}"  # as it is often typed
    if holds & {dict, list} and (text.startswith(("[", "{")) or dict in holds):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"cannot read {text!r}", why=str(error).splitlines()[0]) from error
    if list in holds and ("," in text or str not in holds):
        return [part.strip() for part in text.split(",")]
    return text


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """The command line with `--resume DATA` as `--resume=true DATA`: a switch takes true or false, and no other word."""
    fields = (
        COMMANDS[arguments[0]].settings.model_fields
        if arguments and arguments[0] in COMMANDS
        else {}
    )
    switches = {
        "--" + name.replace("_", "-") for name, field in fields.items() if field.annotation is bool
    }
    following = [*(word.lower() for word in arguments[1:]), ""]
    answers = ("true", "false", "yes", "no", "on", "off", "1", "0")
    return [
        f"{word}=true" if word in switches and after not in answers else word
        for word, after in zip(arguments, following, strict=False)
    ]


def parse(arguments: Sequence[str]) -> tuple[str, Settings, bool]:
    """(verb, settings, whether JSON is asked for); raises `SettingsError` on anything that does not fit."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise SettingsError(
            f"unknown verb {arguments[0]!r}", hint=did_you_mean(arguments[0], COMMANDS)
        )
    parser = build_parser()
    known, unknown = parser.parse_known_args(_spelled_out(arguments))
    if known.verb is None:
        if unknown:
            raise SettingsError(
                f"unknown flag {unknown[0]}",
                hint=did_you_mean(unknown[0], ["--help", "--version", *COMMANDS]),
            )
        parser.print_help()
        raise SystemExit(0)
    verb = COMMANDS[known.verb]
    for word in unknown:
        flag = word.partition("=")[0]
        if word.startswith("--"):
            flags = [
                f"--{field.replace('_', '-')}"
                for field in [*verb.settings.model_fields, "config", "json"]
            ]
            raise SettingsError(
                f"unknown flag {flag}", hint=did_you_mean(flag.replace("_", "-"), flags)
            )
        raise SettingsError(
            f"do not know what to do with {word!r}", hint=f"afina {known.verb} --help"
        )
    values = {name: value for name, value in vars(known).items() if name != "verb"}
    as_json, file = values.pop("json", False), values.pop("config", None)
    values = {name: value for name, value in values.items() if value not in (None, [])}
    fields = verb.settings.model_fields
    values = {name: _value(fields[name].annotation, value) for name, value in values.items()}
    if file is not None:
        from pathlib import Path

        there = (
            {"output_dir": str(Path(file).parent)}
            if values.get("resume") and Path(file).with_name("checkpoint").is_dir()
            else {}
        )
        values = (
            all_settings.read_yaml(Path(file)) | there | values
        )  # a run that was moved is resumed where it is now
    return known.verb, all_settings.make_settings(verb.settings, values, where=file), as_json


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit status (0 good, 1 failed, 2 wrong settings, 130 interrupted).

    `audit` ends with 3 for review, 4 for block.
    """
    as_json = "--json" in arguments
    try:
        name, settings, as_json = parse(arguments)
        module, _, function = COMMANDS[name].function.partition(":")
        with print_from_main_process_only():
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
        print(f"afina: {error}", file=sys.stderr)
        if as_json:
            print(
                json.dumps(
                    {"error": {k: getattr(error, k) for k in ("what", "where", "why", "hint")}},
                    ensure_ascii=False,
                )
            )
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        print(
            "\nafina: stopped. A training run goes on from its last checkpoint with --resume.",
            file=sys.stderr,
        )
        return 130


def main() -> None:
    """The `afina` command."""
    sys.exit(run(sys.argv[1:]))
