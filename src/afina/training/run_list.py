"""`afina runs`: the runs below a folder, and what differs between some of them.

A run that cannot be read is listed with the reason. Imports no torch.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from afina.errors import AfinaError, DataError, pluralize
from afina.io.jsonl import read_jsonl
from afina.io.migrations import migrate_settings
from afina.io.result import Content, Result, ResultTable, ResultText, format_seconds
from afina.io.run_record import (
    FAILURE_FILE,
    METRICS_FILE,
    RUN_FILE,
    SETTINGS_FILE,
    read_run_record,
)
from afina.io.strict_json import read_json_object
from afina.settings import RunsSettings

RUNNING_SECONDS = 120  # since the last step: a step takes seconds, so the run may still be going
MAX_NAME_WIDTH = 12  # characters of a line of a name in the list
MAX_DEPTH = 8  # folders below the one that is listed
NOT_COMPARED = {"output_dir", "resume", "overwrite", "format_version"}
NO_RUNS = "no runs"


@dataclass(frozen=True)
class RunSummary:
    """One run: what it was, how it ended, what it reached; None where that is not known.

    Losses are nats per token (or row), `forgetting` is the rise of the retention loss, memory is in
    MB. `score` is the task's own, in percent or a number.
    """

    path: str
    status: str  # finished, running, interrupted, failed or damaged
    reason: str | None
    base: str | None
    method: str | None
    objective: str | None
    rows: int | None
    steps: int | None
    score_name: str | None
    score_before: float | None
    score: float | None
    score_unit: str
    loss_before: float | None
    loss: float | None
    forgetting: float | None
    seconds: float | None
    planned_memory_mb: float | None
    memory_mb: float | None
    date: float
    settings: Mapping[str, Any]

    @property
    def state(self) -> str:
        """Status with the step that was reached, or the reason."""
        step = f" at step {self.steps:,}" if self.steps is not None else ""
        step = "" if self.status in ("finished", "damaged") else step
        return f"{self.status}{step}" + (f": {self.reason}" if self.reason else "")

    def results(self) -> dict[str, str]:
        """Return the measured values as text, by name."""
        unit, form = self.score_unit, ".1f" if self.score_unit else ".3f"
        sides = _sides(self.score_before, self.score, form, unit)
        return {
            "status": self.state,
            "rows": _count(self.rows),
            "steps": _count(self.steps),
            f"score: {self.score_name or 'none'}": sides,
            "eval loss": _sides(self.loss_before, self.loss, ".3f"),
            "forgetting": "" if self.forgetting is None else f"{self.forgetting:+.3f}",
            "time": "" if self.seconds is None else format_seconds(self.seconds),
            "memory": _memory(self.memory_mb, self.planned_memory_mb),
        }


@dataclass(frozen=True, eq=False)
class RunsResult(Result):
    """Runs below some folders, sorted."""

    folders: Sequence[str]
    runs: Sequence[Mapping[str, Any]]

    def content(self) -> list[Content]:
        """Return a table with a row per run; runs that did not end well also have a line."""
        if not self.runs:
            return [ResultText(f"{NO_RUNS} in {', '.join(self.folders)}")]
        runs = [RunSummary(**run) for run in self.runs]
        common = {name: _common(runs, name) for name in ("base", "method", "objective")}
        shared = [f"{name} {value}" for name, value in common.items() if value]
        varied = [name for name, value in common.items() if not value]
        table = [self._row(run, varied) for run in runs]
        head = ["run", *([" ".join(varied)] if varied else []), *HEAD]
        title = ", ".join([pluralize(len(runs), "run"), *shared])
        notes = [
            ResultText(f"{self._name(run)}: {run.state}")
            for run in runs
            if run.status != "finished"
        ]
        return [ResultTable(title, table, head), *notes, ResultText(NOTE)]

    def _name(self, run: RunSummary) -> str:
        [folder, *others] = self.folders
        name = run.path if others else os.path.relpath(run.path, folder)
        return Path(run.path).name if name == "." else name

    def _row(self, run: RunSummary, varied: Sequence[str]) -> tuple[str, ...]:
        values = [getattr(run, name) or "" for name in varied]
        what = [" ".join(_broken(Path(value).name) for value in values)] if varied else []
        _, rows, steps, score, _, *others = run.results().values()
        loss = _sides(run.loss_before, run.loss, ".2f")
        name = _broken(self._name(run))
        return (
            name,
            *what,
            ", ".join(filter(None, (rows, steps))),
            score,
            loss,
            *others,
        )


HEAD = ("rows, steps", "score", "eval loss", "forgot", "time", "memory")
NOTE = (
    "score, eval loss: before to after; forgot: rise of the retention loss, nats per token; "
    "memory: peak measured (planned), MB"
)


@dataclass(frozen=True, eq=False)
class RunComparison(Result):
    """Settings and results that differ between runs; values are in the order of `runs`."""

    runs: Sequence[str]
    settings: Mapping[str, Sequence[Any]]
    results: Mapping[str, Sequence[str]]

    def content(self) -> list[Content]:
        """Return one table of settings that differ, and one of results."""
        head = ("", *map(_broken, self.runs))
        settings = [(name, *map(_text, values)) for name, values in self.settings.items()]
        results = [(name, *values) for name, values in self.results.items()]
        first = ResultTable("settings that differ", settings, head)
        return [
            first if settings else ResultText("the settings are equal"),
            ResultTable("results", results, head),
            ResultText(NOTE),
        ]


def runs(settings: RunsSettings) -> RunsResult | RunComparison:
    """Return the runs below the folders of the settings, or the comparison of two or more runs.

    Raises:
        DataError: A folder does not exist.
    """
    folders = settings.runs or [Path("runs")]
    for folder in folders:
        if not folder.is_dir() and settings.runs:
            raise DataError("no such folder", where=str(folder), hint="afina runs FOLDER")
    if len(folders) > 1 and all(is_run(folder) for folder in folders):
        return _compare([summarize(folder) for folder in folders])
    found = [summarize(run) for folder in folders for run in find_runs(folder)]
    words = [word.lower() for word in settings.filter]
    chosen = [run for run in found if all(word in _searched(run) for word in words)]
    ordered = _sorted(chosen, settings.sort, settings.descending)
    return RunsResult([str(folder) for folder in folders], [asdict(run) for run in ordered])


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, finished or not."""
    return any((folder / name).is_file() for name in (RUN_FILE, METRICS_FILE))


