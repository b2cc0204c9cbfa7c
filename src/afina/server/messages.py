"""Messages of a chat: text, tool calls and their results, as chat templates take them."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import from_json

from afina.server.validation import check_known, invalid

ROLES = ("system", "developer", "user", "assistant", "tool")
# of a returned answer or a hint of other servers: without effect on the prompt
EMPTY_FIELDS = ("refusal", "annotations", "audio", "function_call", "provider_specific_fields")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class RequestFunctionCall(BaseModel):
    """Name and arguments of a call; the arguments are JSON in a string, as in OpenAI's API."""

    model_config = ConfigDict(extra="ignore", strict=True)
    name: str = Field(min_length=1, max_length=256)
    arguments: str = "{}"

    @model_validator(mode="before")
    @classmethod
    def _from_object(cls, values: Any) -> Any:
        """Accept arguments as an object too, which some clients send back."""
        if isinstance(values, Mapping) and isinstance(values.get("arguments"), Mapping):
            return {**values, "arguments": json.dumps(values["arguments"], ensure_ascii=False)}
        return values

    @property
    def arguments_object(self) -> Any:
        """The arguments as chat templates take them: an object, or the text where it is none."""
        try:
            return from_json(self.arguments or "{}")
        except ValueError:
            return self.arguments


class RequestToolCall(BaseModel):
    """A call in the message of an assistant."""

    model_config = ConfigDict(extra="ignore", strict=True)
    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: RequestFunctionCall

    def to_template(self) -> dict[str, Any]:
        """Return the call as chat templates take it."""
        function = {"name": self.function.name, "arguments": self.function.arguments_object}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] | None = None
    name: str | None = Field(None, max_length=256, description="left to the chat template")
    tool_calls: list[RequestToolCall] = Field([], max_length=128)
    tool_call_id: str | None = Field(None, max_length=256, description="the call it answers")
    reasoning_content: str | None = Field(None, description="left to the chat template")
    prefix: bool = Field(False, description="of the last message: continue it")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: Any) -> Any:
        """Drop empty fields of a returned answer; reject unknown fields and roles by name."""
        if not isinstance(values, Mapping):
            return values
        kept = {k: v for k, v in values.items() if v not in (None, [], {}, "") or k == "content"}
        kept.pop("cache_control", None)
        if "reasoning" in kept:  # its name in OpenRouter and vLLM
            kept.setdefault("reasoning_content", kept.pop("reasoning"))
        if "function_call" in kept:
            raise invalid("function_call", "function_call: use tool_calls")
        for name in EMPTY_FIELDS:
            kept.pop(name, None)
        check_known(kept, cls.model_fields)
        return kept

    @field_validator("content", mode="before")
    @classmethod
    def _text_of(cls, content: Any) -> Any:
        """Join the text parts of a content; other parts are errors that name their type."""
        return join_text(content) if isinstance(content, list) else content

    @model_validator(mode="after")
    def _check_role(self) -> "ChatMessage":
        if self.role == "assistant":
            if self.content is None and not self.tool_calls and self.reasoning_content is None:
                raise invalid("content", "content is missing: the assistant's text, or tool_calls")
            return self
        if self.content is None:
            raise invalid("content", f"content is missing: the text of the {self.role}'s message")
        if self.tool_calls:
            raise invalid("tool_calls", "tool_calls: only an assistant's message has calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise invalid("tool_call_id", "tool_call_id is missing: the id of the call")
        return self

    def to_template(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        optional = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
            "tool_calls": [call.to_template() for call in self.tool_calls],
        }
        return message | {name: value for name, value in optional.items() if value}


def join_text(parts: list[Any], where: str = "") -> str:
    """Return the text of content parts; raises for a part that is not text, at `where`[n]."""
    texts = []
    for n, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind not in TEXT_PARTS or not isinstance(part, Mapping):
            kind = str(kind or type(part).__name__)[:40]
            raise invalid(
                f"{where}[{n}].type", f"part {n} is {kind!r}: this base reads text parts only"
            )
        else:
            text = part.get("refusal" if kind == "refusal" else "text")
            if not isinstance(text, str):
                raise invalid(f"{where}[{n}].text", f"part {n}: text must be a text")
            texts.append(text)
    return "".join(texts)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
