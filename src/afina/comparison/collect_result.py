"""Result of a comparison, collected from the files of its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import afina
from afina.comparison import analysis
from afina.comparison.comparison_folder import ComparisonFolder
from afina.comparison.results import ComparisonResult
from afina.comparison.schedule import Schedule
from afina.comparison.split import ComparisonSplit
from afina.errors import TrainingError
from afina.io.migrations import rename_keys
from afina.io.run_record import read_run_record
from afina.settings import CompareSettings, resolved
from afina.training.trainer import read_metrics

KIND, COMPARISON_FORMAT_VERSION = "afina comparison", 2
NUM_EXAMPLES = 6  # test rows whose answers are shown
COST_KEYS = ("trainable_parameters", "adapter_kb", "peak_mb", "step_seconds", "energy_source")


def collect_result(
    settings: CompareSettings,
    folder: ComparisonFolder,
    rows: ComparisonSplit,
    metric: str,
    *,
    schedule: Schedule,
    seeds: int,
    rates: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any],
    failed: Mapping[str, str],
    notes: list[tuple[str, dict[str, Any]]],
) -> ComparisonResult:
    """Return everything that the report contains; raise `TrainingError` if all methods failed.

    `rates` has the learning rate of each method and the search for it, `base` the scores of the
    base, `failed` the reason of each method that failed, `notes` message keys with values.
    """
    scores = {
        name: [folder.read(f"judged/{name}-{seed}.json") for seed in range(seeds)]
        for name in settings.methods
        if name not in failed and name in rates
    }
    if not scores:
        first = next(iter(failed))
        raise TrainingError("all methods failed", where=first, why=failed[first])
    methods = {
        name: analysis.describe(runs, base, metric)
        | rename_keys(rates[name], {"rate": "learning_rate"})
        | _cost(costs[name], schedule.steps)
        | _runs(folder.path / "runs", name, seeds)
        for name, runs in scores.items()
    }
    nf4 = folder.read("judged/base-nf4.json")
    tests = analysis.pairs(scores, base, metric)
    record = read_run_record(folder.path / f"runs/{next(iter(scores))}-0")
    return ComparisonResult(
        kind=KIND,
        format_version=COMPARISON_FORMAT_VERSION,
        afina=afina.__version__,
        folder=str(folder.path),
        settings=resolved(settings),
        objective=rows.objective,
        metric=metric,
        score_rows=analysis.scores([base], metric).shape[1],
        data={"name": settings.data.name, "sha256": rows.digest} | rows.counts,
        base=record["base"],
        environment=record["environment"],
        schedule=schedule.as_dict() | {"seeds_done": seeds, "seconds_spent": folder.spent},
        failed=failed,
        notes=notes,
        base_figures=analysis.describe([base], base, metric),
        nf4_figures=nf4 and analysis.describe([nf4], base, metric),
        methods=methods,
        tests=tests,
        fronts=analysis.fronts(methods, metric),
        recommendation=analysis.recommend(methods, tests, metric),
        examples=_examples(scores, base),
    )


def _cost(cost: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the cost of a run of so many steps."""
    joules = cost["joules_a_step"]
    return {key: cost[key] for key in COST_KEYS} | {
        "run_seconds": steps * cost["step_seconds"],
        "joules": None if joules is None else joules * steps,
    }


def _runs(folder: Path, name: str, seeds: int) -> dict[str, Any]:
    """Return loss curves, [step, loss, eval loss or None] of each step, and verdicts by seed."""
    runs = [folder / f"{name}-{seed}" for seed in range(seeds)]
    return {
        "curves": [
            [[line["step"], line["loss"], line["eval_loss"]] for line in read_metrics(run)]
            for run in runs
        ],
        "verdicts": [read_run_record(run)["verdict"] for run in runs],
    }


def _examples(
    scores: Mapping[str, list[dict[str, Any]]], base: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return a few evenly spaced test rows with the answers of the first seed."""
    count = len(base.get("answers", ()))
    return [
        {"prompt": base["prompts"][i], "expected": base["expected"][i], "base": base["answers"][i]}
        | {"answers": {name: runs[0]["answers"][i] for name, runs in scores.items()}}
        for i in range(0, count, max(1, count // NUM_EXAMPLES))
    ][:NUM_EXAMPLES]
