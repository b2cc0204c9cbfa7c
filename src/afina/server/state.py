"""The state of a server, and the resolution of a request's `model` to base and adapters."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request
from transformers import PreTrainedTokenizerBase

from afina.data.renderer import Renderer
from afina.engine.encoder_engine import EncoderEngine
from afina.engine.engine import Engine
from afina.engine.request import AdapterWeight, RegisteredAdapter
from afina.errors import AuditError, BusyError, DataError
from afina.io.admission import approved_report
from afina.io.composition import composition_hash
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.models.frozen import FrozenModel
from afina.server.auth import APIKeys, Principal
from afina.server.errors import APIError, not_found, to_api_error
from afina.server.fair_pool import FairThreadPool
from afina.server.formats import ServedFormats
from afina.server.jobs.worker import JobWorker
from afina.server.metrics import ServerMetrics
from afina.server.prompts import ChatPrompt
from afina.server.rate_limits import RateLimiter
from afina.server.routing import ServedAdapterRouter
from afina.server.schemas import ChatCompletionRequest, StrictRequest
from afina.server.store import Store
from afina.server.text_limit import TextLimit
from afina.settings import EMBEDDED, ServeSettings

AUTO = "auto"  # the name that routes a prompt to an adapter
ENCODER_PATHS = "/v1/embeddings, /v1/classify or /v1/rerank"
MAX_ADAPTERS = 8  # of a weighted sum in one request
MAX_WEIGHT = 100.0  # largest magnitude of an adapter's weight
Result = TypeVar("Result")
Files = tuple[tuple[str, int, int], ...]  # path, time of change in ns, size


@dataclass(frozen=True)
class ResolvedModel:
    """What a request's `model` stands for: adapters and weights, or none for the base alone."""

    label: str  # the name of the model in the response
    names: tuple[str, ...] = ()
    parts: tuple[AdapterWeight, ...] = ()
    owner: str = ""  # of the KV cache blocks; "" where every adapter is public
    client: str = ""  # for the engine's fair queue
    cache_salt: str = ""  # of the KV cache blocks; "" where they are shared
    choice: dict[str, Any] | None = None  # the routing decision of "auto": adapter, score, why

    @property
    def body(self) -> dict[str, Any]:
        """Field of the response with the routing decision of "auto"."""
        return {"afina": self.choice} if self.choice else {}

    @property
    def headers(self) -> dict[str, str]:
        """Response headers with the adapter that "auto" chose and its score."""
        if self.choice is None:
            return {}
        name = quote(self.label, safe="/:@,")  # a base's folder may have any name
        return {"x-afina-adapter": name, "x-afina-score": f"{self.choice['score']:.4f}"}


@dataclass(frozen=True)
class UnservedAdapter:
    """An adapter that could not be registered, and the files that were read."""

    folder: Path
    owner: str | None
    reason: str
    files: Files


