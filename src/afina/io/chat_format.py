"""Chat format of a model: chat template, its arguments and stop tokens, as one record.

settings ──> ChatFormat ──> run.json and afina.json, key `chat` ──> eval, generate, chat, serve,
                                                                   merged models and exports
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from afina.errors import AdapterError

CHAT_KEY = "chat"  # of run.json and afina.json
BUILT_IN = ("plain", "chatml")
FIELD_TYPES = {
    "template": str | None,
    "kwargs": dict,
    "allow_control_tokens": bool,
    "jinja": str | None,
    "stop_tokens": list,
}


class HasChatFormat(Protocol):
    """Settings of a chat format."""

    @property
    def chat_template(self) -> str | None:
        """Name or path of the template."""

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of the template."""

    @property
    def allow_control_tokens(self) -> bool:
        """Whether control tokens in the texts of messages are read as tokens."""


@dataclass(frozen=True)
class ChatFormat:
    """Chat format of a model.

    Attributes:
        template: "plain", "chatml", the path of a jinja file, or None for the tokenizer's own.
        kwargs: Arguments of the template, such as {"enable_thinking": False}.
        allow_control_tokens: Whether control tokens in the texts of messages are read as tokens.
        jinja: The text of the template, once it was found for a tokenizer; None before that, and
            where the tokenizer has no template.
        stop_tokens: Tokens that end an answer, as text; found together with `jinja`.
    """

    template: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    allow_control_tokens: bool = False
    jinja: str | None = None
    stop_tokens: tuple[str, ...] = ()

    @classmethod
    def from_settings(cls, settings: HasChatFormat) -> "ChatFormat":
        """Return the format that settings name, for any tokenizer."""
        return cls(settings.chat_template, settings.template_kwargs, settings.allow_control_tokens)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "") -> "ChatFormat":
        """Return the format in run.json or afina.json; the tokenizer's own where none is recorded.

        Runs without the key `chat` name the template in their settings.

        Raises:
            AdapterError: the record is damaged.
        """
        stored = record.get(CHAT_KEY)
        if stored is None:
            return cls(template=record.get("settings", {}).get("chat_template"))
        if not isinstance(stored, dict):
            raise AdapterError("chat is not an object", where=f"{where}: {CHAT_KEY}")
        known = {name: stored[name] for name in FIELD_TYPES if name in stored}
        for name, value in known.items():
            is_text_list = name != "stop_tokens" or all(isinstance(item, str) for item in value)
            if not (isinstance(value, FIELD_TYPES[name]) and is_text_list):
                raise AdapterError(f"{name} has a wrong type", where=f"{where}: {CHAT_KEY}.{name}")
        return cls(**known | {"stop_tokens": tuple(known.get("stop_tokens", ()))})

    def record(self) -> dict[str, Any]:
        """Return the value of the key `chat` of run.json and afina.json.

        It has the text of a template only where this is a file, which may be removed later. The
        tokenizer has its own; an adapter of other authors that has none is recognized by that.
        """
        return {
            "template": self.template,
            "kwargs": dict(self.kwargs),
            "allow_control_tokens": self.allow_control_tokens,
            "jinja": self.jinja if self.is_file else None,
            "stop_tokens": list(self.stop_tokens),
        }

    @property
    def is_file(self) -> bool:
        """Whether the template is neither the tokenizer's own nor a built-in one."""
        return self.template not in (None, *BUILT_IN)

    def with_arguments(self, kwargs: Mapping[str, Any]) -> "ChatFormat":
        """Return this format with `kwargs` in place of arguments of the same names."""
        return replace(self, kwargs={**self.kwargs, **kwargs}) if kwargs else self

    @property
    def rendering(self) -> tuple[str | None, dict[str, Any], bool]:
        """What decides how messages are written: formats with equal renderings are the same."""
        return self.jinja or self.template, dict(self.kwargs), self.allow_control_tokens

    @property
    def exported_jinja(self) -> str | None:
        """The template for programs that know its text alone: the arguments are its defaults.

        An argument of the same name overrides the default.
        """
        if self.jinja is None or not self.kwargs:
            return self.jinja
        defaults = "".join(
            f"{{%- if {name} is not defined %}}"
            f"{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
            for name, value in self.kwargs.items()
        )
        # ends in an expression: after a block tag, a line break of the template would be dropped
        return f"{defaults}{{{{ '' }}}}{self.jinja}"


def _literal(value: Any) -> str:
    """Return a JSON value as a literal of jinja."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        return f"'{escaped}'"
    if isinstance(value, Mapping):
        pairs = (f"{_literal(name)}: {_literal(item)}" for name, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return {"True": "true", "False": "false", "None": "none"}.get(str(value), str(value))
