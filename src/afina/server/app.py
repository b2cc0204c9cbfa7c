"""The application: routes, errors in OpenAI's form, and what a balancer and Prometheus ask."""

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
from afina.server.routes import chat, completions, embeddings, files, jobs, models
from afina.server.routes import graders as grading
from afina.server.state import ServerState, get_state


def make_app(state: ServerState, stop: Callable[[], None] = lambda: None) -> FastAPI:
    """The whole server, for uvicorn; `stop` is called when it has taken its last request."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        stop()

    app = FastAPI(
        title="afina",
        version=afina.__version__,
        lifespan=lifespan,
        dependencies=[Depends(_known_queries)],
        docs_url=None,
        redoc_url=None,
    )
    app.state.afina = state
    for part in (chat, completions, embeddings, models, files, jobs, grading):
        app.include_router(part.router)
    app.add_api_route("/healthz", healthz)
    app.add_api_route("/readyz", readyz)
    app.add_api_route("/metrics", metrics, dependencies=[Depends(require_admin)])
    app.add_middleware(RequestMiddleware, state=state)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(PydanticCustomError, _custom)
    app.add_exception_handler(AfinaError, _afina)
    app.add_exception_handler(Exception, _broken)
    return app


def healthz(request: Request) -> dict[str, str]:
    """The process lives, and so does the engine's thread; if not, only another start helps."""
    state = get_state(request)
    if state.ready and not state.engine.alive:
        raise APIError(503, "the engine has broken", code="broken", retry_after=10.0)
    return {"status": "alive"}


def readyz(request: Request) -> JSONResponse:
    """The engine answers, and the tables too."""
    state = get_state(request)
    if not (state.ready and state.engine.alive):
        raise APIError(503, "not ready", code="not_ready", retry_after=1.0)
    state.store.get(models.AdapterRow, "")
    return JSONResponse({"status": "ready"})


def metrics(request: Request) -> Response:
    """All figures, for Prometheus; names of private adapters are among them, and so it takes an admin key."""
    return Response(
        get_state(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


def _known_queries(request: Request) -> None:
    """Refuse a query that nobody reads; api-version is Azure's, and there is one version of this."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params} | {
        "api-version"
    }
    for name in request.query_params:
        if name not in known:
            raise APIError(400, f"unknown query parameter {name!r}", name)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, APIError):
        return error.response()
    refusal = APIError(error.status_code, str(error.detail))
    return JSONResponse(refusal.body, error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """A body or a query that is not what was asked for: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        message = f"unknown parameter {place!r}"
    elif first["type"] in ("missing", "json_invalid") or ":" not in message:
        message = f"{place}: {message}"
    return APIError(400, message, place).response()


async def _custom(request: Request, error: Exception) -> Response:
    return APIError(400, str(error)).response()


async def _afina(request: Request, error: Exception) -> Response:
    assert isinstance(error, AfinaError)
    return to_api_error(error).response()


async def _broken(request: Request, error: Exception) -> Response:
    """Something that we did not think of: into the log, with its trace; the client learns nothing of it."""
    if not isinstance(error, ClientDisconnected):
        LOG.error("failed", exc_info=error, extra=request.scope["state"]["log"])
    return APIError(500, "the server failed; its log says why").response()
