"""`afina chat`: a conversation in the terminal, with a local base or with a server."""

import asyncio
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import load_run
from afina.data.renderer import Renderer
from afina.engine.engine import generate_completions
from afina.engine.request import OutputChunk, SamplingParams
from afina.errors import AfinaError, DataError, SettingsError
from afina.io.extras import import_extra
from afina.io.translation import translate, translate_error
from afina.settings import ChatSettings

if TYPE_CHECKING:
    from afina.server.client import Client

LOCAL_SETTINGS = {"adapter", "base", "revision", "trust_remote_code", "dtype", "device"}


NEW, HELP = "/new", "/help"
COMMON_COMMANDS = {NEW: "start a new conversation", HELP: "list these commands"}


class ChatBackend(Protocol):
    """What completes the messages of a conversation.

    Attributes:
        greeting: one line that names the model.
        commands: words that `command` accepts, in addition to the common ones, with their help.
    """

    greeting: str
    commands: Mapping[str, str]

    def command(self, word: str, argument: str) -> str | None:
        """Run one of `commands`; return a line to print, or None."""

    def complete(self, messages: list[dict[str, str]], write: Callable[[str], None]) -> None:
        """Pass the text of the next message to `write` as it is generated."""

    def result(self) -> dict[str, Any]:
        """Return what the command's result contains in addition to the messages."""

    def close(self) -> None:
        """Release the model or the connection."""


class LocalBackend:
    """A base in this process; `/on` and `/off` switch the adapter."""

    commands: Mapping[str, str] = {"/on": "switch the adapter on", "/off": "switch it off"}

    def __init__(self, settings: ChatSettings) -> None:
        opened = load_run(settings.adapter, settings)
        self._base, self._adapters = opened.causal_lm, opened.active
        self._active = self._adapters
        self._renderer = Renderer(
            self._base.tokenizer, opened.chat_format, self._base.max_positions
        )
        self._sampling = SamplingParams(
            settings.max_new_tokens, settings.temperature, settings.top_p, seed=settings.seed
        )
        self._adapter_path = str(settings.adapter) if settings.adapter else None
        adapted = f" with {settings.adapter}" if settings.adapter else ""
        self.greeting = f"{self._base.name}{adapted}"

    def command(self, word: str, argument: str) -> str | None:
        """Switch the adapter on or off."""
        self._active = self._adapters if word == "/on" else ActiveAdapters()
        return None

    def complete(self, messages: list[dict[str, str]], write: Callable[[str], None]) -> None:
        """Pass the text of the next message to `write` as it is generated."""

        def on_output(_: int, chunk: OutputChunk) -> None:
            write(chunk.text)

        prompt = self._renderer.prompt(messages)
        stops = self._renderer.stop_token_ids
        generate_completions(self._base, [prompt], self._sampling, self._active, stops, on_output)

    def result(self) -> dict[str, Any]:
        """Return the base and the adapter."""
        return {"base": self._base.name, "run": self._adapter_path}

    def close(self) -> None:
        """Do nothing: the process ends."""


class ServerBackend:
    """A server that implements OpenAI's API; `/model NAME` selects another model."""

    commands: Mapping[str, str] = {"/model": "NAME: select another model; alone: list them"}

    def __init__(self, settings: ChatSettings) -> None:
        if local := sorted(LOCAL_SETTINGS & settings.model_fields_set):
            raise SettingsError(
                f"{local[0]} is a setting of the server", where="--base-url", hint="--model NAME"
            )
        self._settings = settings
        client = import_extra("afina.server.client", "serve")
        self._client: Client = client.Client(str(settings.base_url), settings.api_key)
        self._runner = asyncio.Runner()
        self._names = self._runner.run(self._client.models())
        self._model = settings.model or self._names[0]
        self.greeting = f"{self._model} at {self._client.url}"

    def command(self, word: str, argument: str) -> str | None:
        """Select a model; return its name and those that the server lists."""
        self._model = argument or self._model
        return f"{self._model}, of {', '.join(self._names)}"

    def complete(self, messages: list[dict[str, str]], write: Callable[[str], None]) -> None:
        """Pass the text of the next message to `write` as it is generated."""
        self._runner.run(self._stream(messages, write))

    async def _stream(self, messages: list[dict[str, str]], write: Callable[[str], None]) -> None:
        settings = self._settings
        body = {
            "model": self._model,
            "messages": messages,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
        }
        if "max_new_tokens" in settings.model_fields_set:  # else as many as the context allows
            body["max_tokens"] = settings.max_new_tokens
        if settings.template_kwargs:
            body["chat_template_kwargs"] = settings.template_kwargs
        async for piece in self._client.chat(body):
            write(piece.text)

    def result(self) -> dict[str, Any]:
        """Return the server's URL and the model."""
        return {"url": self._client.url, "model": self._model}

    def close(self) -> None:
        """Close the connection."""
        self._runner.run(self._client.__aexit__())
        self._runner.close()


def chat(settings: ChatSettings) -> dict[str, Any]:
    """Read messages and print completions until the input ends.

    Returns:
        `{"messages": [...]}` with the model: "base" and "run", or "url" and "model".
    """
    is_local = settings.base_url is None
    backend: ChatBackend = LocalBackend(settings) if is_local else ServerBackend(settings)
    try:
        messages = _converse(backend, settings.system_prompt)
        return backend.result() | {"messages": messages}
    finally:
        backend.close()


def _converse(backend: ChatBackend, system_prompt: str | None) -> list[dict[str, str]]:
    """Return the messages of the conversation; /new begins another one."""
    console = Console(stderr=True)

    def show(text: str) -> None:
        console.print(translate(text), highlight=False)

    opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = list(opening)
    known = dict(backend.commands) | COMMON_COMMANDS
    show(f"{backend.greeting}. {', '.join(known)}; Ctrl-D ends.")
    while (line := _read_line()) is not None:
        word, _, argument = line.partition(" ")
        if word in backend.commands:
            if printed := backend.command(word, argument.strip()):
                show(printed)
        elif line == NEW:
            messages = list(opening)
        elif line == HELP:
            for name, text in known.items():
                console.print(f"{name:8} {translate(text)}", highlight=False)
        elif re.fullmatch(r"/[a-z]+", line):
            show(f"{line} is none of {', '.join(known)}")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _complete(backend, messages)})
            except DataError as error:  # the conversation is longer than the context
                show(f"{error.what}; {NEW} starts a new conversation")
                messages.pop()
            except AfinaError as error:
                console.print(translate_error(error), highlight=False)
                messages.pop()
    return messages


def _complete(backend: ChatBackend, messages: list[dict[str, str]]) -> str:
    """Print the next message as it is generated; return it."""
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()

    backend.complete(messages, write)
    print()
    return "".join(pieces).strip()


def _read_line() -> str | None:
    """Return the next line of the terminal; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
