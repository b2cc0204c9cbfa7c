"""Settings of `afina runs`."""

from pathlib import Path
from typing import Literal

from afina.settings.common import Settings, setting

RunOrder = Literal[
    "date", "name", "method", "steps", "score", "loss", "forgetting", "time", "memory"
]


class RunsSettings(Settings):
    """Settings of `afina runs`."""

    runs: list[Path] = setting(
        "folders of runs to list (default: runs), or two or more runs to compare", []
    )
    sort: RunOrder = setting("what the list is sorted by; unknown values come last", "date")
    descending: bool = setting("sort from high to low, or from new to old", False)
    filter: list[str] = setting(
        "only runs with all these words in name, base, method, objective or status", []
    )
