"""The names that people know are presets over the four choices, and nothing more."""

from dataclasses import dataclass

from afina.delta.contract import method

LAST_SHARE = 4  # freeze trains the last quarter of the blocks


@dataclass(frozen=True)
class Preset:
    """What a method's name stands for; explicit settings override it."""

    delta: str
    targets: str
    layers: str | None = None


def preset(name: str, blocks: int) -> Preset:
    """The choices behind a method's name, for a model of `blocks` blocks; raises `SettingsError` on an unknown one."""
    if name == "freeze":
        return Preset("full", "all", f"last:{max(1, blocks // LAST_SHARE)}")
    return Preset(name, "all" if method(name).kinds == "any" else "all-linear")
