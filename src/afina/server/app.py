"""The FastAPI application: routes, errors in OpenAI's form, health checks, metrics."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

import afina
from afina.errors import AfinaError
from afina.server.auth import require_admin
from afina.server.errors import APIError, to_api_error
from afina.server.logs import LOG
from afina.server.middleware import ClientDisconnected, RequestMiddleware
from afina.server.routes import chat, completions, embeddings, files, graders, jobs, models
from afina.server.state import ServerState, get_state


def make_app(state: ServerState, stop: Callable[[], None] = lambda: None) -> FastAPI:
    """Return the ASGI application; `stop` is called after its last request."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        stop()

    app = FastAPI(
        title="afina",
        version=afina.__version__,
        lifespan=lifespan,
        dependencies=[Depends(_check_query_parameters)],
        docs_url=None,
        redoc_url=None,
    )
    app.state.afina = state
    for module in (chat, completions, embeddings, models, files, jobs, graders):
        app.include_router(module.router)
    app.add_api_route("/healthz", healthz)
    app.add_api_route("/readyz", readyz)
    app.add_api_route("/metrics", metrics, dependencies=[Depends(require_admin)])
    app.add_middleware(RequestMiddleware, state=state)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(PydanticCustomError, _parameter_error)
    app.add_exception_handler(AfinaError, _afina_error)
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
    """Return 200 where engine and database can be used, else 503."""
    state = get_state(request)
    if not (state.ready and state.engine.alive):
        raise APIError(503, "not ready", code="not_ready", retry_after=1.0)
    state.store.get(models.AdapterRow, "")
    return JSONResponse({"status": "ready"})


def metrics(request: Request) -> Response:
    """Return all metrics for Prometheus; needs an admin key, since they name private adapters."""
    return Response(
        get_state(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


def _check_query_parameters(request: Request) -> None:
    """Raise `APIError` for an unknown query parameter; Azure's api-version is accepted on all paths."""
    parameters = request.scope["route"].dependant.query_params
    known = {"api-version", *(parameter.alias for parameter in parameters)}
    for name in request.query_params:
        if name not in known:
            raise APIError(400, f"unknown query parameter {name!r}", name)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, APIError):
        return error.response()
    body = APIError(error.status_code, str(error.detail)).body
    return JSONResponse(body, error.status_code, error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    """Return the first error of a body or query."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        message = f"unknown parameter {param!r}"
    elif first["type"] in ("missing", "json_invalid") or ":" not in message:
        message = f"{param}: {message}"
    return APIError(400, message, param).response()


async def _parameter_error(request: Request, error: Exception) -> Response:
    return APIError(400, str(error)).response()


async def _afina_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AfinaError)
    return to_api_error(error).response()


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """Log an unexpected error with its traceback, which is not sent to the client."""
    if not isinstance(error, ClientDisconnected):
        LOG.error("request failed", exc_info=error, extra=request.scope["state"]["log"])
    return APIError(500, "the server failed; see its log").response()
