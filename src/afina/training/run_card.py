"""Run card: the plot of a run (curve.png) and its model card (README.md)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from afina.errors import pluralize
from afina.io.atomic import translate_os_errors
from afina.io.result import Content, ResultText
from afina.training.results import measured


def plot_losses(
    metrics: Sequence[Mapping[str, Any]], record: Mapping[str, Any], file: Path
) -> None:
    """Write a PNG of train and eval loss over steps, with the base's eval loss as a dashed line."""
    from matplotlib.figure import Figure

    figure, losses = Figure(figsize=(7, 4), layout="constrained"), record["losses"]
    axes = figure.subplots()
    _plot_metric(axes, metrics, "loss", "train", "eval_loss")
    axes.axhline(losses["eval_loss_before"], color="tab:gray", linestyle="--", label="base, eval")
    _mark_best(axes, losses["best_step"])
    axes.set_ylabel(f"loss (nats per {record['units']['unit']})")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    with translate_os_errors(file):
        figure.savefig(file, dpi=120)


def plot_rewards(
    metrics: Sequence[Mapping[str, Any]], record: Mapping[str, Any], file: Path
) -> None:
    """Write a PNG of the KL and of the reward over steps, of rollouts and of eval completions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    _plot_metric(axes, metrics, "reward", "rollouts", "eval_reward")
    before = record["policy"]["before"]["reward"]
    axes.axhline(before, color="tab:gray", linestyle="--", label="before, eval")
    _mark_best(axes, record["losses"]["best_step"])
    axes.set_ylabel("reward")
    other = axes.twinx()
    steps, divergences = [m["step"] for m in metrics], [m["kl"] for m in metrics]
    other.plot(steps, divergences, color="tab:red", linewidth=1, alpha=0.6)
    other.set_ylabel("KL from the reference (nats per token)", color="tab:red")
    other.set_ylim(bottom=0)
    axes.legend(frameon=False)
    with translate_os_errors(file):
        figure.savefig(file, dpi=120)


def _plot_metric(
    axes: Any, metrics: Sequence[Mapping[str, Any]], name: str, label: str, eval_name: str
) -> None:
    """Plot a metric of each step, raw and smoothed, and its value at each evaluation."""
    steps, raw = [m["step"] for m in metrics], [m[name] for m in metrics]
    axes.plot(steps, raw, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, _smooth(raw), color="tab:blue", label=label)
    checks = [m for m in metrics if m.get(eval_name) is not None]
    values = [m[eval_name] for m in checks]
    axes.plot([m["step"] for m in checks], values, "o-", color="tab:orange", label="eval")
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)


def _mark_best(axes: Any, step: int) -> None:
    if step:
        axes.axvline(step, color="tab:green", linestyle=":", label=f"best: step {step}")


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Return the exponential moving average with bias correction and decay `keep`."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return smooth


CARD = """---
base_model: {base[name]}
library_name: peft
tags: [afina, {method}]
---

# {title}: {preset} on {base[name]}

An adapter trained with afina {afina}.

| | |
|---|---|
{facts}

## Results

{results}

{verdict}

## Reproduce

```yaml
{settings}
```
"""


def model_card(record: Mapping[str, Any]) -> str:
    """Return the adapter's README.md, a model card, from run.json."""
    base, settings = record["base"], record["settings"]
    files = [Path(file["path"]) for file in record["data"].get("files", ())]
    files = files or [Path(record["data"]["path"])]
    name = ", ".join(file.name for file in files)  # without their folders, which are private
    again = {k: v for k, v in settings.items() if v not in (None, {}, False) and k != "output_dir"}
    again["data"] = name
    if len(files) > 1:
        given = zip(settings["data"], files, strict=True)
        again["data"] = [
            {key: value for key, value in one.items() if value is not None} | {"path": file.name}
            for one, file in given
        ]
    return CARD.format(
        base=base,
        method=record["method"],
        title=" and ".join(file.stem for file in files),
        preset=settings["method"],
        afina=record["environment"]["afina"],
        facts="\n".join(f"| {what} | {value} |" for what, value in _facts(record, name)),
        results="\n\n".join(part.to_markdown() for part in _results(record)),
        verdict="\n".join(f"- {sentence}" for sentence in record["verdict"]),
        settings=yaml.safe_dump(again, sort_keys=False, allow_unicode=True).rstrip(),
    )


def _facts(record: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    base, data = record["base"], record["data"]
    revision = f" ({base['revision']})" if base["revision"] else ""
    rows = (
        f"{pluralize(data['rows'], 'row')} ({data['format']}), "
        f"{data['held_out']:,} held out (eval), {len(data['skipped']):,} skipped"
    )
    trained = (
        f"{pluralize(record['steps'], 'optimizer step')}, "
        f"{pluralize(record['tokens'], record['units']['piece'])} in {record['seconds']:.0f} s"
    )
    code = "yes (trust_remote_code)" if base["remote_code"] else "no"
    return [
        (
            "base",
            f"{base['name']}{revision}, hash `{base['hash'][:16]}`, loaded as {base['dtype']}",
        ),
        ("license of the base", base["licence"] or "not stated in the base's card"),
        ("data", f"{name}: {rows}; sha256 `{data['sha256'][:16]}`"),
        ("license of the data", "not stated: add it before publishing"),
        ("objective", record["objective"]),
        ("trainable parameters", f"{record['trainable_parameters']:,}"),
        *([("targets", base["coverage"])] if "coverage" in base else []),
        ("trained", trained),
        ("peak memory", f"{record['peak_memory_mb']:,.0f} MB"),
        ("adapter", f"{record['adapter_kb']:,.0f} kB, hash `{record['adapter'][:16]}`"),
        ("remote code of the base executed", code),
    ]


def _results(record: Mapping[str, Any]) -> list[Content]:
    """Return the tables of the run; the confusion matrix lies next to the card."""
    found = measured(record, "")
    if "policy" in record:
        functions = ", ".join(
            f"`{one['name']}` (weight {one['weight']:g})"
            for one in record["policy"]["reward_functions"]
        )
        found.append(ResultText(f"Reward functions: {functions}."))
    return found
