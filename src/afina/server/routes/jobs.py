"""/v1/fine_tuning/jobs: adapters made from uploaded rows, while the server answers other requests."""

import re
import secrets
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method as delta_method
from afina.errors import SettingsError
from afina.objectives.registry import get_objective
from afina.server.auth import Principal
from afina.server.errors import APIError, not_found, to_api_error
from afina.server.jobs.process import GRADER
from afina.server.pagination import list_page, paginate
from afina.server.routes.files import Owner, find, path_of
from afina.server.routes.graders import grader_of
from afina.server.schemas import StrictRequest
from afina.server.state import ServerState, get_state
from afina.server.store import FileRow, JobCheckpoint, JobEvent, JobRow, now
from afina.settings import TrainSettings, job_settings, make_settings, settings_groups
from afina.training.setup.set_up import default_learning_rate

router = APIRouter()
# by how a job learns -> its objective; `auto` where the rows decide
JOB_OBJECTIVES = {"supervised": "auto", "dpo": "dpo", "reinforcement": "grpo"}
METHODS = tuple(JOB_OBJECTIVES)
Limit = Annotated[int, Query(ge=1, le=1000)]
Auto = Literal["auto"]


class Strict(BaseModel):
    """No name that is not known."""

    model_config = ConfigDict(extra="forbid")


class Hyperparameters(Strict):
    """OpenAI's three: rows a step, a factor on the learning rate, times to go over the rows."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] | None = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0.0, le=1e4)] = "auto"


class Supervised(Strict):
    """Learning the answers of the rows."""

    hyperparameters: Hyperparameters = Hyperparameters()


class PreferenceParameters(Hyperparameters):
    """The same, and how closely the adapter is held to the base."""

    beta: Auto | Annotated[float, Field(gt=0.0, le=2.0)] = "auto"


class DPOMethod(Strict):
    """Preferring the better of two answers (direct preference optimization)."""

    hyperparameters: PreferenceParameters = PreferenceParameters()


class ReinforcementParameters(Hyperparameters):
    """The same, where a batch is prompts; how many answers each of them gets (8 times the multiplier), and how often it is
    judged. Every held-out prompt is answered once, as likely as can be."""

    compute_multiplier: Auto | Annotated[float, Field(ge=0.25, le=8.0)] = "auto"
    eval_interval: Auto | Annotated[int, Field(ge=1)] = "auto"
    eval_samples: Auto | Literal[1] = "auto"
    reasoning_effort: Literal["default"] | None = None


class ReinforcementMethod(Strict):
    """Learning from answers of its own, which a grader judges."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementParameters = ReinforcementParameters()
    response_format: Annotated[Any, Field(description="not here: answers are written freely")] = (
        None
    )

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: Any) -> Any:
        """No hyperparameters are none that are told."""
        dropped = {"hyperparameters", "response_format"} if isinstance(values, Mapping) else set()
        return (
            {k: v for k, v in values.items() if v is not None or k not in dropped}
            if dropped
            else values
        )

    @field_validator("response_format")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if value != {"type": "text"}:
            message = "response_format: answers are written freely here; a grader may ask for sample.output_json"
            raise PydanticCustomError("response_format", message)
        return value


class Method(Strict):
    """How to learn: from answers, from pairs of a better and a worse one, or from answers of its own that are judged."""

    type: str = "supervised"
    supervised: Supervised | None = None
    dpo: DPOMethod | None = None
    reinforcement: ReinforcementMethod | None = None

    @field_validator("type")
    @classmethod
    def _is_there(cls, value: str) -> str:
        if value not in METHODS:
            message = "method: this server's jobs learn by {known}, not by {how}"
            raise PydanticCustomError(
                "method", message, {"known": ", ".join(METHODS), "how": value[:50]}
            )
        return value

    @model_validator(mode="after")
    def _only_one(self) -> "Method":
        if any(getattr(self, name) is not None for name in METHODS if name != self.type):
            raise PydanticCustomError(
                "method",
                "method: what is set for another method than {type} is read by nobody",
                {"type": self.type},
            )
        if self.type == "reinforcement" and self.reinforcement is None:
            raise PydanticCustomError(
                "method", "method.reinforcement: a grader says what a good answer is"
            )
        return self

    @property
    def to_response(self) -> Hyperparameters:
        """The hyperparameters of the method that it is."""
        if self.reinforcement is not None:
            return self.reinforcement.hyperparameters
        return (
            (self.dpo or DPOMethod()).hyperparameters
            if self.type == "dpo"
            else (self.supervised or Supervised()).hyperparameters
        )


class CreateJobRequest(StrictRequest):
    """POST /v1/fine_tuning/jobs. `afina` has settings of `afina train`: method, rank, steps, learning_rate, ..."""

    model: str = Field(max_length=1000)
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = Field(
        None, description="the older place of method.supervised.hyperparameters"
    )
    method: Method = Method()
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    seed: int | None = Field(None, ge=0, lt=2**31)
    metadata: dict[str, Annotated[str, Field(max_length=512)]] = Field({}, max_length=16)
    integrations: list[Any] | None = Field(None, max_length=0)
    afina: dict[str, Any] = {}


