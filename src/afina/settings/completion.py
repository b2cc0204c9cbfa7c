"""Settings of `afina completion`."""

from typing import Literal

from afina.settings.common import Settings, setting


class CompletionSettings(Settings):
    """Settings of `afina completion`."""

    shell: Literal["bash", "zsh", "fish"] = setting("the shell", ...)
