"""`afina mcp` by the client of the package mcp, over standard input and output."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from afina.cli.mcp_server import TOOLS, call, input_schema
from afina.errors import SettingsError
from helpers import ENVIRONMENT


@pytest.mark.parametrize("name", TOOLS)
def test_tools_take_the_settings_of_their_commands(name: str) -> None:
    schema = json.loads(json.dumps(input_schema(name)))
    assert "trust_remote_code" not in schema["properties"]
    expected = {"plan": "dpo", "train": "rank", "runs": "sort", "show": "adapter", "advise": "goal"}
    assert expected[name] in schema["properties"]


@pytest.mark.parametrize(
    ("name", "arguments", "what"),
    [
        ("show", {"adapter": "x", "trust_remote_code": True}, "not available over MCP"),
        ("plan", {"objective": "grpo", "grpo": {"reward_funcs": "a.py:f"}}, "runs Python code"),
        ("plan", {"no_such": 1}, "unknown setting"),
    ],
)
def test_code_is_not_run_without_the_flag(name: str, arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(SettingsError, match=what):
        call(name, arguments, allow_training=False)


@pytest.mark.parametrize("flags", [[], ["--allow-training"]])
def test_client_lists_and_calls_tools(flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("mcp", reason="needs the extra mcp: pip install 'afina[mcp]'")
    import anyio
    from mcp import Client, StdioServerParameters

    (tmp_path / "runs").mkdir()
    command = StdioServerParameters(
        command=sys.executable,
        args=["-m", "afina", "mcp", *flags],
        env=ENVIRONMENT,
        cwd=str(tmp_path),
    )

    async def use() -> tuple[set[str], Any, Any]:
        async with Client(command) as client:
            names = {tool.name for tool in (await client.list_tools()).tools}
            found = await client.call_tool("runs", {"sort": "name"})
            wrong = await client.call_tool("show", {"adapter": "none"})
            return names, found, wrong

    names, found, wrong = anyio.run(use)
    assert names == set(TOOLS) - (set() if flags else {"train"})
    assert found.structured_content["format_version"] == 2
    assert json.loads(found.content[0].text) == found.structured_content
    assert wrong.is_error and "no adapter here" in wrong.content[0].text
