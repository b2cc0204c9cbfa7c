"""A streaming client of a server with OpenAI's API, with the time of each chunk."""

import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from afina.errors import AfinaError


class ServerError(AfinaError):
    """The server returned an error, or cannot be reached."""


@dataclass(frozen=True)
class TextChunk:
    """Some text of a completion, and its time of arrival in seconds after the request."""

    text: str
    seconds: float


class Client:
    """A client of the server at `url`; `key` is by default AFINA_KEY or OPENAI_API_KEY."""

    def __init__(self, url: str, key: str | None = None) -> None:
        key = key or os.environ.get("AFINA_KEY") or os.environ.get("OPENAI_API_KEY")
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        timeout = httpx.Timeout(600.0, connect=10.0)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers, limits=limits, timeout=timeout
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Return the names of the models; the base first."""
        try:
            response = await self._http.get("/v1/models")
            await self._check(response)
            return [model["id"] for model in response.json()["data"]]
        except httpx.TransportError as error:
            raise self._unreachable(error) from None

    async def chat(self, body: dict[str, Any]) -> AsyncIterator[TextChunk]:
        """Yield the text chunks of one completion; raise `ServerError` where there is none."""
        began = time.perf_counter()
        try:
            async with self._http.stream(
                "POST", "/v1/chat/completions", json=body | {"stream": True}
            ) as response:
                await self._check(response)
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ServerError(event["error"]["message"], where=self.url)
                    deltas = [choice["delta"] for choice in event["choices"]]
                    text = "".join(delta.get("content") or "" for delta in deltas)
                    if text:
                        yield TextChunk(text, time.perf_counter() - began)
        except httpx.TransportError as error:
            raise self._unreachable(error) from None

    async def _check(self, response: httpx.Response) -> None:
        if response.status_code < 400:
            return
        await response.aread()
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text[:200]
        hint = "--api-key KEY, or AFINA_KEY" if response.status_code in (401, 403) else None
        raise ServerError(f"{response.status_code}: {message}", where=self.url, hint=hint)

    def _unreachable(self, error: Exception) -> ServerError:
        return ServerError(
            "the server cannot be reached",
            where=self.url,
            why=str(error) or type(error).__name__,
            hint="afina serve",
        )
