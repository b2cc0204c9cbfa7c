"""`model="auto"`: the adapter whose own prompts are closest to the query, among those that the caller may see.

Profiles are read from the adapters' folders when they are first needed, and again when a name points at another adapter.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from afina.data.renderer import Renderer
from afina.engine.adapter_router import AdapterRouter, RoutingDecision
from afina.engine.request import RegisteredAdapter
from afina.engine.routing_profile import ChatFrame, read_profile
from afina.errors import AfinaError
from afina.models.causal_lm import CausalLM
from afina.server.logs import LOG

if TYPE_CHECKING:
    from afina.engine.adapter_registry import AdapterRegistry


class ServedAdapterRouter:
    """Keeps the profiles in step with the shelf. Any thread may call."""

    def __init__(self, base: CausalLM, renderer: Renderer, shelf: "AdapterRegistry") -> None:
        self._base, self._renderer, self._shelf = base, renderer, shelf
        self._choosing: AdapterRouter | None = None
        self._known: dict[str, str] = {}  # name -> hash, of all that was looked at
        self._lock = threading.Lock()

    def choose(
        self, prompt: Sequence[int], entries: Sequence[RegisteredAdapter]
    ) -> RoutingDecision:
        """The adapter for a prompt's tokens among `entries`, or the base."""
        with self._lock:
            if (
                self._choosing is None
            ):  # it reads general text once: only servers that are asked for "auto" do
                self._choosing = AdapterRouter(self._base, ChatFrame.of(self._renderer))
            self._follow(self._choosing)
            resident = {entry.name for entry in entries if entry.state != "disk"}
            return self._choosing.route(prompt, resident, {entry.name for entry in entries})

    def _follow(self, choosing: AdapterRouter) -> None:
        """Learn the profiles of what is new on the shelf, forget what is gone."""
        there = {entry.name: entry for entry in self._shelf.list_adapters()}
        for name in [
            name
            for name, digest in self._known.items()
            if name not in there or there[name].hash != digest
        ]:
            choosing.remove_profile(name)
            del self._known[name]
        for name, entry in there.items():
            if name in self._known:
                continue
            self._known[name] = entry.hash
            try:
                profile = read_profile(Path(entry.folder), choosing.embedding.key)
                if profile is not None:
                    choosing.add_profile(name, profile)
            except AfinaError as error:
                LOG.warning(
                    "an adapter's profile cannot be used",
                    extra={"adapter": name, "why": str(error)},
                )
