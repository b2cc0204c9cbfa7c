"""Settings of `afina show`."""

from pathlib import Path

from afina.settings.common import Settings, setting


class ShowSettings(Settings):
    """Settings of `afina show`."""

    adapter: Path = setting("a run, an adapter or a composition", ...)
