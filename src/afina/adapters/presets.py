"""Method names as presets over method, quantization, activation and targets.

[q][a]METHOD      q: on an NF4 base      a: activated, from its invocation on
qlora = lora on NF4      alora = lora from its invocation      qadora, amora, ... likewise
freeze = full on the last quarter of the layers
"""

from dataclasses import dataclass
from typing import Literal

from afina.adapters.registry import get_method, registered_methods
from afina.errors import SettingsError
from afina.settings import POLICIES, PREFERENCES

# objectives that are often called methods, and the flags that select them
OBJECTIVES = {name: name for name in (*PREFERENCES, *POLICIES, "sft", "pretrain")} | {
    name: f"dpo --dpo.loss-type {name}" for name in ("ipo", "hinge", "robust")
}
FREEZE_DIVISOR = 4  # freeze trains the last quarter of the layers


@dataclass(frozen=True)
class Preset:
    """Choices behind a method's name; explicit settings override targets and layers."""

    method: str
    quantization: Literal["none", "nf4"] = "none"
    is_activated: bool = False
    targets: str = "all-linear"
    layers: str | None = None


def get_preset(name: str, num_layers: int) -> Preset:
    """Return the preset of a method's name for a model with `num_layers` layers.

    Raises:
        SettingsError: the name is unknown, an objective, or not a possible combination.
    """
    if name == "freeze":
        return Preset("full", targets="all", layers=f"last:{max(1, num_layers // FREEZE_DIVISOR)}")
    known = registered_methods()
    if (objective := name.removeprefix("q").removeprefix("a")) in OBJECTIVES and name not in known:
        hint = f"--objective {OBJECTIVES[objective]}"
        why = "every method can train with it"
        raise SettingsError(
            f"{objective} is an objective, not a method", where="method", why=why, hint=hint
        )
    prefix = next(
        (p for p in ("", "qa", "q", "a") if name.startswith(p) and name.removeprefix(p) in known),
        "",
    )
    method = name.removeprefix(prefix)
    replaces = get_method(method).replaces_base
    if replaces and prefix:
        why = "it trains weights: 4-bit codes have no gradient, and weights apply to every token"
        raise SettingsError(
            f"{method} cannot be combined with {prefix!r}",
            where="method",
            why=why,
            hint=f"--method {prefix}lora",
        )
    return Preset(
        method,
        "nf4" if "q" in prefix else "none",
        "a" in prefix,
        "all" if replaces else "all-linear",
    )