@router.post("/v1/fine_tuning/jobs")
def create(body: CreateJobRequest, request: Request, caller: Owner) -> dict[str, Any]:
    """Queue a job; its adapter belongs to the caller."""
    state = get_state(request)
    if body.model != state.base_name:
        raise APIError(
            400,
            f"adapters are made for the base, which is {state.base_name!r} here",
            "model",
            "model_not_found",
        )
    training = find(state, caller, body.training_file)
    validation = find(state, caller, body.validation_file) if body.validation_file else None
    name, seed = (
        f"ftjob-{uuid.uuid4().hex}",
        secrets.randbits(31) if body.seed is None else body.seed,
    )
    told = body.method.to_response if body.hyperparameters is None else body.hyperparameters
    how = body.method.type
    if how == "dpo" and isinstance(told.batch_size, int):
        raise APIError(
            400,
            "batch_size: pairs are batched by tokens here; leave it auto, or set batch_tokens in afina",
            "method",
        )
    reward: dict[str, Any] = {}
    if body.method.reinforcement is not None:
        grader = grader_of(state, body.method.reinforcement.grader, "method.reinforcement.grader")
        file = state.settings.state_dir.resolve() / "jobs" / name / GRADER
        reward = {"reward_funcs": str(file)}
        reward |= {"allow_python_graders": True} if grader.is_code else {}
    settings = _settings(state, body, told, training, validation, seed, reward)
    own = {
        "told": told.model_dump(mode="json"),
        "settings": settings,
        "batch_size": told.batch_size
        if isinstance(told.batch_size, int) and how == "supervised"
        else None,
    }
    job = JobRow(
        id=name,
        owner=caller.name,
        request=body.model_dump(mode="json") | own,
        training_file=training.id,
        validation_file=validation.id if validation else None,
        seed=seed,
        model=f"ft:{state.base_name.rpartition('/')[2]}:afina:{body.suffix or ''}:{name[6:14]}",
    )
    state.store.add(job)
    state.worker.add_event(job.id, f"Created fine-tuning job: {job.id}")
    state.worker.wake()
    return to_response(job)


