"""`afina compare`: measure adapter methods on one base and one dataset within a time budget.

The rows are split, each method's cost is measured, a schedule is chosen that fits the budget, a
search selects the learning rates, and the final runs are trained seed by seed; each step leaves its
files in the folder (see `comparison_folder`), so that an interrupted comparison resumes.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from afina.adapters.presets import Preset, get_preset
from afina.comparison.collect_result import collect_result
from afina.comparison.comparison_folder import ComparisonFolder
from afina.comparison.cost_probe import STEPS, measure_in_subprocess
from afina.comparison.results import ComparisonResult
from afina.comparison.run_scores import RunScorer
from afina.comparison.runs import failure_reason, is_finished, run_settings, train_all
from afina.comparison.schedule import (
    Schedule,
    choose_schedule,
    rates_to_try,
    rungs,
    search_seconds,
    seed_seconds,
    steps_that_fit,
)
from afina.comparison.split import ComparisonSplit, split_rows
from afina.errors import SettingsError, TrainingError
from afina.io.atomic import write_json, write_text
from afina.io.migrations import rename_keys
from afina.models.loading import configured_width
from afina.objectives.registry import get_objective
from afina.settings import CompareSettings, TrainSettings, as_settings
from afina.training.setup.set_up import default_learning_rate, set_up_run
from afina.training.trainer import read_metrics

EPOCHS = 3.0
MAX_COST_RATIO = 0.25  # of the budget: a method whose few steps take longer is left out
Log = Callable[[str], None]


class Comparison:
    """Comparison with its folder, its rows and the methods that have not failed."""

    def __init__(self, settings: CompareSettings, log: Log) -> None:
        self.settings, self.log = settings, log
        for name in settings.methods:
            self.preset(name)  # raise for an unknown method before any run
        self.folder = ComparisonFolder(settings)
        self.rows: ComparisonSplit = split_rows(settings, self.folder.path)
        self.scorer = RunScorer(settings, self.rows)
        self.metric = self.scorer.metric()
        self.failed: dict[str, str] = {}
        self.notes: list[tuple[str, dict[str, Any]]] = []
        if self.rows.skipped:
            self.notes.append(("rows_skipped", {"what": self.rows.skipped}))

    @property
    def active_methods(self) -> list[str]:
        """Methods that have not failed."""
        return [name for name in self.settings.methods if name not in self.failed]

    def preset(self, name: str) -> Preset:
        """Return the preset of a method or variant."""
        return get_preset(self.settings.settings_for(name)["method"], 1)

    def run(self, name: str, rate: float, steps: int, seed: int, out: str) -> TrainSettings:
        """Return the settings of one run of a method."""
        return run_settings(
            self.settings,
            self.rows,
            name,
            rate,
            steps,
            self.settings.seed + seed,
            self.folder.path / out,
        )

    def trial(self, name: str, rate: float, steps: int, out: str) -> TrainSettings:
        """Return the settings of a search run; its retention text is one line, to save time."""
        line = self.folder.path / "line.txt"
        if not line.is_file():
            write_text(line, "The sun is above the sea. El sol está sobre el mar.\n")
        run = self.run(name, rate, steps, 0, out)
        if self.rows.objective == "classify":  # a classifier has no retention loss
            return run
        return run.model_copy(update={"retention_text": line})

    # ---- before the first run

    def default_max_steps(self) -> int:
        """Return the steps of three epochs, unless set; loads the base, and raises its errors."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        each = set_up_run(self.run(self._first(), 1e-4, 1, 0, "none")).prepared.task.steps_per_epoch
        return max(1, round(EPOCHS * each))

    def nf4_base_scores(self) -> dict[str, Any] | None:
        """Return the scores of the NF4 base, where a method uses it; None otherwise."""
        if self.rows.objective == "classify" or all(
            self.preset(name).quantization == "none" for name in self.settings.methods
        ):
            return None
        return dict(
            self.folder.compute_once("judged/base-nf4.json", partial(self.scorer.base, "nf4"))
        )

    def _first(self) -> str:
        """Return a method to count steps with: they are equal for all methods."""
        return next(
            (name for name in self.settings.methods if self.preset(name).quantization == "none"),
            self.settings.methods[0],
        )

    def costs(self) -> dict[str, dict[str, Any]]:
        """Return the measured cost of each method; one that fails is left out from then on."""
        found = {}
        for name in self.settings.methods:
            self.log(f"measuring {name}")
            file = self.folder.path / f"cost/{name}.json"
            if not self.folder.read("schedule.json") and "failed" in (
                self.folder.read(f"cost/{name}.json") or {}
            ):
                file.unlink()  # nothing is decided yet: another try, with another budget perhaps
            cost = self.folder.compute_once(f"cost/{name}.json", partial(self._cost, name))
            if "failed" in cost:
                self.failed[name] = cost["failed"]
            else:
                found[name] = cost
        if not found:
            if all(self.folder.read(f"cost/{name}.json").get("late") for name in self.failed):
                why = (
                    f"{STEPS} steps of a method may take {100 * MAX_COST_RATIO:.0f}% of it, "
                    "and no method was that fast"
                )
                what, hint = (
                    f"the budget of {self.settings.time_budget} is too small",
                    "a larger one: --time-budget 30m",
                )
                raise SettingsError(what, where=str(self.folder.path), why=why, hint=hint)
            first = next(iter(self.failed))
            raise TrainingError("no method could be run", where=first, why=self.failed[first])
        return found

    def _cost(self, name: str) -> dict[str, Any]:
        folder = self.folder.path / "cost" / name
        shutil.rmtree(folder, ignore_errors=True)
        cost = measure_in_subprocess(
            self.trial(name, self._usual(name), STEPS, f"cost/{name}"),
            MAX_COST_RATIO * self.settings.seconds,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return cost

    @cached_property
    def width(self) -> int | None:
        """Hidden size of the base."""
        return configured_width(self.settings)

    def _usual(self, name: str) -> float:
        objective = get_objective(self.rows.objective)
        return default_learning_rate(self.preset(name).method, objective, self.width)

    def schedule(
        self, costs: Mapping[str, Mapping[str, float]], judging: float, steps: int
    ) -> Schedule:
        """Return the schedule for the remaining budget; raise `SettingsError` if none fits."""
        given, left = self.settings, self.settings.seconds - self.folder.spent
        fitted = choose_schedule(costs, judging, given.num_trials, steps, given.num_seeds, left)
        if fitted.seconds > left:
            need = 60 * int(1 + (fitted.seconds + self.folder.spent) / 0.85 // 60)
            raise SettingsError(
                f"the budget of {given.time_budget} is too small",
                where=str(self.folder.path),
                why="the smallest schedule, one run of a few steps of each of "
                f"{len(costs)} methods, takes about {fitted.seconds:.0f} s more",
                hint=f"--time-budget {need // 60}m, fewer --methods, a lower --limit, or less data",
            )
        return fitted

    def shortened(self, schedule: Schedule, costs: Any, judging: float, pace: float) -> Schedule:
        """Return the schedule, with fewer steps where the machine is too slow for one seed."""
        left = self.settings.seconds - self.folder.spent
        some = {name: costs[name] for name in self.active_methods}
        steps = self.folder.compute_once(
            "steps_run.json", lambda: steps_that_fit(some, judging, schedule.steps, pace, left)
        )
        if steps < schedule.steps:
            self.notes.append(("steps_cut", {"steps": steps, "planned": schedule.steps}))
        return replace(schedule, steps=steps)

    # ---- search and runs

    def cached_search(
        self, schedule: Schedule, costs: Any
    ) -> tuple[dict[str, dict[str, Any]], float]:
        """Return the stored result of `search`, and its slowdown against the plan (1 or more)."""

        def search() -> dict[str, Any]:
            begun, names = self.folder.spent, self.active_methods
            rates = self.search(schedule)
            planned = sum(
                search_seconds(costs[name], schedule.trials, schedule.steps) for name in names
            )
            return {
                "rates": rates,
                "failed": self.failed,
                "pace": max(1.0, (self.folder.spent - begun) / planned) if planned else 1.0,
            }

        found = self.folder.compute_once("search.json", search)
        self.failed |= found["failed"]
        rates = {
            name: rename_keys(rate, {"edge": "at_search_boundary"})  # begun with version 0.1
            for name, rate in found["rates"].items()
        }
        return rates, found["pace"]

    def search(self, schedule: Schedule) -> dict[str, dict[str, Any]]:
        """Return {"rate", "tried": [[rate, steps, loss]], "at_search_boundary"} of each method."""
        rates = {
            name: rates_to_try(self._usual(name), schedule.trials, self.settings.lr_search_range)
            for name in self.active_methods
        }
        tried: dict[str, list[list[Any]]] = {name: [] for name in rates}
        left = dict(rates)
        for number, steps in rungs(schedule.trials, schedule.steps):
            self.log(f"learning rates: {number} of each method, {steps} steps")
            runs = {
                (n, r): self.trial(n, r, steps, f"trials/{n}-{r:g}-{steps}")
                for n in left
                for r in left[n]
            }
            train_all(list(runs.values()))
            self.folder.tick()
            for name in list(left):
                found = {rate: self._chosen_loss(runs[name, rate]) for rate in left[name]}
                tried[name] += [[rate, steps, loss] for rate, loss in found.items()]
                good = sorted((loss, rate) for rate, loss in found.items() if loss is not None)
                if not good:
                    why = failure_reason(
                        self.folder.path / f"trials/{name}-{left[name][0]:g}-{steps}"
                    )
                    self.failed[name] = why or "every learning rate failed"
                    del left[name]
                    continue
                left[name] = [rate for _, rate in good[: -(-len(found) // 2)]]
        return {
            name: {
                "rate": some[0],
                "tried": tried[name],
                "at_search_boundary": schedule.trials > 2
                and some[0] in (rates[name][0], rates[name][-1]),
            }
            for name, some in left.items()
        }

    def _chosen_loss(self, run: TrainSettings) -> float | None:
        """Return the best dev loss of a trial, None where it failed, and delete its weights."""
        assert run.output_dir is not None
        if not is_finished(run.output_dir):
            return None
        shutil.rmtree(run.output_dir / "adapter", ignore_errors=True)
        return min(
            line["eval_loss"]
            for line in read_metrics(run.output_dir)
            if line["eval_loss"] is not None
        )

    def final_runs(
        self,
        schedule: Schedule,
        rates: Mapping[str, Mapping[str, Any]],
        costs: Any,
        judging: float,
        pace: float,
    ) -> int:
        """Train and evaluate all methods seed by seed within the budget; return the seeds done."""
        slow = (self.folder.read("pace.json") or {"pace": pace})["pace"]
        for seed in range(schedule.seeds):
            done = all(
                (self.folder.path / f"judged/{name}-{seed}.json").is_file()
                for name in self.active_methods
            )
            need = slow * sum(
                seed_seconds(costs[name], schedule.steps, judging) for name in self.active_methods
            )
            if seed and not done and self.folder.spent + need > self.settings.seconds:
                self.notes.append(("seeds_cut", {"seeds": seed, "planned": schedule.seeds}))
                return seed
            self.log(
                f"seed {seed + 1} of {schedule.seeds}: "
                f"{', '.join(self.active_methods)}, {schedule.steps} steps"
            )
            begun = time.perf_counter()
            names = [name for name in rates if name not in self.failed]
            runs = {
                name: self.run(
                    name, rates[name]["rate"], schedule.steps, seed, f"runs/{name}-{seed}"
                )
                for name in names
            }
            train_all(list(runs.values()))
            for name in sorted(
                names, key=lambda name: self.preset(name).quantization
            ):  # each base is loaded once
                folder = self.folder.path / f"runs/{name}-{seed}"
                if why := failure_reason(folder):
                    self.failed[name] = f"seed {seed}: {why}"
                else:
                    self.folder.compute_once(
                        f"judged/{name}-{seed}.json", partial(self.scorer.run, folder, name)
                    )
            if not done:
                slow = max(1.0, slow * (time.perf_counter() - begun) / need) if need else slow
                write_json(self.folder.path / "pace.json", {"pace": slow})
        return schedule.seeds


def compare(
    data: str | Path | CompareSettings, *, log: Log = lambda text: None, **values: Any
) -> ComparisonResult:
    """Compare methods on `data`; settings as in `afina compare --help`.

    Returns:
        The contents of compare.json; a method that failed is listed in `failed`.

    Raises:
        AfinaError: The rows, the base or the settings are wrong, or no schedule fits the budget.
    """
    settings = as_settings(CompareSettings, data, "data", values)
    one = Comparison(settings, log)
    folder, counts = one.folder, one.rows.counts
    log(f"{counts['train']} training rows, {counts['test']} test rows")
    steps = folder.compute_once("steps.json", one.default_max_steps)
    begun = folder.spent
    base = folder.compute_once("judged/base.json", one.scorer.base)
    judging = folder.compute_once("judging.json", lambda: folder.spent - begun)
    one.nf4_base_scores()
    costs = one.costs()
    planned = folder.compute_once(
        "schedule.json", lambda: one.schedule(costs, judging, steps).as_dict()
    )
    schedule = Schedule(**planned)
    log(
        f"{schedule.trials} learning rates, {schedule.seeds} seeds, {schedule.steps} steps: "
        f"about {schedule.seconds / 60:.1f} min"
    )
    rates, pace = one.cached_search(schedule, costs)
    schedule = one.shortened(schedule, costs, judging, pace)
    seeds = one.final_runs(schedule, rates, costs, judging, pace)
    result = collect_result(
        settings,
        folder,
        one.rows,
        one.metric,
        schedule=schedule,
        seeds=seeds,
        rates=rates,
        costs=costs,
        base=base,
        failed=one.failed,
        notes=one.notes,
    )
    write_json(folder.path / "compare.json", dict(result))
    result.write_report()
    return result