def find_runs(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Yield the run folders below `folder`, in order of their names; links are not followed."""
    if is_run(folder):
        yield folder
        return
    try:
        children = sorted(one for one in folder.iterdir() if one.is_dir() and not one.is_symlink())
    except OSError:
        return
    for child in children if depth < MAX_DEPTH else ():
        yield from find_runs(child, depth + 1)


def summarize(folder: Path) -> RunSummary:
    """Return what is known about a run; a damaged one has a reason, and is never an error."""
    try:
        return _summary(folder)
    except AfinaError as error:
        reason = ", ".join(filter(None, (error.what, error.why)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
    return _filled(folder, "damaged", reason, {}, {}, None)


def _summary(folder: Path) -> RunSummary:
    record = read_run_record(folder)
    settings = record.get("settings") or _read_settings(folder / SETTINGS_FILE)
    if record:
        missing = [key for key in ("method", "base", "steps") if key not in record]
        if missing:
            raise DataError(f"{RUN_FILE} has no {missing[0]!r}")
        return _filled(folder, "finished", None, record, settings, record["steps"])
    metrics = folder / METRICS_FILE
    last = max((int(line.get("step", 0)) for line in read_jsonl(metrics)), default=0)
    if (folder / FAILURE_FILE).is_file():
        failure = read_json_object(folder / FAILURE_FILE)
        return _filled(folder, "failed", str(failure["what"]), record, settings, last)
    is_recent = time.time() - metrics.stat().st_mtime < RUNNING_SECONDS
    status = "running" if is_recent else "interrupted"
    return _filled(folder, status, None, record, settings, last)


def _filled(
    folder: Path,
    status: str,
    reason: str | None,
    record: Mapping[str, Any],
    settings: Mapping[str, Any],
    steps: int | None,
) -> RunSummary:
    losses, base = record.get("losses") or {}, record.get("base") or {}
    sign = -1.0 if "policy" in record else 1.0  # whose losses are minus the reward
    loss = [_number(losses.get(f"eval_loss_{side}")) for side in ("before", "after")]
    before, after = (None if value is None else sign * value for value in loss)
    return RunSummary(
        path=str(folder),
        status=status,
        reason=reason,
        base=base.get("name") or settings.get("base"),
        method=settings.get("method") or record.get("method"),
        objective=record.get("objective") or settings.get("objective"),
        rows=(record.get("data") or {}).get("rows"),
        steps=steps,
        **_score(record),
        loss_before=before,
        loss=after,
        forgetting=_number(losses.get("forgetting")),
        seconds=_number(record.get("seconds")),
        planned_memory_mb=_number(record.get("planned_memory_mb")),
        memory_mb=_number(record.get("peak_memory_mb")),
        date=max((one.stat().st_mtime for one in _dated(folder)), default=0.0),
        settings=dict(settings),
    )


def _score(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task's own score; that of a run before it was recorded, from its report."""
    score = record.get("score")
    if score is None and "classes" in record and "accuracy" in record["classes"]:
        score = {"name": "accuracy", "after": record["classes"]["accuracy"], "unit": "%"}
    if score is None and "policy" in record:
        sides = {side: record["policy"][side]["reward"] for side in ("before", "after")}
        score = {"name": "mean reward", "unit": "", **sides}
    score = score or {}
    return {
        "score_name": score.get("name"),
        "score_before": _number(score.get("before")),
        "score": _number(score.get("after")),
        "score_unit": score.get("unit", ""),
    }


def _read_settings(file: Path) -> dict[str, Any]:
    values = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(values, dict):
        raise DataError(f"{SETTINGS_FILE} is not a mapping")
    return migrate_settings(values)


def _dated(folder: Path) -> Iterator[Path]:
    return (file for name in (RUN_FILE, METRICS_FILE) if (file := folder / name).is_file())


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _compare(found: Sequence[RunSummary]) -> RunComparison:
    flat = [_flattened(run.settings) for run in found]
    names = [n for n in dict.fromkeys(n for one in flat for n in one) if n not in NOT_COMPARED]
    settings = {name: [one.get(name) for one in flat] for name in names}
    results = [run.results() for run in found]
    rows = {name: [one.get(name, "") for one in results] for one in results for name in one}
    return RunComparison(
        [run.path for run in found],
        {name: values for name, values in settings.items() if len(set(map(str, values))) > 1},
        rows,
    )


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        is_group = isinstance(value, Mapping) and value
        flat |= _flattened(value, f"{prefix}{name}.") if is_group else {f"{prefix}{name}": value}
    return flat


def _sorted(found: Sequence[RunSummary], key: str, descending: bool) -> list[RunSummary]:
    attribute = {"name": "path", "time": "seconds", "memory": "memory_mb"}.get(key, key)
    known = [run for run in found if getattr(run, attribute) is not None]
    unknown = [run for run in found if getattr(run, attribute) is None]
    ordered = sorted(known, key=lambda run: getattr(run, attribute), reverse=descending)
    return ordered + unknown


def _searched(run: RunSummary) -> str:
    values = (run.path, run.base, run.method, run.objective, run.status)
    return " ".join(map(str, values)).lower()


def _common(found: Sequence[RunSummary], name: str) -> str | None:
    values = {getattr(run, name) for run in found}
    return str(values.pop()) if len(values) == 1 else None


def _broken(name: str) -> str:
    """Return a name in lines of at most `MAX_NAME_WIDTH` characters, broken behind - _ / or dot."""
    lines = [""]
    for part in re.split(r"(?<=[-_/.])", name):
        if lines[-1] and len(lines[-1]) + len(part) > MAX_NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _sides(before: float | None, after: float | None, form: str, unit: str = "") -> str:
    return " to ".join(f"{side:{form}}{unit}" for side in (before, after) if side is not None)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _memory(measured: float | None, planned: float | None) -> str:
    plan = "" if planned is None else f" ({planned:,.0f})"
    return "" if measured is None else f"{measured:,.0f}{plan}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
