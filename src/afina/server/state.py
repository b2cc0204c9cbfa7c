"""What every request may need, in one place, and who answers under which name."""

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from afina.data.renderer import Renderer
from afina.engine.request import AdapterWeight, RegisteredAdapter
from afina.errors import AuditError, DataError
from afina.io.admission import approved_report
from afina.io.composition import composition_hash
from afina.models.causal_lm import CausalLM
from afina.server.auth import APIKeys, Principal
from afina.server.errors import APIError, not_found, to_api_error
from afina.server.metrics import ServerMetrics
from afina.server.rate_limits import RateLimiter
from afina.server.routing import ServedAdapterRouter
from afina.server.store import Store
from afina.settings import EMBEDDED, ServeSettings

if TYPE_CHECKING:
    from afina.engine.engine import Engine
    from afina.server.jobs.worker import JobWorker

AUTO, MOST_PARTS = "auto", 8
Result = TypeVar("Result")


@dataclass(frozen=True)
class ResolvedModel:
    """Who answers: the adapters and their weights, none for the base; `choice` tells how "auto" came to it."""

    label: str  # the model's name in the answer
    names: tuple[str, ...] = ()
    parts: tuple[AdapterWeight, ...] = ()
    owner: str = ""  # whose cached pages these are; "" where everything is public
    choice: dict[str, Any] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Who answers, for those who left the choice to us."""
        return (
            {}
            if self.choice is None
            else {"x-afina-adapter": self.label, "x-afina-score": f"{self.choice['score']:.4f}"}
        )


@dataclass
class ServerState:
    """A server: engine and base, tables and keys, limits and figures."""

    settings: ServeSettings
    engine: "Engine"
    renderer: Renderer
    store: Store
    keys: APIKeys
    limits: RateLimiter
    metrics: ServerMetrics
    worker: "JobWorker"
    choosing: ServedAdapterRouter
    ready: bool = True
    inherited_fds: tuple[
        int, ...
    ] = ()  # what a job's process holds open: the lock on the state folder
    tokenizer_pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "tokens")
    )
    """One thread for templates and tokenizing: a long text does not hold up the others' streams."""

    @property
    def base(self) -> CausalLM:
        """The base that all adapters are on."""
        base: CausalLM = self.engine.base
        return base

    @property
    def base_name(self) -> str:
        """What the base is called here: its name, and never where it lies on this machine."""
        return served_name(self.settings.base)

    def visible_adapter(self, caller: Principal, name: str) -> RegisteredAdapter | None:
        """The adapter of this name, if there is one that the caller may see."""
        entry: RegisteredAdapter | None = self.engine.registry.get(name)
        return entry if entry is not None and caller.can_see(entry.owner) else None

    def entries(self, caller: Principal) -> list[RegisteredAdapter]:
        """The adapters that the caller may see, by name."""
        return sorted(
            (e for e in self.engine.registry.list_adapters() if caller.can_see(e.owner)),
            key=lambda entry: entry.name,
        )

    def resolve_model(
        self, caller: Principal, model: str, prompt: Sequence[int] = ()
    ) -> ResolvedModel:
        """Who `model` means: the base, an adapter, several (a:0.7,b:0.3), or "auto", by the prompt's tokens."""
        if model == self.base_name:
            return ResolvedModel(model)
        if model == AUTO:
            return self._admitted(self._by_query(caller, prompt))
        told = [self._weighted(caller, piece) for piece in model.split(",")]
        if len(told) > MOST_PARTS:
            raise APIError(400, f"at most {MOST_PARTS} adapters act together", "model")
        return self._admitted(_together(model, told))

    def _admitted(self, chosen: ResolvedModel) -> ResolvedModel:
        """What was chosen, where `--admit audited` has a report on just that: each adapter, and the sum with these weights.

        Asked for at each request: what is revoked while it is served is refused from then on, also in sums.
        """
        if self.settings.require_audit and chosen.parts:
            shares = [(part.adapter, part.weight) for part in chosen.parts]
            alone = len(shares) == 1 and shares[0][1] == 1.0
            try:
                for digest in (
                    *(digest for digest, _ in shares),
                    *(() if alone else (composition_hash(shares),)),
                ):
                    approved_report(digest, chosen.label, self.base.hash)
            except AuditError as error:
                raise APIError(
                    403, f"{chosen.label}: {error.what}", "model", "not_admitted"
                ) from None
        return chosen

    async def run_in_tokenizer_thread(self, make: Callable[[], Result]) -> Result:
        """What `make` gives, made by the one thread beside the loop (tokens, a choice); raises `Refusal` where it cannot."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.tokenizer_pool, make)
        except DataError as error:
            raise to_api_error(error, "messages") from None

    def _weighted(self, caller: Principal, piece: str) -> tuple[RegisteredAdapter, float]:
        """NAME or NAME:WEIGHT; names may have colons in them, and a whole name goes first."""
        if (entry := self.visible_adapter(caller, piece.strip())) is not None:
            return entry, 1.0
        name, _, weight = piece.strip().rpartition(":")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if (entry := self.visible_adapter(caller, name)) is None or math.isnan(value):
            raise not_found("model", piece.strip())
        if abs(value) > 100.0:
            raise APIError(400, f"the weight of {name} is beyond 100", "model")
        return entry, value

    def _by_query(self, caller: Principal, prompt: Sequence[int]) -> ResolvedModel:
        choice = self.choosing.choose(prompt, self.entries(caller))
        told = {"adapter": choice.name, "score": choice.score, "why": choice.why}
        entry = self.visible_adapter(caller, choice.name) if choice.name is not None else None
        if entry is None:
            return ResolvedModel(self.base_name, choice=told)
        return _together(entry.name, [(entry, 1.0)], told)


def _together(
    label: str,
    told: Sequence[tuple[RegisteredAdapter, float]],
    choice: dict[str, Any] | None = None,
) -> ResolvedModel:
    owner = next((entry.owner for entry, _ in told if entry.owner is not None), "")
    parts = tuple(AdapterWeight(entry.hash, weight) for entry, weight in told)
    return ResolvedModel(label, tuple(entry.name for entry, _ in told), parts, owner, choice)


def served_name(base: str) -> str:
    """The name of a base for clients: a hub name as it is, of a folder the last part."""
    return (
        base
        if base == EMBEDDED or not Path(base).expanduser().exists()
        else Path(base).expanduser().resolve().name
    )


def requested_model(request: Request, asked: str) -> str:
    """Who is asked: as Azure's path says, or the body; raises `Refusal` where neither does."""
    model: str = getattr(request.state, "deployment", asked)
    if not model:
        raise APIError(400, "model: who shall answer?", "model")
    return model


def get_state(request: Request) -> ServerState:
    """The server that a request came to."""
    state: ServerState = request.app.state.afina
    return state
