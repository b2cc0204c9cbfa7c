"""`afina chat --base-url`: the same conversation with a server; `/model NAME` asks another adapter."""

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from afina.cli.chat import read_line
from afina.cli.serve import missing_extra_error
from afina.errors import AfinaError, SettingsError
from afina.settings import ChatSettings

if TYPE_CHECKING:
    from afina.server.client import Client


def talk(settings: ChatSettings) -> dict[str, Any]:
    """Talk until the input ends; `/model NAME` and `/new` as on the first line on the screen."""
    try:
        from afina.server.client import Client
    except ImportError as error:
        raise missing_extra_error(error) from None
    local = {
        "run",
        "base",
        "revision",
        "trust_remote_code",
        "dtype",
        "device",
    } & settings.model_fields_set
    if local:
        raise SettingsError(
            f"{sorted(local)[0]} is the server's to say", where="--url", hint="--model NAME"
        )

    async def converse() -> dict[str, Any]:
        async with Client(str(settings.base_url), settings.api_key) as client:
            return await _converse(client, settings)

    return asyncio.run(converse())


async def _converse(client: "Client", settings: ChatSettings) -> dict[str, Any]:
    console = Console(stderr=True)
    names = await client.models()
    model = settings.model or names[0]
    opening = (
        [{"role": "system", "content": settings.system_prompt}] if settings.system_prompt else []
    )
    messages = list(opening)
    console.print(
        f"{model} at {client.url}. /model NAME asks another, /new starts again, Ctrl-D leaves.",
        highlight=False,
    )
    while (line := await asyncio.to_thread(read_line)) is not None:
        word, _, name = line.partition(" ")
        if word == "/model":
            model = name.strip() or model
            console.print(f"{model}, of {', '.join(names)}", highlight=False)
        elif word == "/new":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append(
                    {
                        "role": "assistant",
                        "content": await _answer(client, settings, model, messages),
                    }
                )
            except AfinaError as error:
                console.print(str(error), highlight=False)
                messages.pop()
    return {"url": client.url, "model": model, "messages": messages}


async def _answer(
    client: "Client", settings: ChatSettings, model: str, messages: list[dict[str, str]]
) -> str:
    body = {
        "model": model,
        "messages": messages,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
    }
    if "max_new_tokens" in settings.model_fields_set:  # else what the base has room for
        body["max_tokens"] = settings.max_new_tokens
    text = ""
    async for piece in client.chat(body):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        text += piece.text
    print()
    return text.strip()
