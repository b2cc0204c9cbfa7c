"""A real server for tests: the engine on the tiny base, uvicorn in a thread, the stock clients."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn

from afina.adapters.attach import detach
from afina.adapters.saving import save_adapter
from afina.models.loading import load_base
from afina.server.app import make_app
from afina.server.serve import build_server, close, uvicorn_config
from afina.server.state import ServerState
from afina.settings import ServeSettings
from helpers import put

KEYS = """
alice: key-of-alice
bob: {key: key-of-bob}
root: {key: key-of-root, admin: true}
"""


@dataclass
class Live:
    """A running server."""

    url: str
    state: ServerState

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options
        )

    def http(self, key: str | None = None) -> httpx2.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60)

    @property
    def admin(self) -> str:
        return (self.state.settings.state_dir / "admin.key").read_text().strip()


@contextmanager
def live(**settings: Any) -> Iterator[Live]:
    """Serve until the block ends."""
    state = build_server(ServeSettings(dtype="float32", **settings))
    server = uvicorn.Server(uvicorn_config(state.settings, make_app(state)))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        state.worker.start()
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", state)
        finally:
            server.should_exit = True
            thread.join(state.settings.shutdown_timeout + 30)
            close(state)
    assert not thread.is_alive()


def make_adapters(base: Path, folder: Path, **names: dict[str, Any]) -> Path:
    """Adapters of random numbers, large enough to change what is said, each in a folder of its name."""
    for seed, (name, spec) in enumerate(names.items(), start=1):
        loaded = load_base(str(base))
        adapter = put(loaded, seed=seed, **spec)
        save_adapter(adapter, loaded, folder / name)
        detach(loaded.model, adapter)
    return folder
