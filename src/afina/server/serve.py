"""`afina serve`: builds base, engine, store, job worker and application, and runs uvicorn."""

import gc
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import uvicorn
from fastapi import FastAPI

from afina.engine.encoder_engine import EncoderEngine
from afina.engine.engine import Engine, EngineConfig
from afina.errors import BaseError, SettingsError
from afina.io.result import Result
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.models.encoder_views import is_encoder, load_encoder_views
from afina.models.loading import load_base
from afina.server.app import make_app
from afina.server.auth import APIKeys
from afina.server.connections import BoundedProtocol
from afina.server.formats import ServedFormats
from afina.server.jobs.worker import JobWorker
from afina.server.logs import LOG, set_up_logs
from afina.server.metrics import ServerMetrics
from afina.server.rate_limits import RateLimiter
from afina.server.routing import ServedAdapterRouter
from afina.server.startup import AdapterFolders
from afina.server.state import AUTO, ServerState, served_name
from afina.server.store import Store
from afina.server.supervisor import supervise
from afina.server.text_limit import TextLimit
from afina.settings import ServeSettings, make_settings
from afina.settings.common import CHAT_SETTINGS

# wait for the lock on the state directory: the jobs of a killed server end after some seconds
LOCK_SECONDS = 15.0
FAILED_SECONDS = 10.0  # after a failure of the engine, clients receive their errors until then
DECODER_SETTINGS = ("quantization", "merge_hot_adapter", "share_prefix_cache", *CHAT_SETTINGS)
MAX_WAITING = 8192  # queued sequences of all keys together; one key has 1,024 of them


@dataclass(frozen=True, eq=False)
class ServeResult(Result):
    """Server that has stopped: its base and how many adapters it had; nothing is printed."""

    base: str
    adapters: int
    exit_status: int = 0


def serve(settings: ServeSettings | None = None, **values: Any) -> ServeResult:
    """Serve until SIGTERM or Ctrl-C; running requests then have `shutdown_timeout` seconds.

    Returns:
        The name of the base and the number of adapters that were served.

    Raises:
        AfinaError: The base, an adapter, the database or the keys cannot be used.

    Example:
        serve(base="HuggingFaceTB/SmolLM2-135M", adapters=["runs"], port=8000)
    """
    settings = settings or make_settings(ServeSettings, values)
    if settings.supervise:
        return ServeResult(
            base=served_name(settings.base), adapters=0, exit_status=supervise(settings)
        )
    set_up_logs()
    LOG.info("starting", extra={"base": settings.base})
    lock = _lock_state_dir(settings.state_dir)
    state = build_server(settings)
    app = make_app(state, lambda: close(state))
    state.worker.start(inherited_fds=(lock.fileno(),))
    count = len(state.engine.registry.list_adapters())
    gc.freeze()  # what is loaded stays: no collection looks at it, that at the end took a second
    LOG.info(
        "serving",
        extra={
            "base": state.base_name,
            "host": settings.host,
            "port": settings.port,
            "adapters": count,
        },
    )
    # uvicorn stops at these signals, and raises them once more after it has stopped
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server = uvicorn.Server(uvicorn_config(settings, app))
    state.engine.on_failure = lambda error: _end_process(server)
    try:
        server.run()
    finally:
        close(state)
        lock.close()
    if state.engine.failure is not None:
        raise BaseError(
            "the engine has stopped after an error",
            why=str(state.engine.failure),
            hint="afina serve --supervise starts the server again",
        )
    return ServeResult(base=state.base_name, adapters=count)


def uvicorn_config(settings: ServeSettings, app: FastAPI) -> uvicorn.Config:
    """Return how uvicorn serves the app: its limits of time, its connections, no log of its own."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_keep_alive=round(settings.keep_alive),
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
        server_header=False,
    )


def _end_process(server: uvicorn.Server) -> None:
    """End the process after a failure of the engine, even where a thread does not end."""
    server.should_exit = True
    timer = threading.Timer(FAILED_SECONDS, lambda: os._exit(1))
    timer.daemon = True
    timer.start()


def build_server(settings: ServeSettings) -> ServerState:
    """Return the state of a server whose engine runs; only the network is missing."""
    engine = make_engine(settings)
    base = engine.base
    name = served_name(settings.base)
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    store = Store(
        settings.database_url or f"sqlite:///{(settings.state_dir / 'state.db').resolve()}"
    )
    formats = ServedFormats(base, engine.registry, settings)
    metrics = ServerMetrics(engine, name)
    state = ServerState(
        settings=settings,
        engine=engine,
        store=store,
        keys=APIKeys(settings),
        limits=RateLimiter(settings.max_requests_per_key, settings.max_tokens_per_minute),
        metrics=metrics,
        worker=JobWorker(settings, store, engine, metrics),
        router=ServedAdapterRouter(engine, formats.base.renderer),
        formats=formats,
        text_limit=TextLimit(formats.base.renderer, base.max_positions),
    )
    folders = AdapterFolders(state)
    folders.register_all()
    if settings.watch:
        folders.watch()
    engine.start()
    return state


def make_engine(settings: ServeSettings) -> Engine | EncoderEngine:
    """Load the base, and return the engine that runs it.

    Raises:
        BaseError: the base cannot be loaded.
        SettingsError: a setting has no effect on an encoder.
    """
    if is_encoder(settings):
        _check_encoder_settings(settings)
        views = load_encoder_views(settings)
        return EncoderEngine(views, engine_settings(settings, views.classifier))
    base = load_base(
        settings.base,
        settings.revision,
        settings.trust_remote_code,
        settings.dtype,
        settings.device,
        settings.quantization,
    )
    return Engine(base, engine_settings(settings, base))


def _check_encoder_settings(settings: ServeSettings) -> None:
    for name in DECODER_SETTINGS:
        if getattr(settings, name) != ServeSettings.model_fields[name].get_default():
            what = f"{name} has no effect on an encoder"
            raise SettingsError(what, where=name, why=settings.base, hint="leave it out")


def engine_settings(settings: ServeSettings, base: CausalLM | Classifier) -> EngineConfig:
    """Return the sizes of the engine's memory, in bytes.

    On a GPU, adapters are cached in host memory too, in a quarter of `memory_gb`.
    """
    size = round(settings.memory_gb * 1e9)
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    host = 0 if base.device.type == "cpu" else size // 4
    merged = 4 * weights if settings.merge_hot_adapter else 0
    return EngineConfig(
        pool_bytes=size,
        host_cache_bytes=host,
        merged_weights_bytes=merged,
        require_audit=settings.require_audit,
        max_total_waiting=MAX_WAITING,
        reserved_names=(served_name(settings.base), AUTO),
    )


def close(state: ServerState) -> None:
    """Stop the jobs (they resume after the next start), then the engine; only once."""
    if state.ready:
        state.ready = False
        state.worker.stop()
        state.engine.stop()
        state.store.close()
        state.tokenizer_pool.close()
        state.grader_pool.close()


def _lock_state_dir(folder: Path) -> IO[str]:
    """Lock the state directory for this process and its jobs.

    Raises:
        SettingsError: Another server has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / "lock").open("w")
    try:
        import fcntl
    except ImportError:  # Windows: not locked
        return stream
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except OSError:
            if time.monotonic() > until:
                raise SettingsError(
                    "another server uses this state directory",
                    where=str(folder),
                    hint="--state-dir FOLDER",
                ) from None
            time.sleep(0.1)
