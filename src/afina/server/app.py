"""The FastAPI application: routes, errors in OpenAI's form, health checks, metrics."""

import difflib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import PydanticCustomError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import afina
from afina.errors import AfinaError
from afina.server.auth import require_admin
from afina.server.batches import BatchRunner
from afina.server.errors import APIError, server_fault, to_api_error
from afina.server.logs import LOG
from afina.server.middleware import ClientDisconnected, RequestMiddleware
from afina.server.paths import unknown_path, wrong_method
from afina.server.routes import (
    batches,
    chat,
    completions,
    embeddings,
    encoders,
    extensions,
    files,
    graders,
    jobs,
    models,
    responses,
)
from afina.server.state import ServerState, get_state
from afina.server.validation import describe_errors

ROUTES = (embeddings, models, files, jobs, batches, extensions)
GENERATION_ROUTES = (chat, completions, responses, graders)
MIN_FREE_BYTES = 64_000_000  # of the state directory's disk: below, files and jobs would fail


def make_app(state: ServerState, stop: Callable[[], None] = lambda: None) -> FastAPI:
    """Return the ASGI application; `stop` is called after its last request."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batches.resume()
        yield
        app.state.batches.stop()
        stop()

    app = FastAPI(
        title="afina",
        version=afina.__version__,
        lifespan=lifespan,
        dependencies=[Depends(_check_query_parameters)],
        docs_url=None,
        redoc_url=None,
    )
    app.state.afina, app.state.batches = state, BatchRunner(state, app)
    for module in ROUTES:
        app.include_router(module.router)
    for module in GENERATION_ROUTES:
        app.include_router(module.router, dependencies=[Depends(_check_generates)])
    app.include_router(encoders.router, dependencies=[Depends(_check_encodes)])
    app.add_api_route("/healthz", healthz)
    app.add_api_route("/health", healthz)
    app.add_api_route("/readyz", readyz)
    app.add_api_route("/metrics", metrics, dependencies=[Depends(require_admin)])
    app.add_middleware(RequestMiddleware, state=state)
    if state.settings.cors_origins:  # outermost: a preflight request has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-afina-adapter", "x-afina-score", "x-afina-ignored"],
        )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(PydanticCustomError, _parameter_error)
    app.add_exception_handler(AfinaError, _afina_error)
    app.add_exception_handler(OSError, _os_error)
    app.add_exception_handler(OperationalError, _database_error)
    app.add_exception_handler(Exception, _unexpected_error)
    return app


def healthz(request: Request) -> dict[str, str]:
    """Return 200 while the engine's thread runs, else 503: the server must be restarted."""
    state = get_state(request)
    if state.ready and not state.engine.alive:
        raise APIError(
            503, "the engine has stopped after an error", code="broken", retry_after=10.0
        )
    return {"status": "alive"}


def readyz(request: Request) -> JSONResponse:
    """Return 200 where engine, database and disk can be used, else 503."""
    state = get_state(request)
    if not (state.ready and state.engine.alive):
        raise APIError(503, "not ready", code="not_ready", retry_after=1.0)
    state.store.get(models.AdapterRow, "")
    if shutil.disk_usage(state.settings.state_dir).free < MIN_FREE_BYTES:
        raise APIError(503, "the disk is full", code="disk_full", retry_after=60.0)
    return JSONResponse({"status": "ready"})


def metrics(request: Request) -> Response:
    """Return all metrics for Prometheus; needs an admin key, since they name private adapters."""
    return Response(
        get_state(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


def _check_generates(request: Request) -> None:
    """Raise `APIError` 400 where the base is an encoder."""
    get_state(request).generator  # noqa: B018


def _check_encodes(request: Request) -> None:
    """Raise `APIError` 400 where the base generates text."""
    get_state(request).encoder  # noqa: B018


def _check_query_parameters(request: Request) -> None:
    """Raise `APIError` for an unknown query parameter; all paths accept Azure's api-version."""
    parameters = request.scope["route"].dependant.query_params
    known = {"api-version", *(parameter.alias for parameter in parameters)}
    for name in request.query_params:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise APIError(400, f"unknown query parameter {name[:100]!r}{hint}", name[:100])


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, APIError):
        return error.response()
    path = request.scope["path"]
    if error.status_code == 404:
        return unknown_path(request.app, path).response()
    if error.status_code == 405:
        return wrong_method(request.app, path, request.method).response()
    body = APIError(error.status_code, str(error.detail)).body
    return JSONResponse(body, error.status_code, error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    """Return the first error of a body or query."""
    assert isinstance(error, RequestValidationError)
    message, param = describe_errors(error.errors(), error.body)
    return APIError(400, message, param).response()


async def _parameter_error(request: Request, error: Exception) -> Response:
    """Return an error that depends on the base, and is therefore raised after validation."""
    assert isinstance(error, PydanticCustomError)
    return APIError(400, error.message(), (error.context or {}).get("param")).response()


async def _os_error(request: Request, error: Exception) -> Response:
    """Return 500 for a full disk or another fault of the machine, and log its cause."""
    LOG.error("request failed", exc_info=error, extra=request.scope["state"]["log"])
    what = (
        os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "input/output"
    )
    return server_fault(what.lower()).response()


async def _database_error(request: Request, error: Exception) -> Response:
    """Return 503 where the tables are locked or cannot be reached, and log the cause."""
    LOG.error("request failed", exc_info=error, extra=request.scope["state"]["log"])
    what = "the server's database is not available"
    return APIError(503, what, code="database_unavailable", retry_after=10.0).response()


async def _afina_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AfinaError)
    answer = to_api_error(error)
    if answer.status_code == 500:
        LOG.error("request failed", exc_info=error, extra=request.scope["state"]["log"])
    return answer.response()


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """Log an unexpected error with its traceback, which is not sent to the client."""
    if not isinstance(error, ClientDisconnected):
        LOG.error("request failed", exc_info=error, extra=request.scope["state"]["log"])
    return server_fault("an unexpected error").response()
