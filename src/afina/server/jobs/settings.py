"""Settings of `afina train` that a job's request stands for."""

from collections.abc import Callable, Mapping
from typing import Any

from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method
from afina.errors import SettingsError
from afina.objectives.registry import get_objective
from afina.server.errors import APIError, to_api_error
from afina.server.jobs.limits import check_job_limits
from afina.server.jobs.requests import (
    DECODER_OBJECTIVES,
    ENCODER_OBJECTIVES,
    JOB_OBJECTIVES,
    CreateJobRequest,
    Hyperparameters,
    PreferenceParameters,
    ReinforcementParameters,
)
from afina.server.routes.files import path_of
from afina.server.state import ServerState
from afina.server.store import FileRow
from afina.settings import (
    TrainSettings,
    job_settings,
    make_settings,
    settings_groups,
)
from afina.settings.common import CHAT_SETTINGS, MODEL_SETTINGS
from afina.training.setup.set_up import default_learning_rate


def train_settings(
    state: ServerState,
    body: CreateJobRequest,
    hyperparameters: Hyperparameters,
    training: FileRow,
    validation: FileRow | None,
    seed: int,
    reward: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings of a job.

    Args:
        reward: settings of its grader.

    Raises:
        APIError: a setting is unknown, out of its range, or may not be set by a job.
    """
    _check_names(body.afina)
    check_job_limits(body.afina)
    serve = state.settings
    objective = _objective_of(state, body)
    if (
        state.is_encoder
        and objective == "auto"
        and hyperparameters.learning_rate_multiplier != "auto"
    ):
        what = "learning_rate_multiplier: of an objective's own rate: name it in afina.objective"
        raise APIError(400, what, "hyperparameters.learning_rate_multiplier")
    chat = () if state.is_encoder else CHAT_SETTINGS
    values: dict[str, Any] = {name: getattr(serve, name) for name in (*MODEL_SETTINGS, *chat)}
    values |= {"seed": seed, "data": str(path_of(state, training).resolve())}
    if validation is not None:
        values["eval_data"] = str(path_of(state, validation).resolve())
    width = state.model.hidden_size
    values |= {"objective": objective}
    values |= _from_hyperparameters(objective, hyperparameters, width) | body.afina
    group = {**reward, **_from_method(hyperparameters)}
    if group:
        values[objective] = group | body.afina.get(objective, {})
    method = str(values.get("method", "lora"))
    if serve.quantization == "nf4" and not method.startswith("q"):
        values["method"] = f"q{method}"

    def check() -> None:
        settings = make_settings(TrainSettings, values)
        if get_method(get_preset(settings.method, 1).method).replaces_base:
            what = f"{settings.method} trains a complete model, and no adapter"
            raise SettingsError(what, hint="lora, dora or mora")

    _translate_errors(check)
    return values


def _objective_of(state: ServerState, body: CreateJobRequest) -> str:
    """Return the objective of a job: that of its method, or the one that `afina` names.

    Raises:
        APIError: the adapter of that objective could not be served with this base.
    """
    usual, given = JOB_OBJECTIVES[body.method.type], body.afina.get("objective")
    if given is None:
        return usual
    allowed: tuple[str, ...] = ENCODER_OBJECTIVES if state.is_encoder else DECODER_OBJECTIVES
    if body.method.type != "supervised":
        allowed = (usual,)
    if given not in allowed:
        what = f"afina.objective {str(given)[:50]!r}: a job with this method and base has "
        raise APIError(400, what + f"{', '.join(allowed)}", "afina.objective")
    return str(given)


def _from_hyperparameters(
    objective: str, given: Hyperparameters, width: int | None
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if given.n_epochs != "auto":
        values["num_train_epochs"] = given.n_epochs
    if given.learning_rate_multiplier != "auto":  # 1 is afina's own default
        usual = get_objective("sft" if objective == "auto" else objective)
        default = default_learning_rate("lora", usual, width)
        values["learning_rate"] = default * float(given.learning_rate_multiplier)
    if isinstance(given, ReinforcementParameters) and given.eval_interval != "auto":
        values["eval_steps"] = given.eval_interval
    return values


def _from_method(given: Hyperparameters) -> dict[str, Any]:
    """Return the settings in the group of the objective."""
    if isinstance(given, PreferenceParameters):
        return {} if given.beta == "auto" else {"beta": given.beta}
    if not isinstance(given, ReinforcementParameters):
        return {}
    group: dict[str, Any] = {}
    if given.batch_size != "auto":
        group["prompts_per_step"] = given.batch_size
    if given.compute_multiplier != "auto":
        group["num_generations"] = max(2, round(8 * float(given.compute_multiplier)))
    return group


def _check_names(values: Mapping[str, Any]) -> None:
    """Raise `APIError` for a setting that a job may not set (see `job` in settings/common)."""
    allowed = job_settings(TrainSettings)
    for name, value in values.items():
        if name in allowed:
            continue
        if name not in settings_groups:
            raise _not_for_jobs(name, allowed)
        if not isinstance(value, Mapping):
            raise APIError(400, f"{name}: expected names with values", f"afina.{name}")
        own = job_settings(settings_groups.get(name))
        if unknown := sorted(set(value) - set(own)):
            raise _not_for_jobs(f"{name}.{unknown[0]}", own)


def _not_for_jobs(name: str, allowed: list[str]) -> APIError:
    name = name[:100]
    what = f"afina: {name!r} cannot be set for a job; allowed: {', '.join(allowed) or 'none'}"
    return APIError(400, what, f"afina.{name}")


def _translate_errors(check: Callable[[], Any]) -> None:
    """Raise `APIError` where `check` raises `SettingsError`."""
    try:
        check()
    except SettingsError as error:
        raise to_api_error(error, "afina") from None
