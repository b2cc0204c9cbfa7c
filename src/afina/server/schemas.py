"""Request bodies: OpenAI's parameters, validated by the table in `parameters.py`."""

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic import ModelWrapValidatorHandler as Handler
from pydantic_core import from_json

from afina.engine.request import SamplingParams
from afina.server.messages import Messages
from afina.server.parameters import PARAMETERS, Parameter
from afina.server.tools import (
    MAX_TOOLS,
    ResponseFormat,
    Tool,
    ToolChoice,
    close_objects,
    read_tool_choice,
)
from afina.server.validation import check_known, invalid

Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Model = Annotated[str, Field(max_length=1000, description="base or adapters; or in Azure's path")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
TextPair = Annotated[list[str], Field(min_length=2, max_length=2)]
Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=2048)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, max_length=2048)]
)


class StrictRequest(BaseModel):
    """A request body in which every parameter is used, ignored by name, or an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    parameters: ClassVar[Mapping[str, Parameter]] = {}
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of the parameters that were sent and change nothing."""
        return self._ignored

    @model_validator(mode="wrap")
    @classmethod
    def _check_supported(cls, values: Any, handler: Handler["StrictRequest"]) -> "StrictRequest":
        """Drop what changes nothing; reject unsupported parameters and invalid Unicode."""
        if not isinstance(values, Mapping):
            return handler(values)
        try:
            json.dumps(values, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise invalid("", "the body has a text that is not valid Unicode") from None
        fields = {field.alias or name for name, field in cls.model_fields.items()}
        check_known(values, {*fields, *cls.parameters})
        kept, ignored = {}, []
        for name, value in values.items():
            rule = cls.parameters.get(name)
            if rule is not None and rule.handling == "rejected" and name not in fields:
                if not rule.accepts(value):
                    raise invalid(name, f"{name} is not supported: {rule.why}")
            elif rule is not None and rule.handling == "ignored":
                if value is not None:
                    ignored.append(name)
            elif value is not None or cls._is_required(name):
                kept[name] = value
        request = handler(kept)
        request._ignored = tuple(ignored)
        return request

    @classmethod
    def _is_required(cls, name: str) -> bool:
        field = cls.model_fields.get(name)
        return field is None or field.is_required()


class StreamOptions(BaseModel):
    """Options of a stream. Obfuscation (padding that hides the sizes of chunks) is not done."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class StructuredOutputs(BaseModel):
    """vLLM's newer form of `guided_json`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    json_schema: dict[str, Any] | str = Field(alias="json")


class SamplingRequest(StrictRequest):
    """Parameters of chats and completions."""

    model: Model = ""
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
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(1.0, gt=0.0, le=10.0)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, lt=2**31)
    stop_token_ids: list[TokenId] = Field([], max_length=256)
    skip_special_tokens: bool = True
    guided_json: dict[str, Any] | str | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = Field(None, max_length=512)  # both identify the end user: they are logged
    safety_identifier: str | None = Field(None, max_length=512)

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str]) -> list[str]:
        stops = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
        if len(stops) > 16:
            raise invalid("", f"stop has {len(stops)} strings: at most 16 are supported")
        return stops

    @field_validator("structured_outputs", mode="before")
    @classmethod
    def _check_form(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            value = {name: own for name, own in value.items() if own is not None}
            other = next((name for name in value if name != "json"), None)
            if other is not None:
                raise invalid(str(other), f"structured_outputs.{other} is not supported: use json")
        return value

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options is only valid with stream")
        if self.min_tokens and self.json_schema is not None:
            raise invalid("min_tokens", "min_tokens is not valid with a JSON schema")
        return self

    @property
    def json_schema(self) -> Mapping[str, Any] | None:
        """JSON schema of the completion, or None."""
        given = self.guided_json
        if given is None and self.structured_outputs is not None:
            given = self.structured_outputs.json_schema
        if not isinstance(given, str):
            return given and close_objects(given)
        try:
            schema = from_json(given)
        except ValueError:
            schema = None
        if not isinstance(schema, dict):
            raise invalid("guided_json", "guided_json is not a JSON schema: an object is expected")
        return close_objects(schema)

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
                what = f"logit_bias: {token[:40]!r} is not a token id of this base"
                raise invalid("logit_bias", what)
            bias[int(token)] = value
        seed = secrets.randbits(31) if self.seed is None else (self.seed + choice) % 2**63
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            stop=tuple(self.stop),
            ignore_eos=self.ignore_eos,
            logit_bias=bias,
            min_tokens=min(self.min_tokens, max_new_tokens),
            **more,
        )


class ChatCompletionRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    parameters = PARAMETERS["/v1/chat/completions"]
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=-1)
    max_tokens: int | None = Field(
        None, ge=-1, description="the older name of max_completion_tokens"
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = Field(None, max_length=32)
    chat_template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    separate_reasoning: bool = True

    @field_validator("max_tokens", "max_completion_tokens")
    @classmethod
    def _check_limit(cls, limit: int | None) -> int | None:
        if limit == 0:
            raise invalid("", "the limit of the completion is 0 tokens: at least 1 is generated")
        return None if limit == -1 else limit

    @model_validator(mode="after")
    def _check_parameters(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs is only valid with logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            what = "max_tokens differs from max_completion_tokens, which replaces it"
            raise invalid("max_tokens", what)
        if self.json_schema is not None and self.response_format.type != "text":
            raise invalid("guided_json", "guided_json is only valid without response_format")
        read_tool_choice(self.tools, self.tool_choice, self.parallel_tool_calls)
        self._check_continuation()
        return self

    def _check_continuation(self) -> None:
        if not self.add_generation_prompt and not self.continues:
            what = "add_generation_prompt: false is only valid with continue_final_message"
            raise invalid("add_generation_prompt", what)
        if self.continues and self.messages[-1].role != "assistant":
            what = "continue_final_message: the last message must be of the assistant"
            raise invalid("continue_final_message", what)

    @property
    def continues(self) -> bool:
        """Whether the completion continues the last message."""
        return self.continue_final_message or self.messages[-1].prefix

    @property
    def limit(self) -> int | None:
        """Most tokens of the completion; None: the rest of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def choice_of_tools(self) -> ToolChoice:
        """Meaning of `tools` and `tool_choice`."""
        return read_tool_choice(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def schema_of_text(self) -> Mapping[str, Any] | None:
        """JSON schema of the text: None for free text, {} for any JSON object."""
        schema = self.response_format.json_schema_or_none()
        return self.json_schema if schema is None else schema


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    parameters = PARAMETERS["/v1/completions"]
    prompt: Prompts
    max_tokens: int = Field(16, ge=-1)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    best_of: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_parameters(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise invalid("best_of", "best_of must equal n, since all completions are returned")
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens", "max_tokens is 0: nothing is returned without echo")
        if self.n * len(prompts_of(self.prompt)) > 256:
            raise invalid("prompt", "prompt: at most 256 completions in one request")
        return self


class EmbeddingRequest(StrictRequest):
    """POST /v1/embeddings."""

    parameters = PARAMETERS["/v1/embeddings"]
    model: Model = ""
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)


class ClassificationRequest(StrictRequest):
    """POST /v1/classify, as in vLLM; pairs are ours."""

    parameters = PARAMETERS["/v1/classify"]
    model: Model = ""
    input: Prompts | Annotated[list[TextPair], Field(min_length=1, max_length=2048)]
    use_activation: bool = True
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)


class Document(BaseModel):
    """A document as an object."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str


class RerankRequest(StrictRequest):
    """POST /v1/rerank, as in Jina's and Cohere's APIs."""

    parameters = PARAMETERS["/v1/rerank"]
    model: Model = ""
    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=2048)]
    top_n: int | None = Field(None, ge=0, description="0: all, as in vLLM")
    return_documents: bool = True
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)

    @property
    def texts(self) -> list[str]:
        """The documents as texts."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """Return one or several prompts (text or token ids) as a list."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
