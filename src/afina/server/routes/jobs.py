"""/v1/fine_tuning/jobs: adapters trained on uploaded rows, while the server answers requests."""

import re
import secrets
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from sqlalchemy.exc import IntegrityError

from afina.server.auth import Principal
from afina.server.errors import APIError, not_found
from afina.server.jobs.process import GRADER
from afina.server.jobs.requests import CreateJobRequest, Hyperparameters
from afina.server.jobs.settings import train_settings
from afina.server.jobs.worker import event_of
from afina.server.pagination import list_page, paginate
from afina.server.routes.files import Owner, find
from afina.server.routes.graders import grader_of
from afina.server.state import ServerState, get_state
from afina.server.store import JobCheckpoint, JobEvent, JobRow, now

router = APIRouter()
Limit = Annotated[int, Query(ge=1, le=1000)]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]
MOVED_EVENTS = {
    "cancelled": "The job was cancelled",
    "paused": "The job was paused",
    "queued": "The job was resumed",
}


@router.post("/v1/fine_tuning/jobs")
def create(
    body: CreateJobRequest, request: Request, caller: Owner, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    """Queue a job; its adapter belongs to the caller.

    The same request with the same Idempotency-Key returns the same job.
    """
    state, key = get_state(request), idempotency_key
    known = _known_job(state, caller, body, key)
    if known is not None:
        return to_response(known)
    _check_count(state, caller)
    if body.method.type != "supervised":
        state.generator  # noqa: B018  # raises on an encoder, which has no answers
    if body.model != state.base_name:
        what = f"jobs train adapters of the base, which is {state.base_name!r}"
        raise APIError(400, what, "model", "model_not_found")
    training = find(state, caller, body.training_file, "training_file")
    validation = None
    if body.validation_file:
        validation = find(state, caller, body.validation_file, "validation_file")
    name = f"ftjob-{uuid.uuid4().hex}"
    seed = secrets.randbits(31) if body.seed is None else body.seed
    given = body.hyperparameters or body.method.hyperparameters
    method = body.method.type
    if method == "dpo" and isinstance(given.batch_size, int):
        raise _no_batch_size("pairs", "method.dpo.hyperparameters.batch_size")
    if state.is_encoder and isinstance(given.batch_size, int):
        raise _no_batch_size("texts of an encoder", "hyperparameters.batch_size")
    reward: dict[str, Any] = {}
    if body.method.reinforcement is not None:
        grader = grader_of(state, body.method.reinforcement.grader, "method.reinforcement.grader")
        file = state.settings.state_dir.resolve() / "jobs" / name / GRADER
        reward = {"reward_funcs": str(file)}
        reward |= {"allow_python_graders": True} if grader.is_code else {}
    settings = train_settings(state, body, given, training, validation, seed, reward)
    has_batch_size = isinstance(given.batch_size, int) and method == "supervised"
    own = {
        "told": given.model_dump(mode="json"),
        "settings": settings,
        "batch_size": given.batch_size if has_batch_size else None,
    }
    job = JobRow(
        id=name,
        owner=caller.name,
        request=body.model_dump(mode="json") | own,
        training_file=training.id,
        validation_file=validation.id if validation else None,
        seed=seed,
        idempotency_key=key,
        model=f"ft:{state.base_name.rpartition('/')[2]}:afina:{body.suffix or ''}:{name[6:14]}",
    )
    try:
        state.store.add(job, event_of(job.id, f"Created fine-tuning job: {job.id}"))
    except IntegrityError:  # the same request, sent twice at once
        if (known := _known_job(state, caller, body, key)) is None:
            raise
        return to_response(known)
    state.worker.wake()
    return to_response(job)


def _no_batch_size(rows: str, param: str) -> APIError:
    what = f"batch_size: {rows} are batched by tokens; use auto, or afina.max_tokens_per_batch"
    return APIError(400, what, param)


def _known_job(
    state: ServerState, caller: Principal, body: CreateJobRequest, key: str | None
) -> JobRow | None:
    """Return the job that a request with this idempotency key has created, or None.

    Raises:
        APIError: 409 where that request was another one.
    """
    if key is None:
        return None
    found = state.store.query(JobRow, JobRow.owner == caller.name, JobRow.idempotency_key == key)
    if not found:
        return None
    sent = body.model_dump(mode="json")
    if any(found[0].request.get(name) != value for name, value in sent.items()):
        what = "the Idempotency-Key was sent with another request before"
        raise APIError(409, what, "Idempotency-Key", "idempotency_key_reused")
    return found[0]


def _check_count(state: ServerState, caller: Principal) -> None:
    """Raise `APIError` 429 where the caller has too many jobs."""
    limit = state.settings.max_jobs_per_key
    if state.store.num_unfinished(caller.name) >= limit:
        what = f"{limit} jobs of this key have not ended: wait, or cancel one"
        raise APIError(429, what, code="too_many_jobs", retry_after=60.0)


@router.get("/v1/fine_tuning/jobs")
def list_jobs(
    request: Request, caller: Owner, limit: Limit = 20, after: str | None = None
) -> dict[str, Any]:
    """Return the caller's jobs, newest first."""
    return paginate(get_state(request).store, caller, JobRow, to_response, limit, after)


@router.get("/v1/fine_tuning/jobs/{job_id}")
def get_job(job_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Return one job."""
    return to_response(_find(get_state(request), caller, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
def cancel(job_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Cancel a job."""
    return _move(request, caller, job_id, ("queued", "running", "paused"), "cancelled")


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
def pause(job_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Stop a job at its last checkpoint."""
    return _move(request, caller, job_id, ("queued", "running"), "paused")


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
def resume(job_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Resume a paused job from its last checkpoint."""
    return _move(request, caller, job_id, ("paused",), "queued")


def _move(
    request: Request, caller: Principal, name: str, of: tuple[str, ...], status: str
) -> dict[str, Any]:
    state = get_state(request)
    job = _find(state, caller, name)
    finished = now() if status == "cancelled" else None
    event = event_of(job.id, MOVED_EVENTS[status])
    if not state.store.transition(job.id, of, event, status=status, finished=finished):
        current = _find(state, caller, name).status
        what = f"a job that is {current} cannot become {status}"
        raise APIError(409, what, code="wrong_status")
    if status == "cancelled":
        state.metrics.jobs.labels("cancelled").inc()
    state.worker.wake()
    return to_response(_find(state, caller, name))


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
def events(
    job_id: str, request: Request, caller: Owner, limit: Limit = 20, after: str | None = None
) -> dict[str, Any]:
    """Return the events of a job, newest first."""
    store, job = get_state(request).store, _find(get_state(request), caller, job_id)
    where = [JobEvent.job == job.id]
    if after is not None:
        number = after.removeprefix("ftevent-")
        if not re.fullmatch(r"[0-9]{1,18}", number):
            raise not_found("event", after)
        where.append(JobEvent.number < int(number))
    rows = store.query(JobEvent, *where, order=[JobEvent.number.desc()], limit=limit + 1)
    data = [
        {
            "object": "fine_tuning.job.event",
            "id": f"ftevent-{row.number}",
            "created_at": row.created,
            "level": row.level,
            "message": row.message,
            "type": "metrics" if "train_loss" in row.data else "message",
            "data": row.data,
        }
        for row in rows
    ]
    return list_page(data, limit)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
def checkpoints(
    job_id: str, request: Request, caller: Owner, limit: Limit = 10, after: str | None = None
) -> dict[str, Any]:
    """Return the checkpoints of a job, newest first; each is served under its own name."""
    store, job = get_state(request).store, _find(get_state(request), caller, job_id)
    where = [JobCheckpoint.job == job.id]
    if after is not None:
        last = store.get(JobCheckpoint, f"{job.model}:ckpt-step-{after.rpartition('-')[2]}")
        if last is None:
            raise not_found("checkpoint", after)
        where.append(JobCheckpoint.step < last.step)
    rows = store.query(JobCheckpoint, *where, order=[JobCheckpoint.step.desc()], limit=limit + 1)
    data = [
        {
            "object": "fine_tuning.job.checkpoint",
            "id": f"ftckpt-{job.id[6:]}-{row.step}",
            "created_at": row.created,
            "fine_tuned_model_checkpoint": row.model,
            "step_number": row.step,
            "metrics": row.metrics,
            "fine_tuning_job_id": job.id,
        }
        for row in rows
    ]
    return list_page(data, limit)


def _find(state: ServerState, caller: Principal, name: str) -> JobRow:
    job = state.store.get(JobRow, name)
    if job is None or not caller.can_see(job.owner):
        raise not_found("job", name)
    return job


def to_response(job: JobRow) -> dict[str, Any]:
    """Return the response object of a job, as in OpenAI's API."""
    body = job.request
    given, method = body["told"], body["method"]["type"]
    shared = {name: value for name, value in given.items() if name in Hyperparameters.model_fields}
    grader = {"grader": body["method"][method]["grader"]} if method == "reinforcement" else {}
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "model": body["model"],
        "created_at": job.created,
        "finished_at": job.finished,
        "fine_tuned_model": job.model if job.status == "succeeded" else None,
        "organization_id": job.owner or "public",
        "result_files": [],
        "status": job.status,
        "error": job.error,
        "validation_file": job.validation_file,
        "training_file": job.training_file,
        "hyperparameters": shared,
        "trained_tokens": job.tokens,
        "seed": job.seed,
        "estimated_finish": None,
        "integrations": [],
        "method": {"type": method, method: {"hyperparameters": given, **grader}},
        "metadata": body["metadata"],
    }
