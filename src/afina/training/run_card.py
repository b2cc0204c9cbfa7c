"""A run as a picture and as a card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from afina.errors import pluralize
from afina.io.atomic import translate_os_errors


def plot_losses(metrics: Sequence[Mapping[str, Any]], story: Mapping[str, Any], file: Path) -> None:
    """Loss against steps: training, held-out, and the base's held-out loss as the line to get below. PNG."""
    from matplotlib.figure import Figure

    figure, losses = Figure(figsize=(7, 4), layout="constrained"), story["losses"]
    axes = figure.subplots()
    steps = [m["step"] for m in metrics]
    raw = [m["loss"] for m in metrics]
    axes.plot(steps, raw, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, _smooth(raw), color="tab:blue", label="training")
    checks = [m for m in metrics if m.get("held_out_loss") is not None]
    axes.plot(
        [m["step"] for m in checks],
        [m["held_out_loss"] for m in checks],
        "o-",
        color="tab:orange",
        label="held-out",
    )
    axes.axhline(losses["held_before"], color="tab:gray", linestyle="--", label="base, held-out")
    _mark_best(axes, losses["best_step"])
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats a {story['words']['unit']})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with translate_os_errors(file):
        figure.savefig(file, dpi=120)


def _mark_best(axes: Any, step: int) -> None:
    if step:
        axes.axvline(step, color="tab:green", linestyle=":", label=f"best: step {step}")


def plot_rewards(
    metrics: Sequence[Mapping[str, Any]], story: Mapping[str, Any], file: Path
) -> None:
    """Reward against steps, of its own sampled answers and of the likeliest ones to held-out prompts; and the divergence. PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, raw = [m["step"] for m in metrics], [m["reward"] for m in metrics]
    axes.plot(steps, raw, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, _smooth(raw), color="tab:blue", label="its answers, sampled")
    checks = [m for m in metrics if m.get("held_out_reward") is not None]
    axes.plot(
        [m["step"] for m in checks],
        [m["held_out_reward"] for m in checks],
        "o-",
        color="tab:orange",
        label="held-out",
    )
    axes.axhline(
        story["policy"]["before"]["reward"],
        color="tab:gray",
        linestyle="--",
        label="before, held-out",
    )
    _mark_best(axes, story["losses"]["best_step"])
    axes.set_xlabel("step")
    axes.set_ylabel("reward")
    axes.grid(alpha=0.3)
    other = axes.twinx()
    other.plot(steps, [m["kl"] for m in metrics], color="tab:red", linewidth=1, alpha=0.6)
    other.set_ylabel("KL from the reference (nats a token)", color="tab:red")
    other.set_ylim(bottom=0)
    axes.legend(frameon=False)
    with translate_os_errors(file):
        figure.savefig(file, dpi=120)


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Running mean that starts unbiased."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return smooth


def model_card(story: Mapping[str, Any]) -> str:
    """The adapter's README.md, from run.json."""
    settings, base, data, losses = story["settings"], story["base"], story["data"], story["losses"]
    again = {k: v for k, v in settings.items() if v not in (None, {}, False) and k != "output_dir"}
    again["data"] = Path(data["path"]).name  # where it lay is nobody's business
    licence = base["licence"] or "not stated by the base's card"
    return f"""---
base_model: {base["name"]}
library_name: peft
tags: [afina, {story["method"]}]
---

# {Path(data["path"]).stem}: {settings["method"]} on {base["name"]}

An adapter made by afina {story["environment"]["afina"]}.

| | |
|---|---|
| base | {base["name"]}{f" ({base['revision']})" if base["revision"] else ""}, hash `{base["hash"][:16]}`, held as {base["dtype"]} |
| licence of the base | {licence} |
| data | {Path(data["path"]).name}: {pluralize(data["rows"], "row")} ({data["format"]}), {data["held_out"]:,} held out, {len(data["skipped"]):,} skipped; sha256 `{data["sha256"][:16]}` |
| licence of the data | not stated: fill in before you publish |
| objective | {story["objective"]} |
| trained | {pluralize(story["trainable_parameters"], "number")}, {pluralize(story["steps"], "step")}, {pluralize(story["tokens"], story["words"]["piece"])} in {story["seconds"]:.0f} s |
| peak memory | {story["peak_memory_mb"]:,.0f} MB |
| adapter | {story["adapter_kb"]:,.0f} KB, hash `{story["adapter"][:16]}` |
| code of the model was run | {"yes (trust_remote_code)" if base["remote_code"] else "no"} |

## What it did

{_policy(story["policy"], losses) if "policy" in story else _losses(story["words"]["unit"], losses)}{_preferences(story.get("preferences"))}
{chr(10).join("- " + sentence for sentence in story["verdict"])}
{_classes(story.get("classes"))}
## How to run it again

```yaml
{yaml.safe_dump(again, sort_keys=False, allow_unicode=True).rstrip()}
```
"""


