"""Base classes of all settings, and the declaration of one setting."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

EMBEDDED = "embedded"


def setting(description: str, default: Any = None, **constraints: Any) -> Any:
    """Declare one setting: its help text, its default (`...` where it is required) and its bounds."""
    return Field(default=default, description=description, **constraints)


class Settings(BaseModel):
    """What every verb's settings share: frozen, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelSettings(Settings):
    """Which frozen model, and how it is loaded."""

    base: str = setting("the frozen model: a folder, a Hugging Face name, or 'embedded'", EMBEDDED)
    revision: str | None = setting("branch, tag or commit of a Hugging Face name")
    trust_remote_code: bool = setting(
        "run Python code that comes with the model (recorded in the run)", False
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "how the base's weights are held", "auto"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("where to compute", "auto")
