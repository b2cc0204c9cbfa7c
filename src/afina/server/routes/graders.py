"""/v1/fine_tuning/alpha/graders: validate a grader, and grade a completion.

A grader runs in a subprocess with bounds of time and memory, which ends with its client and with
the server; code of a grader runs only on servers that allow it (--allow-python-graders).
"""

import json
import sys
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from afina.errors import AfinaError, SettingsError
from afina.objectives.graders import Grader, parse_grader
from afina.server.errors import APIError, to_api_error
from afina.server.jobs.bounded import BoundedProcess
from afina.server.middleware import cancel_on_disconnect
from afina.server.routes.files import Owner
from afina.server.schemas import StrictRequest
from afina.server.state import ServerState, get_state

router = APIRouter()
GRADER_SECONDS, GRADER_BYTES = 30.0, 1 << 30  # of one grader's process
# characters of a compared text: the time of some similarities is the product of two lengths
MAX_CHARACTERS = 20_000
GRADER_ERRORS = (  # names of OpenAI's API
    "formula_parse_error",
    "sample_parse_error",
    "truncated_observation_error",
    "unresponsive_reward_error",
    "invalid_variable_error",
    "other_error",
    "python_grader_server_error",
    "python_grader_runtime_error",
    "model_grader_server_error",
    "model_grader_refusal_error",
    "model_grader_parse_error",
)


class ValidateGraderRequest(StrictRequest):
    """POST /v1/fine_tuning/alpha/graders/validate."""

    grader: dict[str, Any]


class RunGraderRequest(StrictRequest):
    """POST /v1/fine_tuning/alpha/graders/run: a completion and its row."""

    grader: dict[str, Any]
    model_sample: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    item: dict[str, Any] = {}


def grader_of(state: ServerState, definition: Any, param: str) -> Grader:
    """Return the grader of a definition, without running any of its code.

    Raises:
        APIError: 400 for an invalid definition, 403 for code where it is not allowed.
    """
    try:
        grader = parse_grader(definition, True, param)
    except SettingsError as error:
        raise to_api_error(error, param) from None
    if grader.is_code and not state.settings.allow_python_graders:
        what = "python graders are off: they run code on the server (--allow-python-graders)"
        raise APIError(403, what, param, "python_graders_off")
    return grader


@router.post("/v1/fine_tuning/alpha/graders/validate")
async def validate(body: ValidateGraderRequest, request: Request, caller: Owner) -> dict[str, Any]:
    """Return the grader if it is valid."""
    state = get_state(request)
    await state.grader_pool.run(lambda: grader_of(state, body.grader, "grader"))
    return {"grader": body.grader}


@router.post("/v1/fine_tuning/alpha/graders/run")
async def run(body: RunGraderRequest, request: Request, caller: Owner) -> dict[str, Any]:
    """Return the reward of a completion, and the scores of the grader's parts."""
    state = get_state(request)
    grader = await state.grader_pool.run(lambda: grader_of(state, body.grader, "grader"))
    if len(json.dumps(body.item)) > MAX_CHARACTERS:
        raise APIError(400, f"item: longer than {MAX_CHARACTERS:,} characters", "item")
    start, errors, details = time.perf_counter(), dict.fromkeys(GRADER_ERRORS, False), None
    reward, parts = 0.0, dict[str, float]()
    try:
        grader.check(body.item, "item")
        work = _grade_in_subprocess(state, grader, body)
        reward, parts = await cancel_on_disconnect(request.receive, work)
    except AfinaError as error:
        details = "; ".join(part for part in (error.where, error.what, error.why) if part)
        errors["python_grader_runtime_error" if grader.is_code else "other_error"] = True
    metadata = {
        "name": grader.name,
        "type": body.grader["type"],
        "execution_time": time.perf_counter() - start,
        "scores": parts,
        "token_usage": None,
        "sampled_model_name": None,
        "errors": errors
        | {
            "python_grader_runtime_error_details": details,
            "python_grader_server_error_type": None,
            "model_grader_server_error_details": None,
        },
    }
    return {
        "reward": reward,
        "metadata": metadata,
        "sub_rewards": parts,
        "model_grader_token_usage_per_model": {},
    }


async def _grade_in_subprocess(
    state: ServerState, grader: Grader, body: RunGraderRequest
) -> tuple[float, dict[str, float]]:
    """Return (reward, scores of the parts), computed in a subprocess."""
    given = {"grader": grader.definition, "answer": body.model_sample, "item": body.item}
    command = (sys.executable, "-m", "afina.objectives.graders")
    process = BoundedProcess(command, json.dumps(given), GRADER_SECONDS, GRADER_BYTES)
    try:
        code, output, log = await state.grader_pool.run(process.run)
    finally:
        process.kill()  # the client has disconnected, or the server is stopping
    if code is None:
        why = f"more than {GRADER_SECONDS:.0f} s"
        raise SettingsError("the grader took too long", why=why)
    if code:
        raise SettingsError((log.strip().splitlines() or ["the grader failed"])[-1][:500])
    result = json.loads(output.strip().splitlines()[-1])
    return result["reward"], result["parts"]
