"""Routing for `model="auto"`: the adapter whose training prompts are closest to the prompt.

Routing profiles are read from the adapters' folders when the first request needs them, and again
when a name is given to another adapter.
"""

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from afina.data.renderer import Renderer
from afina.engine.adapter_router import AdapterRouter, RoutingDecision
from afina.engine.encoder_engine import EncoderEngine
from afina.engine.engine import Engine
from afina.engine.request import RegisteredAdapter
from afina.engine.routing_profile import ChatFrame, PromptEmbedder, read_profile
from afina.errors import AfinaError
from afina.server.logs import LOG

PROMPTS_PER_PIECE = 8  # of at most 256 tokens each; of general text, 192 tokens together


class EngineEmbedder:
    """Vectors of prompts, computed by the engine's thread in pieces between two steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._embedder = engine, PromptEmbedder(engine.base)
        self.key = self._embedder.key

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return float32 vectors `(n, parts, d)` of non-empty prompts of token ids.

        Raises:
            BusyError: the engine is stopping, or does not come to it.
        """
        found = []
        for start in range(0, len(prompts), PROMPTS_PER_PIECE):
            piece = prompts[start : start + PROMPTS_PER_PIECE]
            found.append(self._engine.run_between_steps(partial(self._embedder, piece)))
        return torch.cat(found)


class ServedAdapterRouter:
    """An adapter router whose profiles are those of the registered adapters. Thread-safe."""

    def __init__(self, engine: Engine | EncoderEngine, renderer: Renderer) -> None:
        self._engine, self._renderer, self._registry = engine, renderer, engine.registry
        self._router: AdapterRouter | None = None
        self._known: dict[str, str] = {}  # name -> hash, of adapters whose profile was looked up
        self._lock = threading.Lock()

    def route(self, prompt: Sequence[int], entries: Sequence[RegisteredAdapter]) -> RoutingDecision:
        """Return the routing decision for a prompt's token ids, among `entries` and the base."""
        with self._lock:
            if self._router is None:
                assert isinstance(self._engine, Engine)
                # embeds general text once; servers without requests for "auto" never do
                embedding, frame = EngineEmbedder(self._engine), ChatFrame.of(self._renderer)
                self._router = AdapterRouter(self._engine.base, frame, embedding=embedding)
            self._update_profiles(self._router)
            loaded = {entry.name for entry in entries if entry.state != "disk"}
            return self._router.route(prompt, loaded, {entry.name for entry in entries})

    def _update_profiles(self, router: AdapterRouter) -> None:
        """Add the profiles of newly registered adapters and remove those of unregistered ones."""
        registered = {entry.name: entry for entry in self._registry.list_adapters()}
        current = {name: entry.hash for name, entry in registered.items()}
        for name in [n for n, digest in self._known.items() if current.get(n) != digest]:
            router.remove_profile(name)
            del self._known[name]
        for name, entry in registered.items():
            if name in self._known:
                continue
            self._known[name] = entry.hash
            try:
                profile = read_profile(Path(entry.folder), router.embedding.key)
                if profile is not None:
                    router.add_profile(name, profile)
            except AfinaError as error:
                LOG.warning(
                    "an adapter's profile cannot be used",
                    extra={"adapter": name, "why": str(error)},
                )
