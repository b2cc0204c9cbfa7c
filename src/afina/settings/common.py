"""Base classes of all settings, and the declaration of one setting."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

EMBEDDED = "embedded"


def setting(
    description: str,
    default: Any = None,
    *,
    job: bool = False,
    plugins: str | None = None,
    **constraints: Any,
) -> Any:
    """Declare one setting.

    Args:
        description: The help text.
        default: The default; `...` where the setting is required.
        job: Whether a fine-tuning job of the server may set it. Never for a setting that names a
            file or folder of the server's machine, or that runs code.
        plugins: The entry-point group in which other packages register values of the setting;
            the help text lists them.
        **constraints: Bounds, as in pydantic's `Field`.
    """
    extra: dict[str, Any] = {"job": True} if job else {}
    extra |= {"entry_points": plugins} if plugins else {}
    return Field(default, description=description, json_schema_extra=extra or None, **constraints)


class Settings(BaseModel):
    """Settings of a command or a group: immutable, unknown names are errors."""

    # validators are built when a command first reads its settings: all of them took 0.2 s of --help
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)


class ModelSettings(Settings):
    """Settings of every command that loads a frozen model."""

    base: str = setting("the frozen model: a folder, a Hugging Face name, or 'embedded'", EMBEDDED)
    revision: str | None = setting("branch, tag or commit of a Hugging Face name")
    trust_remote_code: bool = setting(
        "run Python code that comes with the model (recorded in the run)", False
    )
    dtype: Literal["auto", "stored", "float32", "bfloat16"] = setting(
        "dtype of the base's weights. stored: that of its files; auto: the same, but float32 on a "
        "CPU without instructions for bfloat16, where they fit",
        "auto",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("where to compute", "auto")


# what a command that starts runs passes on to each: the base, and how prompts are rendered
MODEL_SETTINGS = tuple(ModelSettings.model_fields)
CHAT_SETTINGS = ("chat_template", "template_kwargs", "allow_control_tokens")


def template_kwargs_setting(default: str = "none") -> Any:
    """Declare `template_kwargs`; `default` describes what is used without it."""
    description = (
        "arguments of the chat template, e.g. {enable_thinking: false}; by default " + default
    )
    return setting(description, {})


def allow_control_tokens_setting() -> Any:
    """Declare `allow_control_tokens`."""
    return setting(
        "read control tokens such as <|im_end|> in the texts of messages as tokens; by default "
        "they stay text",
        False,
    )


def job_settings(kind: type[Settings]) -> list[str]:
    """Return the names of the settings that a fine-tuning job of the server may set."""
    extras = ((name, field.json_schema_extra) for name, field in kind.model_fields.items())
    return [name for name, extra in extras if isinstance(extra, dict) and extra.get("job")]
