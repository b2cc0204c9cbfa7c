"""Errors of paths: what is closest to an unknown one, and what OpenAI's API has besides."""

import difflib
import re

from fastapi import FastAPI

from afina.server.errors import APIError

# first segments of OpenAI's paths that this server does not have
NOT_OFFERED = {
    "assistants": "assistants",
    "audio": "speech and transcription",
    "chatkit": "ChatKit",
    "containers": "containers",
    "conversations": "stored conversations",
    "evals": "evaluations",
    "images": "images",
    "moderations": "moderation",
    "organization": "administration of an organization",
    "realtime": "the realtime API",
    "rerank": "reranking",
    "score": "scoring of pairs",
    "skills": "skills",
    "threads": "threads",
    "uploads": "uploads in parts: use /v1/files",
    "vector_stores": "vector stores",
    "videos": "videos",
}


def route_methods(app: FastAPI) -> dict[str, set[str]]:
    """Return the methods of each path that the description of the API has."""
    paths: dict[str, dict[str, object]] = app.openapi()["paths"]
    return {path: {method.upper() for method in methods} for path, methods in paths.items()}


def unknown_path(app: FastAPI, path: str) -> APIError:
    """Return the 404 error of a path without a route."""
    segments = [part for part in path.split("/") if part and part != "v1"]
    if segments and segments[0] in NOT_OFFERED:
        what = f"{path} does not exist: this server does not offer {NOT_OFFERED[segments[0]]}"
        return APIError(404, what, code="path_not_found")
    if segments[:1] == ["responses"]:
        what = f"{path} does not exist: responses are not stored"
        return APIError(404, what, code="path_not_found")
    known = list(route_methods(app))
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not close and f"/v1{path}" in known:
        close = [f"/v1{path}"]
    hint = f"did you mean {close[0]}?" if close else "/docs lists what exists"
    return APIError(404, f"{path[:200]} does not exist; {hint}", code="path_not_found")


def wrong_method(app: FastAPI, path: str, method: str) -> APIError:
    """Return the 405 error of a path that has other methods."""
    allowed: set[str] = set()
    for route, methods in route_methods(app).items():
        if re.fullmatch(re.sub(r"\{.+?\}", ".+", route), path):
            allowed |= methods
    text = ", ".join(sorted(allowed))
    error = APIError(405, f"{method} is not allowed on {path[:200]}; allowed: {text}")
    error.headers = {**(error.headers or {}), "allow": text}
    return error