def _settings(
    state: ServerState,
    body: CreateJobRequest,
    told: Hyperparameters,
    training: FileRow,
    validation: FileRow | None,
    seed: int,
    reward: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings of `afina train` that a job means; `reward` are those of its grader.

    Raises:
        APIError: A setting is unknown, does not fit, or may not be set by a job.
    """
    _check_names(body.afina)
    serve = state.settings
    values: dict[str, Any] = {
        "base": serve.base,
        "revision": serve.revision,
        "trust_remote_code": serve.trust_remote_code,
        "dtype": serve.dtype,
        "device": serve.device,
        "chat_template": serve.chat_template,
        "template_kwargs": serve.template_kwargs,
        "allow_control_tokens": serve.allow_control_tokens,
        "seed": seed,
        "data": str(path_of(state, training).resolve()),
    }
    if validation is not None:
        values["eval_data"] = str(path_of(state, validation).resolve())
    if told.n_epochs != "auto":
        values["num_train_epochs"] = told.n_epochs
    if body.method.type != "supervised":
        values["objective"] = JOB_OBJECTIVES[body.method.type]
    if told.learning_rate_multiplier != "auto":  # a multiplier of 1 is what afina takes by itself
        values["learning_rate"] = default_learning_rate(
            "lora", get_objective(values.get("objective", "sft"))
        ) * float(told.learning_rate_multiplier)
    if isinstance(told, ReinforcementParameters) and told.eval_interval != "auto":
        values["eval_steps"] = told.eval_interval
    values |= body.afina
    objective = JOB_OBJECTIVES[body.method.type]
    group = dict(reward)
    if isinstance(told, PreferenceParameters) and told.beta != "auto":
        group["beta"] = told.beta
    if isinstance(told, ReinforcementParameters):
        group |= _answers_per_step(told)
    if group:
        values[objective] = group | body.afina.get(objective, {})
    method = str(values.get("method", "lora"))
    if serve.quantization == "nf4" and not method.startswith("q"):
        values["method"] = f"q{method}"

    def check() -> None:
        settings = make_settings(TrainSettings, values)
        if delta_method(get_preset(settings.method, 1).method).replaces_base:
            raise SettingsError(
                f"{settings.method} makes a whole model, and no adapter", hint="lora, dora or mora"
            )

    _check(check)
    return values


def _check_names(values: Mapping[str, Any]) -> None:
    """Raise `APIError` where a setting is none that a job may set (see `job` in settings/common)."""
    allowed = job_settings(TrainSettings)
    for name, value in values.items():
        if name in allowed:
            continue
        if name not in settings_groups:
            raise _not_for_jobs(name, allowed)
        if not isinstance(value, Mapping):
            raise APIError(400, f"{name}: expected names with values", "afina")
        own = job_settings(settings_groups.get(name))
        if unknown := sorted(set(value) - set(own)):
            raise _not_for_jobs(f"{name}.{unknown[0]}", own)


def _not_for_jobs(name: str, allowed: list[str]) -> APIError:
    what = f"afina: {name!r} cannot be set for a job; what can: {', '.join(allowed) or 'none'}"
    return APIError(400, what, "afina")


def _check(check: Callable[[], Any]) -> None:
    """Raise `Refusal` where `check` raises `SettingsError`."""
    try:
        check()
    except SettingsError as error:
        raise to_api_error(error, "afina") from None


def _answers_per_step(told: ReinforcementParameters) -> dict[str, Any]:
    """Return the settings that determine how many answers are sampled per step."""
    prompts = {} if told.batch_size in ("auto", None) else {"prompts_per_step": told.batch_size}
    if told.compute_multiplier == "auto":
        return prompts
    return prompts | {"num_generations": max(2, round(8 * float(told.compute_multiplier)))}


@router.get("/v1/fine_tuning/jobs")
def list_jobs(
    request: Request, caller: Owner, limit: Limit = 20, after: str | None = None
) -> dict[str, Any]:
    """The caller's jobs, newest first."""
    return paginate(get_state(request).store, caller, JobRow, to_response, limit, after)


@router.get("/v1/fine_tuning/jobs/{job_id}")
def get_job(job_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """One job."""
    return to_response(_find(get_state(request), caller, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
def cancel(job_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """End a job for good."""
    return _move(request, caller, job_id, ("queued", "running", "paused"), "cancelled")


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
def pause(job_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Stop a job at its last checkpoint."""
    return _move(request, caller, job_id, ("queued", "running"), "paused")


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
def resume(job_id: str, request: Request, caller: Owner) -> dict[str, Any]:
    """Let a paused job go on from there."""
    return _move(request, caller, job_id, ("paused",), "queued")


def _move(
    request: Request, caller: Principal, name: str, of: tuple[str, ...], status: str
) -> dict[str, Any]:
    state = get_state(request)
    job = _find(state, caller, name)
    if not state.store.transition(
        job.id, of, status=status, finished=now() if status == "cancelled" else None
    ):
        raise APIError(
            409,
            f"a job that is {_find(state, caller, name).status} cannot be made {status}",
            code="wrong_status",
        )
    state.worker.add_event(
        job.id,
        {"cancelled": "The job was cancelled", "paused": "The job was paused"}.get(
            status, "The job goes on"
        ),
    )
    if status == "cancelled":
        state.metrics.jobs.labels("cancelled").inc()
    state.worker.wake()
    return to_response(_find(state, caller, name))


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
def events(
    job_id: str, request: Request, caller: Owner, limit: Limit = 20, after: str | None = None
) -> dict[str, Any]:
    """What happened to a job, the latest first."""
    store, job = get_state(request).store, _find(get_state(request), caller, job_id)
    where = [JobEvent.job == job.id]
    if after is not None:
        number = after.removeprefix("ftevent-")
        if not re.fullmatch(r"[0-9]{1,18}", number):
            raise not_found("event", after)
        where.append(JobEvent.number < int(number))
    rows = store.query(JobEvent, *where, order=[JobEvent.number.desc()], limit=limit + 1)
    told = [
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
    return list_page(told, limit)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
def checkpoints(
    job_id: str, request: Request, caller: Owner, limit: Limit = 10, after: str | None = None
) -> dict[str, Any]:
    """The adapters that a job has kept on its way; each answers under its own name."""
    store, job = get_state(request).store, _find(get_state(request), caller, job_id)
    where = [JobCheckpoint.job == job.id]
    if after is not None:
        last = store.get(JobCheckpoint, f"{job.model}:ckpt-step-{after.rpartition('-')[2]}")
        if last is None:
            raise not_found("checkpoint", after)
        where.append(JobCheckpoint.step < last.step)
    rows = store.query(JobCheckpoint, *where, order=[JobCheckpoint.step.desc()], limit=limit + 1)
    told = [
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
    return list_page(told, limit)


def _find(state: ServerState, caller: Principal, name: str) -> JobRow:
    job = state.store.get(JobRow, name)
    if job is None or not caller.can_see(job.owner):
        raise not_found("job", name)
    return job


def to_response(job: JobRow) -> dict[str, Any]:
    """A job as OpenAI's API tells of it."""
    asked = job.request
    told, how = asked["told"], asked["method"]["type"]
    shared = {name: value for name, value in told.items() if name in Hyperparameters.model_fields}
    grader = {"grader": asked["method"][how]["grader"]} if how == "reinforcement" else {}
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "model": asked["model"],
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
        "method": {"type": how, how: {"hyperparameters": told, **grader}},
        "metadata": asked["metadata"],
    }
