"""/v1/fine_tuning/alpha/graders: is this a grader, and what would it say of an answer?

Code in a grader is run in a process of its own, for `SECONDS` at most, and only where the server's operator has allowed it.
"""

import json
import subprocess
import sys
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from afina.errors import AfinaError, SettingsError
from afina.objectives.graders import Grader, parse_grader
from afina.server.errors import APIError, to_api_error
from afina.server.routes.files import Owner
from afina.server.schemas import StrictRequest
from afina.server.state import ServerState, get_state

router = APIRouter()
SECONDS = 30.0
LONGEST = 20_000  # characters of what is compared: some similarities take as long as the product of two lengths
WRONG = (  # what may be wrong with an answer, by OpenAI's names
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
    """POST /v1/fine_tuning/alpha/graders/run: an answer, and the row that it answers."""

    grader: dict[str, Any]
    model_sample: Annotated[str, Field(max_length=LONGEST)]
    item: dict[str, Any] = {}


def grader_of(state: ServerState, told: Any, param: str) -> Grader:
    """The grader that is meant; nothing of it is run. Raises `Refusal`: 400 where it is none, 403 where it is code."""
    try:
        grader = parse_grader(told, True, param)
    except SettingsError as error:
        raise to_api_error(error, param) from None
    if grader.is_code and not state.settings.allow_python_graders:
        what = "python graders run code on this machine, which its operator has not allowed (afina serve --allow-python-graders)"
        raise APIError(403, what, param, "python_graders_off")
    return grader


@router.post("/v1/fine_tuning/alpha/graders/validate")
def validate(body: ValidateGraderRequest, request: Request, caller: Owner) -> dict[str, Any]:
    """The grader again, if it is one."""
    grader_of(get_state(request), body.grader, "grader")
    return {"grader": body.grader}


@router.post("/v1/fine_tuning/alpha/graders/run")
def run(body: RunGraderRequest, request: Request, caller: Owner) -> dict[str, Any]:
    """The number that the grader gives an answer, and those of its parts."""
    grader = grader_of(get_state(request), body.grader, "grader")
    if len(json.dumps(body.item)) > LONGEST:
        raise APIError(400, f"item: longer than {LONGEST:,} characters", "item")
    start, wrong, details = time.perf_counter(), dict.fromkeys(WRONG, False), None
    reward, parts = 0.0, dict[str, float]()
    try:
        grader.check(body.item, "item")
        reward, parts = (_apart if grader.is_code else _here)(grader, body)
    except AfinaError as error:
        details = "; ".join(part for part in (error.where, error.what, error.why) if part)
        wrong["python_grader_runtime_error" if grader.is_code else "other_error"] = True
    metadata = {
        "name": grader.name,
        "type": body.grader["type"],
        "execution_time": time.perf_counter() - start,
        "scores": parts,
        "token_usage": None,
        "sampled_model_name": None,
        "errors": wrong
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


def _here(grader: Grader, body: RunGraderRequest) -> tuple[float, dict[str, float]]:
    return grader.grade(body.model_sample, body.item)


def _apart(grader: Grader, body: RunGraderRequest) -> tuple[float, dict[str, float]]:
    """The same by another process."""
    given = json.dumps(
        {"grader": grader.definition, "answer": body.model_sample, "item": body.item}
    )
    command = [sys.executable, "-m", "afina.objectives.graders"]
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise SettingsError(
            "the grader's code took too long", why=f"more than {SECONDS:.0f} s"
        ) from None
    if done.returncode:
        raise SettingsError((done.stderr.strip().splitlines() or ["the grader's code failed"])[-1])
    told = json.loads(done.stdout.splitlines()[-1])
    return told["reward"], told["parts"]
