"""`afina compare`: measure adapter methods on one base and one dataset within a time budget.

OUT/settings.json       settings of the comparison     OUT/trials/METHOD-RATE-STEPS/  search runs
OUT/train|choose|test   the rows, split once           OUT/runs/METHOD-SEED/          final runs
OUT/cost/METHOD.json    measured cost of each method   OUT/judged/METHOD-SEED.json    their scores
OUT/schedule.json       trials, steps and seeds        OUT/compare.json, report.md, report.html

Existing files are not computed again: a comparison that was interrupted at any moment resumes.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import afina
from afina.adapters.presets import Preset, get_preset
from afina.comparison import analysis as findings
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
from afina.comparison.split import KINDS, ComparisonSplit, split_rows
from afina.errors import SettingsError, TrainingError
from afina.io.atomic import write_json, write_text
from afina.io.migrations import migrate_comparison_settings, rename_keys
from afina.io.run_record import read_run_record
from afina.io.strict_json import read_json_object
from afina.objectives.registry import get_objective
from afina.settings import CompareSettings, TrainSettings, make_settings, resolved
from afina.training.setup.set_up import default_learning_rate, set_up_run
from afina.training.trainer import read_metrics

KIND, COMPARISON_FORMAT_VERSION = "afina comparison", 2
EPOCHS = 3.0
MEASURED = 0.25  # ratio of the budget: a method whose few steps take longer is left out
# settings that may change when a comparison is resumed; rows are identified by their content
FREE = ("time_budget", "lang", "output_dir", "data", "device")
Say = Callable[[str], None]


class Comparison:
    """Comparison with its folder, its clock and the methods that have not failed."""

    def __init__(self, settings: CompareSettings, say: Say) -> None:
        self.settings, self.say = settings, say
        self.folder = settings.output_dir or Path("runs") / f"compare-{settings.data.stem}"
        for name in settings.methods:
            self.preset(name)  # raise for an unknown method before any run
        self._begin()
        self.rows: ComparisonSplit = split_rows(settings, self.folder)
        self.judge = RunScorer(settings, self.rows)
        self.metric = self.judge.metric()
        self.failed: dict[str, str] = {}
        self.notes: list[tuple[str, dict[str, Any]]] = []
        if self.rows.skipped:
            self.notes.append(("rows_skipped", {"what": self.rows.skipped}))
        self._started, self._before = (
            time.perf_counter(),
            self._read("clock.json", {"seconds": 0.0})["seconds"],
        )

    # ---- the folder, and the clock

    def _begin(self) -> None:
        file, now = self.folder / "settings.json", resolved(self.settings)
        if file.is_file():
            defaults = {
                name: field.get_default() for name, field in CompareSettings.model_fields.items()
            }
            before = defaults | migrate_comparison_settings(read_json_object(file))
            changed = [name for name in now if name not in FREE and before.get(name) != now[name]]
            if changed and not (self.folder / "schedule.json").is_file():
                self._sweep()  # no run has started: settings may still be corrected
            elif changed:
                name = changed[0]
                raise SettingsError(
                    f"{name} is {before.get(name)!r} in this comparison, {now[name]!r} now",
                    where=str(self.folder),
                    hint="another --output-dir, or the same settings to resume",
                )
        elif self.folder.is_file():
            raise SettingsError(
                "this is a file",
                where=str(self.folder),
                hint="choose another --output-dir: a folder",
            )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise SettingsError(
                "this folder is not empty",
                where=str(self.folder),
                hint="choose another --output-dir",
            )
        write_json(file, now)

    def _sweep(self) -> None:
        """Delete the files that were written before the first run."""
        for name in ("rows.json", "line.txt", "steps.json", "judging.json", "clock.json"):
            (self.folder / name).unlink(missing_ok=True)
        for name in KINDS:
            (self.folder / f"{name}.jsonl").unlink(missing_ok=True)
        for name in ("judged", "cost"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _read(self, name: str, otherwise: Any = None) -> Any:
        file = self.folder / name
        return json.loads(file.read_text()) if file.is_file() else otherwise

    def _keep(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the stored JSON value of a file, which `make` computes the first time."""
        known = self._read(name)
        if known is None:
            write_json(self.folder / name, known := make())
            self.tick()
        return known

    def tick(self) -> None:
        """Record the seconds spent: the budget covers all starts of a comparison together."""
        write_json(self.folder / "clock.json", {"seconds": self.spent})

    @property
    def spent(self) -> float:
        """Seconds that the comparison has taken, over all its starts."""
        return float(self._before + time.perf_counter() - self._started)

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
            self.folder / out,
        )

    def trial(self, name: str, rate: float, steps: int, out: str) -> TrainSettings:
        """Return the settings of a search run; its retention text is one line, to save time."""
        line = self.folder / "line.txt"
        if not line.is_file():
            write_text(line, "The sun is above the sea. El sol está sobre el mar.\n")
        return self.run(name, rate, steps, 0, out).model_copy(update={"retention_text": line})

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
        return dict(self._keep("judged/base-nf4.json", partial(self.judge.base, "nf4")))

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
            self.say(f"measuring {name}")
            file = self.folder / f"cost/{name}.json"
            if not self._read("schedule.json") and "failed" in self._read(f"cost/{name}.json", {}):
                file.unlink()  # nothing is decided yet: another try, with another budget perhaps
            cost = self._keep(f"cost/{name}.json", partial(self._cost, name))
            if "failed" in cost:
                self.failed[name] = cost["failed"]
            else:
                found[name] = cost
        if not found:
            if all(self._read(f"cost/{name}.json").get("late") for name in self.failed):
                why = (
                    f"{STEPS} steps of a method may take {100 * MEASURED:.0f}% of it, "
                    "and no method was that fast"
                )
                what, hint = (
                    f"the budget of {self.settings.time_budget} is too small",
                    "a larger one: --time-budget 30m",
                )
                raise SettingsError(what, where=str(self.folder), why=why, hint=hint)
            first = next(iter(self.failed))
            raise TrainingError("no method could be run", where=first, why=self.failed[first])
        return found

    def _cost(self, name: str) -> dict[str, Any]:
        folder = self.folder / "cost" / name
        shutil.rmtree(folder, ignore_errors=True)
        cost = measure_in_subprocess(
            self.trial(name, self._usual(name), STEPS, f"cost/{name}"),
            MEASURED * self.settings.seconds,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return cost

    def _usual(self, name: str) -> float:
        return default_learning_rate(self.preset(name).method, get_objective(self.rows.objective))

    def schedule(
        self, costs: Mapping[str, Mapping[str, float]], judging: float, steps: int
    ) -> Schedule:
        """Return the schedule that fits the rest of the budget; raise `SettingsError` if none does."""
        told, left = self.settings, self.settings.seconds - self.spent
        made = choose_schedule(costs, judging, told.num_trials, steps, told.num_seeds, left)
        if made.seconds > left:
            need = 60 * int(1 + (made.seconds + self.spent) / 0.85 // 60)
            raise SettingsError(
                f"the budget of {told.time_budget} is too small",
                where=str(self.folder),
                why="the smallest schedule, one run of a few steps of each of "
                f"{len(costs)} methods, takes about {made.seconds:.0f} s more",
                hint=f"--time-budget {need // 60}m, fewer --methods, a lower --limit, or less data",
            )
        return made

    def shortened(self, schedule: Schedule, costs: Any, judging: float, pace: float) -> Schedule:
        """Return the schedule, with fewer steps where the machine is too slow for one seed of it."""
        left = self.settings.seconds - self.spent
        some = {name: costs[name] for name in self.active_methods}
        steps = self._keep(
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
            begun, names = self.spent, self.active_methods
            rates = self.search(schedule)
            planned = sum(
                search_seconds(costs[name], schedule.trials, schedule.steps) for name in names
            )
            return {
                "rates": rates,
                "failed": self.failed,
                "pace": max(1.0, (self.spent - begun) / planned) if planned else 1.0,
            }

        found = self._keep("search.json", search)
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
            self.say(f"learning rates: {number} of each method, {steps} steps")
            runs = {
                (n, r): self.trial(n, r, steps, f"trials/{n}-{r:g}-{steps}")
                for n in left
                for r in left[n]
            }
            train_all(list(runs.values()))
            self.tick()
            for name in list(left):
                found = {rate: self._chosen_loss(runs[name, rate]) for rate in left[name]}
                tried[name] += [[rate, steps, loss] for rate, loss in found.items()]
                good = sorted((loss, rate) for rate, loss in found.items() if loss is not None)
                if not good:
                    why = failure_reason(self.folder / f"trials/{name}-{left[name][0]:g}-{steps}")
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
        slow = self._read("pace.json", {"pace": pace})["pace"]
        for seed in range(schedule.seeds):
            done = all(
                (self.folder / f"judged/{name}-{seed}.json").is_file()
                for name in self.active_methods
            )
            need = slow * sum(
                seed_seconds(costs[name], schedule.steps, judging) for name in self.active_methods
            )
            if seed and not done and self.spent + need > self.settings.seconds:
                self.notes.append(("seeds_cut", {"seeds": seed, "planned": schedule.seeds}))
                return seed
            self.say(
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
                folder = self.folder / f"runs/{name}-{seed}"
                if why := failure_reason(folder):
                    self.failed[name] = f"seed {seed}: {why}"
                else:
                    self._keep(f"judged/{name}-{seed}.json", partial(self.judge.run, folder, name))
            if not done:
                slow = max(1.0, slow * (time.perf_counter() - begun) / need) if need else slow
                write_json(self.folder / "pace.json", {"pace": slow})
        return schedule.seeds

    # ---- the result

    def result(
        self, schedule: Schedule, seeds: int, rates: Any, costs: Any, base: Any
    ) -> ComparisonResult:
        """Return everything that the report contains."""
        quantised = self._read("judged/base-nf4.json")
        judged = {
            n: [self._read(f"judged/{n}-{s}.json") for s in range(seeds)]
            for n in self.active_methods
            if n in rates
        }
        if not judged:
            first = next(iter(self.failed))
            raise TrainingError("no method came through", where=first, why=self.failed[first])
        methods = {}
        for name, runs in judged.items():
            cost, steps = costs[name], schedule.steps
            joules = cost["joules_a_step"]
            methods[name] = findings.describe(runs, base, self.metric) | {
                "learning_rate": rates[name]["rate"],
                "tried": rates[name]["tried"],
                "at_search_boundary": rates[name]["at_search_boundary"],
                "trainable_parameters": cost["trainable_parameters"],
                "adapter_kb": cost["adapter_kb"],
                "peak_mb": cost["peak_mb"],
                "step_seconds": cost["step_seconds"],
                "run_seconds": steps * cost["step_seconds"],
                "joules": None if joules is None else joules * steps,
                "energy_source": cost["energy_source"],
                "curves": [_curve(self.folder / f"runs/{name}-{seed}") for seed in range(seeds)],
                "verdicts": [
                    read_run_record(self.folder / f"runs/{name}-{seed}")["verdict"]
                    for seed in range(seeds)
                ],
            }
        tested = findings.pairs(judged, base, self.metric)
        story = read_run_record(self.folder / f"runs/{next(iter(judged))}-0")
        return ComparisonResult(
            kind=KIND,
            format_version=COMPARISON_FORMAT_VERSION,
            afina=afina.__version__,
            folder=str(self.folder),
            settings=resolved(self.settings),
            objective=self.rows.objective,
            metric=self.metric,
            score_rows=findings.scores([base], self.metric).shape[1],
            data={"name": self.settings.data.name, "sha256": self.rows.digest} | self.rows.counts,
            base=story["base"],
            environment=story["environment"],
            schedule=schedule.as_dict() | {"seeds_done": seeds, "seconds_spent": self.spent},
            failed=self.failed,
            notes=self.notes,
            base_figures=findings.describe([base], base, self.metric),
            nf4_figures=None
            if quantised is None
            else findings.describe([quantised], base, self.metric),
            methods=methods,
            tests=tested,
            fronts=findings.fronts(methods, self.metric),
            recommendation=findings.recommend(methods, tested, self.metric),
            examples=_examples(judged, base),
        )


def _curve(folder: Path) -> list[list[float | None]]:
    """Return [step, loss, eval loss or None] of each step of a run."""
    return [[line["step"], line["loss"], line["eval_loss"]] for line in read_metrics(folder)]


def _examples(
    judged: Mapping[str, list[dict[str, Any]]], base: Mapping[str, Any], most: int = 6
) -> list[dict[str, Any]]:
    """Return a few evenly spaced test rows with the answers of the first seed."""
    if "answers" not in base:
        return []
    count = len(base["answers"])
    return [
        {"prompt": base["prompts"][i], "expected": base["expected"][i], "base": base["answers"][i]}
        | {"answers": {name: runs[0]["answers"][i] for name, runs in judged.items()}}
        for i in range(0, count, max(1, count // most))
    ][:most]


def compare(
    data: str | Path | CompareSettings, *, say: Say = lambda text: None, **values: Any
) -> ComparisonResult:
    """Compare methods on `data`; settings as in `afina compare --help`.

    Returns:
        The contents of compare.json; a method that failed is listed in `failed`.

    Raises:
        AfinaError: The rows, the base or the settings are wrong, or no schedule fits the budget.
    """
    settings = (
        data
        if isinstance(data, CompareSettings)
        else make_settings(CompareSettings, {"data": Path(data), **values})
    )
    one = Comparison(settings, say)
    say(f"{one.rows.counts['train']} rows to learn from, {one.rows.counts['test']} to judge by")
    steps = one._keep("steps.json", one.default_max_steps)
    begun = one.spent
    base = one._keep("judged/base.json", one.judge.base)
    judging = one._keep("judging.json", lambda: one.spent - begun)
    one.nf4_base_scores()
    costs = one.costs()
    schedule = Schedule(
        **one._keep("schedule.json", lambda: one.schedule(costs, judging, steps).as_dict())
    )
    say(
        f"{schedule.trials} learning rates, {schedule.seeds} seeds, {schedule.steps} steps: "
        f"about {schedule.seconds / 60:.1f} min"
    )
    rates, pace = one.cached_search(schedule, costs)
    schedule = one.shortened(schedule, costs, judging, pace)
    seeds = one.final_runs(schedule, rates, costs, judging, pace)
    result = one.result(schedule, seeds, rates, costs, base)
    write_json(one.folder / "compare.json", dict(result))
    result.write_report()
    return result
