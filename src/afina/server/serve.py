"""`afina serve`: builds base, engine, store, job worker and application, and runs uvicorn."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import uvicorn

from afina.engine.engine import Engine, EngineConfig
from afina.errors import AfinaError, SettingsError
from afina.io.adapter_folder import CONFIG_FILE
from afina.io.result import Result
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.server.app import make_app
from afina.server.auth import APIKeys
from afina.server.formats import ServedFormats
from afina.server.jobs.worker import JobWorker
from afina.server.logs import LOG, set_up_logs
from afina.server.metrics import ServerMetrics
from afina.server.rate_limits import RateLimiter
from afina.server.routes.models import NAME
from afina.server.routing import ServedAdapterRouter
from afina.server.state import ServerState, served_name
from afina.server.store import AdapterRow, Store
from afina.settings import ServeSettings, make_settings

# wait for the lock on the state directory: the jobs of a killed server end after some seconds
LOCK_SECONDS = 15.0


@dataclass(frozen=True, eq=False)
class ServeResult(Result):
    """Server that has stopped: its base and how many adapters it had; nothing is printed."""

    base: str
    adapters: int


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
    set_up_logs()
    lock = _lock_state_dir(settings.state_dir)
    state = build_server(settings)
    app = make_app(state, lambda: close(state))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_keep_alive=round(settings.keep_alive),
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
        server_header=False,
    )
    state.worker.start(inherited_fds=(lock.fileno(),))
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
    # uvicorn stops at these signals, and raises them once more after it has stopped
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        uvicorn.Server(config).run()
    finally:
        close(state)
        lock.close()
    return ServeResult(base=state.base_name, adapters=count)


def build_server(settings: ServeSettings) -> ServerState:
    """Return the state of a server whose engine runs; only the network is missing."""
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
        router=ServedAdapterRouter(base, formats.base.renderer, engine.registry),
        formats=formats,
    )
    _register_adapters(state)
    engine.start()
    return state


def engine_settings(settings: ServeSettings, base: CausalLM) -> EngineConfig:
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
    )


def close(state: ServerState) -> None:
    """Stop the jobs (they resume after the next start), then the engine; only once."""
    if state.ready:
        state.ready = False
        state.worker.stop()
        state.engine.stop()
        state.store.close()
        state.tokenizer_pool.shutdown()


def _register_adapters(state: ServerState) -> None:
    """Register the adapters of the store, then those of the folders in the settings."""
    registry = state.engine.registry
    for row in state.store.query(AdapterRow):
        try:
            registry.add(row.name, Path(row.folder), row.owner)
        except AfinaError as error:  # files deleted or changed: the other adapters are served
            LOG.error("an adapter cannot be loaded", extra={"adapter": row.name, "why": str(error)})
    for root in state.settings.adapters:
        if _has_adapter(root):
            _register_folder(state, root)
            continue
        folders = [folder for folder in sorted(root.expanduser().glob("*")) if _has_adapter(folder)]
        registered = [_register_if_compatible(state, folder) for folder in folders]
        if not any(registered):
            raise SettingsError(
                "no adapter of this base in the folder",
                where=str(root),
                hint="--adapters FOLDER_OF_RUNS, or a run",
            )


def _register_folder(state: ServerState, folder: Path) -> None:
    """Register an adapter under the name of its folder, unless that name is registered already."""
    name = folder.resolve().name
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"an adapter cannot be served as {name!r}", where=str(folder), hint="rename the folder"
        )
    if state.engine.registry.get(name) is None:
        state.engine.registry.add(name, folder)


def _register_if_compatible(state: ServerState, folder: Path) -> bool:
    """Register an adapter; log one that is damaged or of another base, and return False."""
    try:
        _register_folder(state, folder)
    except AfinaError as error:
        LOG.warning("not served", extra={"adapter": folder.name, "why": str(error)})
        return False
    return True


def _has_adapter(folder: Path) -> bool:
    return any((path / CONFIG_FILE).is_file() for path in (folder, folder / "adapter"))


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
