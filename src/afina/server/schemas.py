"""Request bodies: OpenAI's parameters, validated; every parameter is used or an error.

A parameter that this server does not support is rejected, unless its value is a no-op.
"""

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from afina.engine.request import SamplingParams

# parameters that are not supported: the reason, and the values that are no-ops
UNSUPPORTED_PARAMETERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tools": ("tool calls are not supported", ([],)),
    "tool_choice": ("tool calls are not supported", ("none",)),
    "parallel_tool_calls": ("tool calls are not supported", ()),
    "functions": ("function calls are not supported", ([],)),
    "function_call": ("function calls are not supported", ("none",)),
    "audio": ("audio is not supported", ()),
    "modalities": ("only text is generated", (["text"],)),
    "prediction": ("predicted outputs are not supported", ()),
    "web_search_options": ("web search is not supported", ()),
    "service_tier": ("there is one service tier", ("auto", "default")),
    "store": ("completions are not stored", (False,)),
    "metadata": ("completions are not stored", ({},)),
    "moderation": ("moderation is not supported", ()),
    "reasoning_effort": ("reasoning effort depends on the base", ("none",)),
    "verbosity": ("verbosity depends on the base", ("medium",)),
    "prompt_cache_retention": ("the cache evicts by available memory only", ("in_memory",)),
    "prompt_cache_options": ("the cache evicts by available memory only", ()),
    "suffix": ("filling in the middle is not supported", ("",)),
}
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


class StrictRequest(BaseModel):
    """A request body in which unknown parameters are errors."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_supported(cls, values: Any) -> Any:
        """Drop no-op values; reject unsupported parameters and strings that are not valid Unicode."""
        if not isinstance(values, Mapping):
            return values
        try:
            json.dumps(values, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("unicode", "not valid Unicode") from None
        kept = {}
        for name, value in values.items():
            if (
                value is None
                and name in {*cls.model_fields, *UNSUPPORTED_PARAMETERS}
                and name not in ("messages", "prompt", "input")
            ):
                continue
            if name in UNSUPPORTED_PARAMETERS and name not in cls.model_fields:
                why, no_ops = UNSUPPORTED_PARAMETERS[name]
                if value not in no_ops or (isinstance(value, int) and not isinstance(value, bool)):
                    raise PydanticCustomError(
                        "unsupported", "{name}: {why}", {"name": name, "why": why}
                    )
                continue
            kept[name] = value
        return kept


class StreamOptions(BaseModel):
    """Options of a stream. Obfuscation (padding that hides the sizes of chunks) is not supported."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SamplingRequest(StrictRequest):
    """Parameters of chats and completions.

    top_k, min_p, repetition_penalty and ignore_eos are extensions of OpenAI's API, as in vLLM.
    """

    model: str = Field(
        "", max_length=1000, description="base or adapters; Azure's paths contain it instead"
    )
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] = {}
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0, le=10.0)
    ignore_eos: bool = False
    user: str | None = None  # these three identify the end user: they are logged
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str]) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop
        if len(stops) > 16 or not all(stops):
            raise PydanticCustomError("stop", "stop: at most 16 strings, none of them empty")
        return stops

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options: only valid with stream")
        return self

    def to_sampling_params(
        self, max_new_tokens: int, vocabulary: int, choice: int, **more: Any
    ) -> SamplingParams:
        """Return the engine's sampling parameters of one of n choices.

        Choice i uses seed + i; without a seed a random one is used.
        """
        bias = {}
        for token, value in self.logit_bias.items():
            is_number = token.isascii() and token.isdigit() and len(token) <= 9
            if not is_number or int(token) >= vocabulary:
                raise PydanticCustomError(
                    "bias",
                    "logit_bias: {token} is not a token id of this base",
                    {"token": repr(token[:40])},
                )
            bias[int(token)] = value
        seed = secrets.randbits(31) if self.seed is None else (self.seed + choice) % 2**63
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            stop=tuple(self.stop),
            ignore_eos=self.ignore_eos,
            logit_bias=bias,
            **more,
        )


class TextPart(BaseModel):
    """A text part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat. Empty fields of a returned answer (refusal, annotations) are accepted."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {k: v for k, v in values.items() if v not in (None, []) or k == "content"}

    def plain(self) -> dict[str, str]:
        """Return role and text, as chat templates need them."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content]
        text = "".join(parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(BaseModel):
    """A named JSON schema; the completion satisfies it, `strict` or not."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: str = Field(max_length=64)
    description: str | None = None
    content: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Text, any JSON object, or JSON that satisfies a schema."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise PydanticCustomError(
                "format",
                "response_format: json_schema is valid with type json_schema only",
            )
        return self

    def json_schema_or_none(self) -> Mapping[str, Any] | None:
        """Return the JSON schema of the completion: None for text, {} for any JSON object."""
        if self.type == "text":
            return None
        return self.json_schema.content if self.json_schema else {}


class ChatCompletionRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(
        None, ge=1, description="the older name of max_completion_tokens"
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat = ResponseFormat(type="text")

    @model_validator(mode="after")
    def _check_parameters(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs: only valid with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            what = "max_tokens: max_completion_tokens is given too, and replaces it"
            raise PydanticCustomError("max_tokens", what)
        return self


Tokens = Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]], Field(min_length=1)]
Text = Annotated[str, Field(strict=True)]
Prompts = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, max_length=2048)]
)


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_parameters(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise PydanticCustomError(
                "best_of",
                "best_of: must equal n, since all completions are returned",
            )
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError(
                "echo",
                "echo: logprobs of the prompt are not computed; leave out echo or logprobs",
            )
        if self.n * len(prompts_of(self.prompt)) > 256:
            raise PydanticCustomError("prompt", "prompt: at most 256 completions in one request")
        return self


class EmbeddingRequest(StrictRequest):
    """POST /v1/embeddings."""

    model: str = Field(
        "", max_length=1000, description="base or adapters; Azure's paths contain it instead"
    )
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """Return one or several prompts (text or token ids) as a list."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
