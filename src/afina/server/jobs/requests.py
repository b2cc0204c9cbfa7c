"""Bodies of /v1/fine_tuning/jobs: OpenAI's methods and hyperparameters, validated."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from afina.server.schemas import StrictRequest
from afina.server.validation import check_known, invalid

# by OpenAI's method: the objective; `auto` where the rows decide
JOB_OBJECTIVES = {"supervised": "auto", "dpo": "dpo", "reinforcement": "grpo"}
METHODS = tuple(JOB_OBJECTIVES)
# what `afina.objective` may name instead, by what the base can serve
DECODER_OBJECTIVES = ("auto", "sft", "pretrain", "kto", "orpo", "simpo")
ENCODER_OBJECTIVES = ("auto", "classify", "embed", "rerank")
MAX_SUFFIX = 64
Auto = Literal["auto"]


class StrictGroup(BaseModel):
    """A group of parameters in which an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Drop parameters that are null; reject unknown ones with the closest known name."""
        if not isinstance(values, Mapping):
            return values
        check_known(values, cls.model_fields)
        return {name: value for name, value in values.items() if value is not None}


class Hyperparameters(StrictGroup):
    """Examples per step, a factor of the learning rate, and epochs."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0.0, le=1e4)] = "auto"


class Supervised(StrictGroup):
    """Supervised fine-tuning on the answers of the rows."""

    hyperparameters: Hyperparameters = Hyperparameters()


class PreferenceParameters(Hyperparameters):
    """Hyperparameters of DPO: `beta` is the weight of the KL constraint."""

    beta: Auto | Annotated[float, Field(gt=0.0, le=2.0)] = "auto"


class DPOMethod(StrictGroup):
    """Direct preference optimization on pairs of answers."""

    hyperparameters: PreferenceParameters = PreferenceParameters()


class ReinforcementParameters(Hyperparameters):
    """Hyperparameters of GRPO.

    A batch is prompts, `compute_multiplier` times 8 the samples of each, and `eval_interval` the
    steps between evaluations, in which each held-out prompt is answered once, greedily.
    """

    compute_multiplier: Auto | Annotated[float, Field(ge=0.25, le=8.0)] = "auto"
    eval_interval: Auto | Annotated[int, Field(ge=1, le=10**6)] = "auto"
    eval_samples: Auto | Literal[1] = "auto"
    reasoning_effort: Literal["default"] | None = None


class ReinforcementMethod(StrictGroup):
    """Reinforcement learning on sampled answers, which a grader scores."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementParameters = ReinforcementParameters()
    response_format: Annotated[Any, Field(description="only text")] = None

    @field_validator("response_format")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if value != {"type": "text"}:
            what = "response_format: samples are free text; a grader may use sample.output_json"
            raise invalid("", what)
        return value


class Method(StrictGroup):
    """The method of a job, and the parameters of this method only."""

    type: str = "supervised"
    supervised: Supervised | None = None
    dpo: DPOMethod | None = None
    reinforcement: ReinforcementMethod | None = None

    @field_validator("type")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in METHODS:
            what = f"method: the methods of this server are {', '.join(METHODS)}"
            raise invalid("", f"{what}, not {value[:50]!r}")
        return value

    @model_validator(mode="after")
    def _only_one(self) -> "Method":
        for name in METHODS:
            if getattr(self, name) is not None and name != self.type:
                raise invalid(name, f"method.{name} is not used: method.type is {self.type}")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise invalid("reinforcement", "method.reinforcement is missing: it needs a grader")
        return self

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The hyperparameters of the selected method."""
        if self.reinforcement is not None:
            return self.reinforcement.hyperparameters
        if self.type == "dpo":
            return (self.dpo or DPOMethod()).hyperparameters
        return (self.supervised or Supervised()).hyperparameters


class CreateJobRequest(StrictRequest):
    """POST /v1/fine_tuning/jobs; `afina` has settings of `afina train` (method, rank, ...)."""

    model: str = Field(max_length=1000)
    training_file: str = Field(max_length=200)
    validation_file: str | None = Field(None, max_length=200)
    hyperparameters: Hyperparameters | None = Field(
        None, description="the older form of method.supervised.hyperparameters"
    )
    method: Method = Method()
    suffix: str | None = Field(None, max_length=1000)
    seed: int | None = Field(None, ge=0, lt=2**31)
    metadata: dict[str, Annotated[str, Field(max_length=512)]] = Field({}, max_length=16)
    integrations: list[Any] | None = Field(None, max_length=0)
    afina: dict[str, Any] = {}

    @field_validator("suffix")
    @classmethod
    def _slug(cls, suffix: str | None) -> str | None:
        """Return the suffix with a hyphen for each run of characters that no name may have."""
        if suffix is None:
            return None
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", suffix)[:MAX_SUFFIX].strip("-.") or None
