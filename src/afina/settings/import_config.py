"""Settings of `afina import`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import Settings, setting


class ImportSettings(Settings):
    """Settings of `afina import`."""

    file: Path = setting(
        "the configuration: YAML or JSON of Axolotl, LLaMA-Factory, mlx-lm or TRL, a script with "
        "the command of one of them, or a Python file or notebook of TRL or Unsloth",
        ...,
    )
    tool: Literal["axolotl", "llama_factory", "mlx_lm", "trl", "unsloth"] | None = setting(
        "the tool that the configuration is of; by default detected by its keys"
    )
    output: Path | None = setting("the settings file; by default NAME.afina.yaml")
    overwrite: bool = setting("replace that file, if there is one", False)
    leave_out: list[str] = setting(
        "keys without a twin to leave out, although another model is learned without them", []
    )
    base: str | None = setting("another base than that of the configuration")
    data: str | None = setting("another data set than that of the configuration")
