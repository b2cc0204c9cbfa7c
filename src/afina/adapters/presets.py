"""The names that people know are presets over the four choices, and nothing more.

[q][a]METHOD      q: on an NF4 base      a: activated, from its invocation on
qlora = lora on NF4      alora = lora from its invocation      qadora, amora, ... likewise
freeze = full on the last quarter of the blocks
"""

from dataclasses import dataclass
from typing import Literal

from afina.adapters.registry import get_method, registered_methods
from afina.errors import SettingsError
from afina.settings import POLICIES, PREFERENCES

# objectives that others call methods, and how they are asked for here
OBJECTIVES = {name: name for name in (*PREFERENCES, *POLICIES, "sft", "pretrain")} | {
    name: f"dpo --dpo.loss-type {name}" for name in ("ipo", "hinge", "robust")
}
LAST_SHARE = 4  # freeze trains the last quarter of the blocks


@dataclass(frozen=True)
class Preset:
    """What a method's name stands for; explicit settings override targets and layers."""

    method: str
    quantization: Literal["none", "nf4"] = "none"
    is_activated: bool = False
    targets: str = "all-linear"
    layers: str | None = None


def get_preset(name: str, blocks: int) -> Preset:
    """The choices behind a method's name, for a model of `blocks` blocks; raises `SettingsError` on an unknown one."""
    if name == "freeze":
        return Preset("full", targets="all", layers=f"last:{max(1, blocks // LAST_SHARE)}")
    known = registered_methods()
    if (objective := name.removeprefix("q").removeprefix("a")) in OBJECTIVES and name not in known:
        hint = f"--objective {OBJECTIVES[objective]}"
        why = "any method can learn by it"
        raise SettingsError(
            f"{objective} is an objective, not a method", where="method", why=why, hint=hint
        )
    prefix = next(
        (p for p in ("", "qa", "q", "a") if name.startswith(p) and name.removeprefix(p) in known),
        "",
    )
    delta = name.removeprefix(prefix)
    replaces = get_method(delta).replaces_base
    if replaces and prefix:
        why = "it trains the weights themselves: 4-bit codes have no gradient, and a trained weight acts on every token"
        raise SettingsError(
            f"{delta} cannot be combined with {prefix!r}",
            where="method",
            why=why,
            hint=f"--method {prefix}lora",
        )
    return Preset(
        delta,
        "nf4" if "q" in prefix else "none",
        "a" in prefix,
        "all" if replaces else "all-linear",
    )
