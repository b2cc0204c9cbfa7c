"""POST /v1/responses: the body, and its input items as the messages of a chat."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from afina.server.messages import join_text
from afina.server.parameters import PARAMETERS
from afina.server.schemas import ChatCompletionRequest, Model, StreamOptions, StrictRequest
from afina.server.tools import MAX_TOOLS, Tool, read_tool_choice
from afina.server.validation import check_known, invalid, validate

SHARED_WITH_CHAT = (
    *("model", "temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty"),
    *("parallel_tool_calls", "tool_choice", "chat_template_kwargs", "stream", "user"),
    "safety_identifier",
)
LOGPROBS = "message.output_text.logprobs"
INCLUDES = (LOGPROBS, "reasoning.encrypted_content")  # the latter: thoughts are not encrypted
CHAT_NAMES = {  # parameters of chats, and what they are called here
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
MESSAGE_FIELDS = ("type", "role", "content", "id", "status", "phase", "name")
CALL_FIELDS = ("type", "call_id", "name", "arguments", "id", "status", "namespace", "caller")
OUTPUT_FIELDS = ("type", "call_id", "output", "id", "status", "caller", "name")


class TextOptions(BaseModel):
    """Format of the text; `verbosity` is a hint for bases with levels."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: dict[str, Any] | None = None
    verbosity: str | None = None

    @property
    def response_format(self) -> dict[str, Any]:
        """The format in the form of chats, where the schema is one level deeper."""
        given = {key: value for key, value in (self.format or {}).items() if value is not None}
        if given.get("type") != "json_schema":
            return given or {"type": "text"}
        own = {key: value for key, value in given.items() if key != "type"}
        return {"type": "json_schema", "json_schema": own}


class ReasoningOptions(BaseModel):
    """Effort of the reasoning; thoughts are returned as they are, and never summarized."""

    model_config = ConfigDict(extra="ignore", strict=True)
    effort: str | None = None


class ResponseRequest(StrictRequest):
    """POST /v1/responses, without stored state."""

    parameters = PARAMETERS["/v1/responses"]
    model: Model = ""
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    include: list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] = {}
    truncation: Literal["disabled"] = "disabled"
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)

    @model_validator(mode="after")
    def _check_parameters(self) -> "ResponseRequest":
        for n, name in enumerate(self.include):
            if name not in INCLUDES:
                what = f"include: {name[:80]!r} is not available; known: {', '.join(INCLUDES)}"
                raise invalid(f"include[{n}]", what)
        read_tool_choice(self.tools, self.tool_choice, self.parallel_tool_calls)
        return self

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities are returned."""
        return LOGPROBS in self.include

    def chat(self) -> ChatCompletionRequest:
        """Return the chat whose answer is the response; raises a validation error."""
        values = {name: getattr(self, name) for name in SHARED_WITH_CHAT}
        values |= {
            "messages": messages_of(self.input, self.instructions),
            "tools": [tool.model_dump() for tool in self.tools],
            "max_completion_tokens": self.max_output_tokens,
            "response_format": self.text.response_format,
            "reasoning_effort": self.reasoning.effort,
            "logprobs": self.has_logprobs,
            "top_logprobs": self.top_logprobs if self.has_logprobs else None,
        }
        return validate(ChatCompletionRequest, values, CHAT_NAMES)


def messages_of(given: str | list[dict[str, Any]], instructions: str | None) -> list[Any]:
    """Return the messages of input items: calls and thoughts belong to the assistant's message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for n, item in enumerate(given):
        kind = item.get("type", "message")
        reader = READERS.get(kind)
        if reader is None:
            known = ", ".join(READERS)
            what = (
                f"item {n} has the type {str(kind)[:60]!r}, which is not supported; known: {known}"
            )
            raise invalid(f"input[{n}].type", what)
        reader(messages, {k: v for k, v in item.items() if v is not None}, f"input[{n}]")
    return messages


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant's message at the end, which is created where there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, f"{where} must be a text or a list of parts")
    return join_text(content, where)


def _read_message(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    check_known(item, MESSAGE_FIELDS, where)
    role = item.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise invalid(f"{where}.role", f"{where}.role must be system, developer, user or assistant")
    text = _text(item.get("content"), f"{where}.content")
    if role != "assistant":
        messages.append({"role": role, "content": text})
        return
    last = messages[-1] if messages else {}
    is_open = last.get("role") == "assistant" and last.get("content") is None
    if is_open and "tool_calls" not in last:  # after its thought
        last["content"] = text
    else:
        messages.append({"role": "assistant", "content": text})


def _read_call(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    check_known(item, CALL_FIELDS, where)
    for name in ("call_id", "name", "arguments"):
        if not isinstance(item.get(name), str):
            raise invalid(f"{where}.{name}", f"{where}.{name} is missing: a text is expected")
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    _assistant(messages).setdefault("tool_calls", []).append(call)


def _read_output(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    check_known(item, OUTPUT_FIELDS, where)
    if not isinstance(item.get("call_id"), str):
        raise invalid(f"{where}.call_id", f"{where}.call_id is missing: the call it answers")
    text = _text(item.get("output"), f"{where}.output")
    messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})


def _read_reasoning(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    parts = item.get("content") or item.get("summary") or []
    texts = [part.get("text", "") for part in parts if isinstance(part, Mapping)]
    text = "".join(text for text in texts if isinstance(text, str))
    if text:
        messages.append({"role": "assistant", "content": None, "reasoning_content": text})


READERS = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_output,
    "reasoning": _read_reasoning,
}
