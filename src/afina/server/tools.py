"""`tools`, `tool_choice` and `response_format` of a request."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from afina.server.validation import invalid

MAX_TOOLS = 128
Mode = Literal["auto", "none", "required"]


class Function(BaseModel):
    """Name, description and JSON schema of a function."""

    model_config = ConfigDict(extra="ignore", strict=True)
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def json_schema(self) -> dict[str, Any]:
        """Schema of the arguments; without one, any object."""
        schema = dict(self.parameters or {})
        return close_objects(schema) if schema else {"type": "object"}


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: str = "function"
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, values: Any) -> Any:
        """Reject other kinds of tools by name; accept the flat form of /v1/responses."""
        if not isinstance(values, Mapping):
            return values
        kind = values.get("type", "function")
        if kind != "function":
            what = f"type: {str(kind)[:40]!r} is not supported: tools are functions"
            raise invalid("type", what)
        if "function" not in values and "name" in values:
            own = {k: v for k, v in values.items() if k != "type" and v is not None}
            return {"type": "function", "function": own}
        return values

    def to_template(self) -> dict[str, Any]:
        """Return the tool as chat templates take it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        function.setdefault("description", "")
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolChoice:
    """What the model may do: `mode`, and the functions that it may call.

    Attributes:
        mode: "none" writes text, "required" at least one call, "auto" either.
        tools: the functions that may be called.
        parallel: whether several calls in one answer are allowed.
    """

    mode: Mode
    tools: tuple[Tool, ...] = ()
    parallel: bool = True

    @property
    def is_strict(self) -> bool:
        """Whether a function requires strict arguments where the model may call it."""
        return any(tool.function.strict for tool in self.tools)


def read_tool_choice(tools: list[Tool], choice: Any, parallel: bool) -> ToolChoice:
    """Return the meaning of `tool_choice`; raises a validation error."""
    if len({tool.function.name for tool in tools}) < len(tools):
        raise invalid("tools", "tools: two functions have the same name")
    if choice is None:
        choice = "auto" if tools else "none"
    if choice in ("none", "auto", "required"):
        if not tools and choice == "required":
            raise invalid("tool_choice", "tool_choice: required needs tools")
        return ToolChoice(choice if tools else "none", tuple(tools), parallel)
    if not isinstance(choice, Mapping):
        what = "tool_choice must be 'auto', 'none', 'required' or an object that names a function"
        raise invalid("tool_choice", what)
    kind = choice.get("type")
    if kind == "function":
        return ToolChoice("required", (_named(tools, choice),), False)
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        names = allowed.get("tools") if isinstance(allowed, Mapping) else None
        mode = allowed.get("mode", "auto") if isinstance(allowed, Mapping) else None
        if isinstance(names, list) and mode in ("auto", "required"):
            own = tuple(_named(tools, name) for name in names)
            return ToolChoice(mode, own, parallel)  # type: ignore[arg-type]
    raise invalid("tool_choice", "tool_choice: type must be 'function' or 'allowed_tools'")


def _named(tools: list[Tool], choice: Any) -> Tool:
    choice = choice if isinstance(choice, Mapping) else {}
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise invalid("tool_choice", f"tool_choice: {str(name)[:64]!r} is not among the tools")


# keywords by which other schemas may allow properties besides the declared ones
_OPEN = (
    "additionalProperties",
    "unevaluatedProperties",
    "patternProperties",
    "$ref",
    "$dynamicRef",
)
_COMPOSED = ("allOf", "anyOf", "oneOf", "if", "dependentSchemas", "not")


def close_objects(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema whose objects have the declared properties only.

    Without `additionalProperties`, JSON schema allows any further ones, and small models write
    them without end. What satisfies the result satisfies the schema. Objects of composed schemas
    are left as they are: their properties may be declared elsewhere.
    """
    if any(f'"{keyword}"' in json.dumps(schema) for keyword in ("allOf", "unevaluatedProperties")):
        return dict(schema)
    return _close(schema)


def _close(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(name), Mapping):
            closed[name] = {key: _close(value) for key, value in schema[name].items()}
    if "items" in schema:
        closed["items"] = _close(schema["items"])
    if "properties" in schema and not any(name in schema for name in (*_OPEN, *_COMPOSED)):
        closed["additionalProperties"] = False
    return closed


class JsonSchema(BaseModel):
    """A named JSON schema; the completion satisfies it, `strict` or not."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, strict=True)
    name: str = Field(max_length=64)
    description: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Text, any JSON object, or JSON that satisfies a schema."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            what = "response_format: json_schema is valid with type json_schema only"
            raise invalid("json_schema", what)
        return self

    def json_schema_or_none(self) -> Mapping[str, Any] | None:
        """Return the JSON schema of the completion: None for text, {} for any JSON object."""
        if self.type == "text":
            return None
        return close_objects(self.json_schema.content or {}) if self.json_schema else {}
