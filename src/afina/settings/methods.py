"""Settings of the adapter methods, one class each; other methods have no settings."""

from typing import Literal

from afina.settings.common import setting
from afina.settings.groups import MethodSettings, register_group

_RESTART = (
    "optimizer steps between merges (ReLoRA): the update is added to a dense delta and learning "
    "restarts, so the sum may have a higher rank; 0 or not set: never"
)


@register_group("lora")
class LoRASettings(MethodSettings):
    """Settings of LoRA (arXiv 2106.09685)."""

    restart_steps: int | None = setting(_RESTART, ge=0, job=True)


@register_group("mora")
class MoRASettings(MethodSettings):
    """Settings of MoRA (arXiv 2405.12130)."""

    operator: Literal["truncation", "sharing", "decoupling", "rotation"] | None = setting(
        "how inputs are compressed to the square matrix and its outputs spread again; by default "
        "rotation up to rank 64, sharing beyond",
        job=True,
    )
    grouping: Literal["strided", "adjacent"] | None = setting(
        "sharing: which inputs are summed, every n-th (strided, the default) or neighbors"
    )
    use_alpha: bool | None = setting("scale the update by alpha, as LoRA does; by default not")
    restart_steps: int | None = setting(_RESTART, ge=0, job=True)
