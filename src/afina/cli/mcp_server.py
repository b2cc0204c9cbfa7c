"""`afina mcp`: commands as tools of the Model Context Protocol, over standard input and output.

A tool takes the settings of its command and returns the JSON that the command prints with --json.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import afina
from afina.cli.command_table import COMMANDS
from afina.errors import AfinaError, SettingsError
from afina.io.extras import import_extra
from afina.settings import (
    POLICIES,
    GroupedSettings,
    MCPSettings,
    Settings,
    make_settings,
    settings_groups,
)

TOOLS = {  # command -> function; none of them reads input or prints progress
    "plan": "afina.planning.plan:plan",
    "runs": "afina.training.run_list:runs",
    "show": "afina.merging.adapter_info:show",
    "advise": "afina.comparison.advise:advise",
    "train": "afina.training.train:train",
}
NEVER = ("trust_remote_code",)  # settings that run code of a model
INSTRUCTIONS = (
    "afina adapts frozen models with small adapters. advise recommends a method, plan predicts "
    "memory and time of a run before it starts, runs lists and compares run folders, show "
    "describes an adapter. Files are those of the machine on which this server runs."
)


def mcp(settings: MCPSettings) -> dict[str, Any]:
    """Serve until standard input ends.

    Raises:
        SettingsError: The package `mcp` is not installed.
    """
    import_extra("mcp", "mcp")
    import anyio

    anyio.run(_serve, settings.allow_training)
    return {}


async def _serve(allow_training: bool) -> None:
    from mcp.server.stdio import stdio_server

    server = make_server(allow_training)
    async with stdio_server() as (reader, writer):
        await server.run(reader, writer, server.create_initialization_options())


def make_server(allow_training: bool) -> Any:
    """Return the server; `allow_training` adds the tool train."""
    import anyio
    from mcp.server.lowlevel import Server
    from mcp.types import CallToolResult, ListToolsResult, TextContent, Tool

    names = [name for name in TOOLS if name != "train" or allow_training]

    async def list_tools(context: Any, params: Any) -> Any:
        tools = [
            Tool(name=name, description=COMMANDS[name].help, input_schema=input_schema(name))
            for name in names
        ]
        return ListToolsResult(tools=tools)

    async def call_tool(context: Any, params: Any) -> Any:
        try:
            if params.name not in names:
                raise SettingsError(f"unknown tool {params.name!r}", hint=f"known: {names}")
            found = await anyio.to_thread.run_sync(
                call, params.name, params.arguments or {}, allow_training
            )
        except AfinaError as error:
            return CallToolResult(
                content=[TextContent(type="text", text=str(error))], is_error=True
            )
        text = json.dumps(found, ensure_ascii=False)
        return CallToolResult(
            content=[TextContent(type="text", text=text)], structured_content=found
        )

    return Server(
        "afina",
        version=afina.__version__,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def call(name: str, arguments: Mapping[str, Any], allow_training: bool) -> dict[str, Any]:
    """Return the JSON object of a command; what is printed meanwhile goes to standard error.

    Raises:
        AfinaError: An argument is wrong or not allowed, or the command fails.
    """
    for setting in NEVER:
        if arguments.get(setting):
            raise SettingsError(f"{setting} is not available over MCP", hint=f"afina {name}")
    settings = make_settings(COMMANDS[name].settings, arguments)
    if not allow_training and getattr(settings, "objective", None) in POLICIES:
        raise SettingsError(
            "an objective with reward functions runs Python code", hint="afina mcp --allow-training"
        )
    module, _, function = TOOLS[name].partition(":")
    with contextlib.redirect_stdout(sys.stderr):
        result = getattr(importlib.import_module(module), function)(settings)
    plain: dict[str, Any] = json.loads(json.dumps(result.to_json(), default=str))
    return plain


def input_schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a command's settings, with its groups."""
    kind: type[Settings] = COMMANDS[name].settings
    schema = kind.model_json_schema()
    properties = {key: value for key, value in schema["properties"].items() if key not in NEVER}
    definitions = schema.get("$defs", {})
    if issubclass(kind, GroupedSettings):
        for group in kind.group_names():
            own = settings_groups.get(group).model_json_schema()
            definitions |= own.pop("$defs", {})
            properties[group] = own
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    found |= {"required": schema["required"]} if "required" in schema else {}
    return found | ({"$defs": definitions} if definitions else {})