@dataclass
class ServerState:
    """Everything that the routes of one server share."""

    settings: ServeSettings
    engine: Engine | EncoderEngine
    store: Store
    keys: APIKeys
    limits: RateLimiter
    metrics: ServerMetrics
    worker: JobWorker
    router: ServedAdapterRouter
    formats: ServedFormats
    text_limit: TextLimit
    ready: bool = True
    unserved: dict[str, UnservedAdapter] = field(default_factory=dict)  # by name
    retry_adapter: Callable[[str], bool] = lambda name: False  # one whose files have changed
    # templates, tokenizing and grammars: a long text blocks neither streams nor other clients
    tokenizer_pool: FairThreadPool = field(
        default_factory=lambda: FairThreadPool(max(2, (os.cpu_count() or 2) // 2), "tokens")
    )

    grader_pool: FairThreadPool = field(default_factory=lambda: FairThreadPool(2, "graders"))

    @property
    def renderer(self) -> Renderer:
        """What writes the prompts of the base."""
        return self.formats.base.renderer

    @property
    def generator(self) -> Engine:
        """The engine that generates text; raises `APIError` 400 where the base is an encoder."""
        if isinstance(self.engine, Engine):
            return self.engine
        what = f"{self.base_name} is an encoder ({_family(self.model)}), which generates no text"
        raise APIError(400, f"{what}: use {ENCODER_PATHS}", code="base_is_encoder")

    @property
    def encoder(self) -> EncoderEngine:
        """The engine of an encoder; raises `APIError` 400 where the base generates text."""
        if isinstance(self.engine, EncoderEngine):
            return self.engine
        what = f"{self.base_name} is a language model ({_family(self.model)}), and no encoder"
        hint = "use /v1/chat/completions, /v1/completions or /v1/embeddings"
        raise APIError(400, f"{what}: {hint}", code="base_is_decoder")

    @property
    def is_encoder(self) -> bool:
        """Whether the base reads texts and generates none."""
        return isinstance(self.engine, EncoderEngine)

    @property
    def model(self) -> CausalLM | Classifier:
        """The frozen model of the engine."""
        return self.engine.base

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the base."""
        assert self.model.tokenizer is not None  # of a model of images only
        return self.model.tokenizer

    @property
    def base(self) -> CausalLM:
        """The frozen language model; raises `APIError` 400 where the base is an encoder."""
        return self.generator.base

    @property
    def base_name(self) -> str:
        """The name of the base for clients, without its path on this machine."""
        return served_name(self.settings.base)

    def visible_adapter(self, caller: Principal, name: str) -> RegisteredAdapter | None:
        """Return the adapter of this name, or None where the caller can see none."""
        entry = self.engine.registry.get(name)
        return entry if entry is not None and caller.can_see(entry.owner) else None

    def visible_adapters(self, caller: Principal) -> list[RegisteredAdapter]:
        """Return the adapters that the caller can see, sorted by name."""
        return sorted(
            (e for e in self.engine.registry.list_adapters() if caller.can_see(e.owner)),
            key=lambda entry: entry.name,
        )

    def resolve_model(
        self, caller: Principal, model: str, prompt: Sequence[int] = ()
    ) -> ResolvedModel:
        """Return what `model` stands for: base, adapter, weighted sum (a:0.7,b:0.3) or "auto".

        Args:
            prompt: Token ids by which "auto" routes.

        Raises:
            APIError: 404 for an unknown adapter, 403 for one without the required audit report.
        """
        chosen = self._resolve(caller, model, prompt)
        salt = "" if self.settings.share_prefix_cache else (caller.name or "")
        return replace(self._check_audit(chosen), client=caller.client, cache_salt=salt)

    def _resolve(self, caller: Principal, model: str, prompt: Sequence[int]) -> ResolvedModel:
        if model == self.base_name:
            return ResolvedModel(model)
        if model == AUTO:
            return self._route(caller, prompt)
        adapters = [self._parse_weighted(caller, text) for text in model.split(",")]
        if len(adapters) > MAX_ADAPTERS:
            what = f"model names {len(adapters)} adapters; a request uses at most {MAX_ADAPTERS}"
            raise APIError(400, what, "model")
        return _resolved(model, adapters)

    def build_chat(
        self, caller: Principal, model: str, body: ChatCompletionRequest
    ) -> tuple[ResolvedModel, ChatPrompt]:
        """Return what `model` stands for, and the prompt in the format of its adapters.

        "auto" routes by the prompt in the format of the base.

        Raises:
            APIError: as `resolve_model`, or the adapters were trained in different formats.
            DataError: the template rejects the messages.
        """
        routed = self.formats.base.build(body).tokens if model == AUTO else ()
        chosen = self.resolve_model(caller, model, routed)
        return chosen, self.formats.of(chosen.names).build(body)

    def _check_audit(self, chosen: ResolvedModel) -> ResolvedModel:
        """Return `chosen` if audit reports are not required, or there is one for all of it.

        With `require_audit`, each adapter needs a report, and so does the sum with these weights.
        Checked at each request: an adapter revoked while it is served is rejected from then on.
        """
        if not self.settings.require_audit or not chosen.parts:
            return chosen
        weighted = [(part.adapter, part.weight) for part in chosen.parts]
        hashes = [digest for digest, _ in weighted]
        if len(weighted) > 1 or weighted[0][1] != 1.0:
            hashes.append(composition_hash(weighted))
        try:
            for digest in hashes:
                approved_report(digest, chosen.label, self.model.hash)
        except AuditError as error:
            raise APIError(403, f"{chosen.label}: {error.what}", "model", "not_admitted") from None
        return chosen

    async def run_in_tokenizer_thread(self, make: Callable[[], Result]) -> Result:
        """Return the result of `make`, run in a tokenizer thread, off the event loop.

        Raises:
            APIError: 400 where `make` raises `DataError`, 503 where too many tasks wait.
        """
        try:
            return await self.tokenizer_pool.run(make)
        except (DataError, BusyError) as error:
            raise to_api_error(error, "messages") from None

    def _parse_weighted(self, caller: Principal, text: str) -> tuple[RegisteredAdapter, float]:
        """Parse NAME or NAME:WEIGHT; a name may contain colons, and the full text goes first."""
        text = text.strip()
        entry = self.visible_adapter(caller, text)
        if entry is None and self.retry_adapter(text):
            entry = self.visible_adapter(caller, text)
        if entry is not None:
            return entry, 1.0
        name, _, weight = text.rpartition(":")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        entry = self.visible_adapter(caller, name)
        if entry is None or math.isnan(value):
            unserved = self.unserved.get(text)
            if unserved is None or not caller.can_see(unserved.owner):
                raise not_found("model", text, "model")
            what = f"{text} is not served, for a reason that is in the server's log"
            raise APIError(404, what, "model", "model_not_served")
        if abs(value) > MAX_WEIGHT:
            what = f"model: the weight {value:g} of {name} is out of range: -100 to 100"
            raise APIError(400, what, "model")
        return entry, value

    def _route(self, caller: Principal, prompt: Sequence[int]) -> ResolvedModel:
        if self.is_encoder:
            raise APIError(400, f"model: {AUTO!r} needs a base that generates text", "model")
        decision = self.router.route(prompt, self.visible_adapters(caller))
        choice = {"adapter": decision.name, "score": decision.score, "why": decision.why}
        name = decision.name
        entry = None if name is None else self.visible_adapter(caller, name)
        if entry is None:
            return ResolvedModel(self.base_name, choice=choice)
        return _resolved(entry.name, [(entry, 1.0)], choice)


def _resolved(
    label: str,
    adapters: Sequence[tuple[RegisteredAdapter, float]],
    choice: dict[str, Any] | None = None,
) -> ResolvedModel:
    owner = next((entry.owner for entry, _ in adapters if entry.owner is not None), "")
    parts = tuple(AdapterWeight(entry.hash, weight) for entry, weight in adapters)
    names = tuple(entry.name for entry, _ in adapters)
    return ResolvedModel(label, names, parts, owner, choice=choice)


def _family(model: FrozenModel) -> str:
    return str(model.model.config.model_type)


def served_name(base: str) -> str:
    """Return the name of a base for clients: a hub name unchanged, the last part of a path."""
    path = Path(base).expanduser()
    return base if base == EMBEDDED or not path.exists() else path.resolve().name


def requested_model(request: Request, model: str) -> str:
    """Return the model of Azure's path, or else that of the body.

    Raises:
        APIError: 400 where neither names a model.
    """
    name: str = getattr(request.state, "deployment", model)
    if not name:
        raise APIError(400, "model is missing: give the base or an adapter", "model")
    return name


def note_ignored(request: Request, body: StrictRequest, more: Sequence[str] = ()) -> None:
    """Record the ignored parameters of a request: for the log, and the header x-afina-ignored.

    Args:
        more: parameters without effect on this base, where the request has them.

    Raises:
        APIError: 400 with --strict-requests.
    """
    sent = body.model_fields_set
    ignored = [*body.ignored, *(name for name in more if name in sent)]
    if ignored and get_state(request).settings.strict_requests:
        what = f"{ignored[0]} has no effect on this server, which runs with --strict-requests"
        raise APIError(400, what, ignored[0])
    if ignored:
        request.state.log["ignored"] = ", ".join(ignored)


def get_state(request: Request) -> ServerState:
    """Return the state of the server that received a request."""
    state: ServerState = request.app.state.afina
    return state