def _losses(unit: str, losses: Mapping[str, Any]) -> str:
    """The table of losses."""
    return f"""| nats a {unit} | before | after |
|---|---|---|
| held-out rows | {losses["held_before"]:.4f} | {losses["held_after"]:.4f} |
| rows it learned | {losses["train_before"]:.4f} | {losses["train_after"]:.4f} |
{_general(losses)}"""


REWARDED = {
    "length": "length (tokens)",
    "stopped": "ended by themselves",
    "sampled_reward": "reward of sampled answers",
    "kl": "KL divergence from the reference (nats a token)",
    "entropy": "entropy (nats a token)",
    "general_loss": "loss on general text (nats a token)",
}


def reward_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lines of a table about answers to held-out prompts: what, before, after."""
    parts = [name for name in found["after"] if name.startswith("reward_")]
    names = (
        {"reward": "reward"}
        | {name: f"reward, {name.removeprefix('reward_')}" for name in parts}
        | REWARDED
    )
    sides = [found["before"], found["after"]]
    return [
        (label, *(f"{side[name]:.3f}" for side in sides))
        for name, label in names.items()
        if name in sides[1]
    ]  # type: ignore[misc]


def _policy(found: Mapping[str, Any], losses: Mapping[str, Any]) -> str:
    """The table of rewards, and what the policy was compared with."""
    lines = "".join(
        f"| {what} | {before} | {after} |\n" for what, before, after in reward_rows(found)
    )
    judges = ", ".join(
        f"`{judge['name']}` (weight {judge['weight']:g})" for judge in found["judges"]
    )
    compared = f"Rewarded by {judges}. Compared with {found['reference']['of']}: {found['reference']['why']}."
    rows = pluralize(found["rows"], "held-out prompt")
    return f"| its answers to {rows} | before | after |\n|---|---|---|\n{lines}{_general(losses)}\n{compared}\n"


def _general(losses: Mapping[str, Any]) -> str:
    if losses["general_before"] is None:
        return ""
    return f"| general text | {losses['general_before']:.4f} | {losses['general_after']:.4f} |\n"


PREFERRED = {
    "accuracy": "better answer preferred",
    "margin": "margin",
    "chosen_logp": "log-probability of the better answer (nats)",
    "rejected_logp": "log-probability of the worse answer (nats)",
    "chosen_length": "length of the better answer (tokens)",
    "rejected_length": "length of the worse answer (tokens)",
    "calibration_error": "calibration error",
}


def preference_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lines of a table about held-out preferences: what, before, after."""
    percent, rows = ("accuracy", "calibration_error"), []
    for name, label in PREFERRED.items():
        if name in found["after"]:
            form = "{:.1%}" if name in percent else "{:.3f}"
            before = form.format(found["before"][name]) if name in found["before"] else ""
            rows.append((label, before, form.format(found["after"][name])))
    return rows


def _preferences(found: Mapping[str, Any] | None) -> str:
    """Another table of the card, and what the policy was compared with."""
    if found is None:
        return ""
    reference = found.get("reference")
    compared = f"\nCompared with {reference['of']}: {reference['why']}.\n" if reference else ""
    table = "".join(
        f"| {what} | {before} | {after} |\n" for what, before, after in preference_rows(found)
    )
    return f"\n| {pluralize(found['rows'], 'held-out row')} | before | after |\n|---|---|---|\n{table}{compared}"


def _classes(classes: Mapping[str, Any] | None) -> str:
    if classes is None:
        return ""
    return f"- Accuracy {classes['accuracy']:.1f}%, F1 {classes['f1']:.1f}% on {pluralize(classes['rows'], 'held-out row')} (confusion.png).\n"
