"""Folder of a comparison: its settings, the values that are computed once, and its clock.

OUT/settings.json       settings of the comparison     OUT/trials/METHOD-RATE-STEPS/  search runs
OUT/train|choose|test   the rows, split once           OUT/runs/METHOD-SEED/          final runs
OUT/cost/METHOD.json    measured cost of each method   OUT/judged/METHOD-SEED.json    their scores
OUT/schedule.json       trials, steps and seeds        OUT/compare.json, report.md, report.html

Existing files are not computed again: a comparison that was interrupted at any moment resumes.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afina.comparison.split import KINDS
from afina.errors import SettingsError
from afina.io.atomic import require_new_directory, write_json
from afina.io.migrations import migrate_comparison_settings
from afina.io.strict_json import read_json_object
from afina.settings import CompareSettings, resolved

# settings that may change when a comparison is resumed; rows are identified by their content
CHANGEABLE = ("time_budget", "lang", "output_dir", "data", "device")
# files and folders that are written before the first run
PREPARED_FILES = ("rows.json", "line.txt", "steps.json", "judging.json", "clock.json")
PREPARED_DIRS = ("judged", "cost")


class ComparisonFolder:
    """Folder of a comparison, new or resumed.

    Raises:
        SettingsError: The folder contains something else, or a comparison with other settings.
    """

    def __init__(self, settings: CompareSettings) -> None:
        self.path = settings.output_dir or Path("runs") / f"compare-{settings.data.stem}"
        file, now = self.path / "settings.json", resolved(settings)
        if file.is_file():
            self._check_settings(migrate_comparison_settings(read_json_object(file)), now)
        else:
            require_new_directory(self.path)
        write_json(file, now)
        self._started, clock = time.perf_counter(), self.read("clock.json") or {"seconds": 0.0}
        self._before = clock["seconds"]

    def _check_settings(self, recorded: dict[str, Any], now: dict[str, Any]) -> None:
        fields = CompareSettings.model_fields.items()
        before = {name: field.get_default() for name, field in fields} | recorded
        for name in now:
            if name in CHANGEABLE or before.get(name) == now[name]:
                continue
            if not (self.path / "schedule.json").is_file():
                return self._clear()  # no run has started: settings may still be corrected
            raise SettingsError(
                f"{name} is {before.get(name)!r} in this comparison, {now[name]!r} now",
                where=str(self.path),
                hint="another --output-dir, or the same settings to resume",
            )

    def _clear(self) -> None:
        """Delete the files that were written before the first run."""
        for name in (*PREPARED_FILES, *(f"{kind}.jsonl" for kind in KINDS)):
            (self.path / name).unlink(missing_ok=True)
        for name in PREPARED_DIRS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def read(self, name: str) -> Any:
        """Return the JSON value of a file; None where there is none."""
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else None

    def compute_once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value of a file, which `compute` returns the first time."""
        known = self.read(name)
        if known is None:
            write_json(self.path / name, known := compute())
            self.tick()
        return known

    def tick(self) -> None:
        """Record the seconds spent: the budget covers all starts of a comparison together."""
        write_json(self.path / "clock.json", {"seconds": self.spent})

    @property
    def spent(self) -> float:
        """Seconds that the comparison has taken, over all its starts."""
        return float(self._before + time.perf_counter() - self._started)
