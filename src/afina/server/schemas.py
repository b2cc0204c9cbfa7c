"""What a client may ask for: OpenAI's parameters, checked; nothing that is sent is left unread.

A parameter that asks for something this server does not do is refused, unless its value asks for nothing.
"""

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from afina.engine.request import SamplingParams

# what is not done here, and the values that ask for nothing
UNSUPPORTED_PARAMETERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tools": ("this server calls no tools", ([],)),
    "tool_choice": ("this server calls no tools", ("none",)),
    "parallel_tool_calls": ("this server calls no tools", ()),
    "functions": ("this server calls no functions", ([],)),
    "function_call": ("this server calls no functions", ("none",)),
    "audio": ("this server speaks no audio", ()),
    "modalities": ("this server writes text only", (["text"],)),
    "prediction": ("predicted outputs are not used here", ()),
    "web_search_options": ("this server searches nothing", ()),
    "service_tier": ("there is one tier here", ("auto", "default")),
    "store": ("answers are not kept", (False,)),
    "metadata": ("answers are not kept", ({},)),
    "moderation": ("nothing is moderated here", ()),
    "reasoning_effort": ("the base decides how it reasons", ("none",)),
    "verbosity": ("the base decides how much it says", ("medium",)),
    "prompt_cache_retention": ("the cache holds what there is room for", ("in_memory",)),
    "prompt_cache_options": ("the cache holds what there is room for", ()),
    "suffix": ("this server continues a text and does not fill gaps", ("",)),
}
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


class StrictRequest(BaseModel):
    """A body that is read strictly."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, values: Any) -> Any:
        """Drop what asks for nothing; refuse what is not done here, and half of a surrogate pair, which is no text."""
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
                why, nothing = UNSUPPORTED_PARAMETERS[name]
                if value not in nothing or (isinstance(value, int) and not isinstance(value, bool)):
                    raise PydanticCustomError(
                        "not_here", "{name}: {why}", {"name": name, "why": why}
                    )
                continue
            kept[name] = value
        return kept


class StreamOptions(BaseModel):
    """What a stream tells besides the text. Obfuscation pads a stream against listeners of its sizes: never done here."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SamplingRequest(StrictRequest):
    """What chats and completions share. top_k, min_p, repetition_penalty and ignore_eos are ours, as in other servers."""

    model: str = Field(
        "", max_length=1000, description="who shall answer; Azure's paths say it themselves"
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
    user: str | None = None  # these three say who asks: they go into the log
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop")
    @classmethod
    def _few(cls, stop: str | list[str]) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop
        if len(stops) > 16 or not all(stops):
            raise PydanticCustomError("stop", "stop: at most 16 texts, none of them empty")
        return stops

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options: only with stream")
        return self

    def to_sampling_params(
        self, max_new_tokens: int, vocabulary: int, choice: int, **more: Any
    ) -> SamplingParams:
        """The engine's words for it; each of n choices has its own seed. Without one it is drawn."""
        bias = {}
        for token, value in self.logit_bias.items():
            if (
                not token.isascii()
                or not token.isdigit()
                or len(token) > 9
                or int(token) >= vocabulary
            ):
                raise PydanticCustomError(
                    "bias",
                    "logit_bias: {token} is no token of this base",
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
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat. What an answer carries besides its text (refusal, annotations) may come back, empty."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: Any) -> Any:
        return (
            {k: v for k, v in values.items() if v not in (None, []) or k == "content"}
            if isinstance(values, Mapping)
            else values
        )

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates want them."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(BaseModel):
    """A named schema; `strict` or not, the answer satisfies it."""

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
    def _together(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise PydanticCustomError(
                "format",
                "response_format: json_schema goes with type json_schema, and with no other",
            )
        return self

    def json_schema_or_none(self) -> Mapping[str, Any] | None:
        """What the engine is told: None for text, {} for any JSON object."""
        return None if self.type == "text" else self.json_schema.content if self.json_schema else {}


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
    def _fits(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs: only with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "max_tokens", "max_tokens: max_completion_tokens is there already"
            )
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
    def _fits(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise PydanticCustomError(
                "best_of",
                "best_of: all answers that are made are given; leave it out, or set it to n",
            )
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError(
                "echo",
                "echo: the prompt's own log-probabilities are not computed; leave out one of the two",
            )
        if self.n * len(prompts_of(self.prompt)) > 256:
            raise PydanticCustomError("prompt", "prompt: at most 256 answers in one request")
        return self


class EmbeddingRequest(StrictRequest):
    """POST /v1/embeddings."""

    model: str = Field(
        "", max_length=1000, description="who shall answer; Azure's paths say it themselves"
    )
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """One or several texts or lists of tokens, as a list of them."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
