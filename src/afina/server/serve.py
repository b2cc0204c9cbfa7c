"""`afina serve`: settings into base, engine, tables, worker and application; then uvicorn, until it is told to stop."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import uvicorn

from afina.data.renderer import Renderer
from afina.engine.engine import Engine, EngineConfig
from afina.errors import AfinaError, SettingsError
from afina.io.adapter_folder import CONFIG_FILE
from afina.io.result import Result
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.server.app import make_app
from afina.server.auth import APIKeys
from afina.server.jobs.worker import JobWorker
from afina.server.logs import LOG, set_up_logs
from afina.server.metrics import ServerMetrics
from afina.server.rate_limits import RateLimiter
from afina.server.routes.models import NAME
from afina.server.routing import ServedAdapterRouter
from afina.server.state import ServerState, served_name
from afina.server.store import AdapterRow, Store
from afina.settings import ServeSettings, make_settings

LOCK_SECONDS = 15.0  # a killed server's jobs take a moment to see that it is gone


@dataclass(frozen=True, eq=False)
class ServeResult(Result):
    """Server that has stopped: its base and how many adapters it had; nothing is printed."""

    base: str
    adapters: int


def serve(settings: ServeSettings | None = None, **values: Any) -> ServeResult:
    """Serve until SIGTERM or Ctrl-C; running requests are then given `drain` seconds."""
    settings = settings or make_settings(ServeSettings, values)
    set_up_logs()
    lock = _take(settings.state_dir)
    state = build_server(settings)
    state.inherited_fds = (lock.fileno(),)
    app = make_app(state, lambda: close(state))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
        server_header=False,
    )
    state.worker.start(state)
    count = len(state.engine.registry.list_adapters())
    LOG.info(
        "serving",
        extra={
            "base": state.base_name,
            "host": settings.host,
            "port": settings.port,
            "adapters": count,
        },
    )
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # uvicorn stops at these, and sends them once more when it has
        signal.signal(number, lambda *_: None)
    try:
        uvicorn.Server(config).run()
    finally:
        close(state)
        lock.close()
    return ServeResult(base=state.base_name, adapters=count)


def build_server(settings: ServeSettings) -> ServerState:
    """Everything but the network; the engine is running."""
    base = load_base(
        settings.base,
        settings.revision,
        settings.trust_remote_code,
        settings.dtype,
        settings.device,
        settings.quantization,
    )
    engine = Engine(base, engine_settings(settings, base))
    name = served_name(settings.base)
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    store = Store(
        settings.database_url or f"sqlite:///{(settings.state_dir / 'state.db').resolve()}"
    )
    state = ServerState(
        settings=settings,
        engine=engine,
        renderer=(renderer := Renderer(base.tokenizer, settings.chat_template, base.max_positions)),
        store=store,
        keys=APIKeys(settings),
        limits=RateLimiter(settings.max_requests_per_key, settings.max_tokens_per_minute),
        metrics=ServerMetrics(engine, name),
        worker=JobWorker(settings, store),
        choosing=ServedAdapterRouter(base, renderer, engine.registry),
    )
    _fill(state)
    engine.start()
    return state


def engine_settings(settings: ServeSettings, base: CausalLM) -> EngineConfig:
    """How much the engine takes. What adapters need of the host's memory before a GPU's is a quarter as much."""
    size = round(settings.memory_gb * 1e9)
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    host = 0 if base.device.type == "cpu" else size // 4
    merged = 4 * weights if settings.merge_hot_adapter else 0
    return EngineConfig(
        pool_bytes=size,
        host_cache_bytes=host,
        merged_weights_bytes=merged,
        require_audit=settings.require_audit,
    )


def close(state: ServerState) -> None:
    """End jobs (they go on after the next start), then the engine; once."""
    if state.ready:
        state.ready = False
        state.worker.stop()
        state.engine.stop()
        state.store.close()
        state.tokenizer_pool.shutdown()


def _fill(state: ServerState) -> None:
    """Adapters as they were when the server stopped, then those of the folders that it was given."""
    shelf = state.engine.registry
    for row in state.store.query(AdapterRow):
        try:
            shelf.add(row.name, Path(row.folder), row.owner)
        except AfinaError as error:  # its files are gone or changed: the others answer all the same
            LOG.error("an adapter cannot be loaded", extra={"adapter": row.name, "why": str(error)})
    for root in state.settings.adapters:
        if _holds_adapter(root):
            _place(state, root)
        elif not sum(
            [
                _fits(state, folder)
                for folder in sorted(root.expanduser().glob("*"))
                if _holds_adapter(folder)
            ]
        ):
            raise SettingsError(
                "no adapter of this base in the folder",
                where=str(root),
                hint="--adapters FOLDER_OF_RUNS, or a run",
            )


def _place(state: ServerState, folder: Path) -> None:
    """Serve one adapter under the name of its folder, unless that name is taken from before."""
    name = folder.resolve().name
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"an adapter cannot be served as {name!r}", where=str(folder), hint="rename the folder"
        )
    if state.engine.registry.get(name) is None:
        state.engine.registry.add(name, folder)


def _fits(state: ServerState, folder: Path) -> bool:
    """Serve one of a folder's adapters; one that is for another base, or damaged, is left out, and said."""
    try:
        _place(state, folder)
    except AfinaError as error:
        LOG.warning("not served", extra={"adapter": folder.name, "why": str(error)})
        return False
    return True


def _holds_adapter(folder: Path) -> bool:
    return any((place / CONFIG_FILE).is_file() for place in (folder, folder / "adapter"))


def _take(folder: Path) -> IO[str]:
    """Lock the state folder for this process and the jobs that it begins; raises `SettingsError` where another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / "lock").open("w")
    try:
        import fcntl
    except ImportError:  # Windows: nobody checks
        return stream
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except OSError:
            if time.monotonic() > until:
                raise SettingsError(
                    "another server uses this folder", where=str(folder), hint="--state FOLDER"
                ) from None
            time.sleep(0.1)
