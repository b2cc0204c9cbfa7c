"""A task adapter and an alignment adapter: alone, together, merged. What is kept of the gain of each?

    task        answers of the right sentence; its gain is that of the adapter that imitates over the base
    alignment   answers in the wanted form without the unwanted word; its gain is that of both together over the task adapter

The alignment adapter was learned over the task adapter, which stayed frozen. Both together are the sum of the two, as the
engine serves it; the best one adapter of the rank of one of them; and the base's weights with both taken in. At last, the task
adapter with an alignment adapter that was learned over another seed's: must one align anew when the task is learned anew?
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rules import clean, form, right

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.load_run import load_run
from afina.data.renderer import Renderer
from afina.evaluation.intervals import wilson_interval
from afina.merging.combine import combine
from afina.merging.merge_into_base import merge
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.objectives.policy_generator import PolicyGenerator
from afina.settings import EvalSettings

RANK = 16
TASK, BOTH = "task adapter", "both, served as a sum"
WAYS = (
    "base",
    TASK,
    "alignment adapter alone",
    BOTH,
    f"one adapter of rank {RANK} (svd)",
    "merged into the weights",
    "task adapter and another's alignment",
)


def rate(
    base: CausalLM, route: ActiveAdapters, rows: Sequence[Mapping[str, str]], longest: int
) -> dict[str, float]:
    """Shares of the likeliest answers under `route` that are right ("task") and in the wanted manner ("manner")."""
    renderer = Renderer(base.tokenizer, None, base.max_positions)
    prompts = [renderer.prompt(row["prompt"]) for row in rows]
    writer = PolicyGenerator(base, max(map(len, prompts)) + longest, renderer.stop_token_ids)
    answers = writer.generate(prompts, 0, longest, 0.0, route, "judged")
    both = [
        (row["prompt"], answer.text, row["reference"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    manner = [form(*told) * clean(*told) for told in both]
    return {
        "task": sum(right(*told) for told in both) / len(both),
        "manner": sum(manner) / len(both),
    }


def stack(folder: Path, aligned: Path, other: Path, longest: int) -> dict[str, Any]:
    """The table of one seed; `aligned` is the run over the seed's task adapter, `other` one over another's."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").open()]
    task, parts = folder / "sft", [f"{folder / 'sft'}:1", f"{aligned / 'adapter'}:1"]
    for name in ("svd", "sum", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    combine(parts, output_dir=folder / "svd", merge_method="svd", rank=RANK)
    combine(parts, output_dir=folder / "sum", merge_method="sum")
    merge(folder / "sum", output_dir=folder / "merged")
    ways = [
        None,
        task,
        aligned / "adapter",
        ",".join(parts),
        folder / "svd",
        None,
        f"{parts[0]},{other / 'adapter'}:1",
    ]
    found = {}
    for name, run in zip(WAYS, ways, strict=True):
        if name.startswith("merged"):
            found[name] = rate(load_base(str(folder / "merged")), BASE_ONLY, rows, longest)
        else:
            opened = load_run(Path(run) if run else None, EvalSettings())
            found[name] = rate(opened.causal_lm, opened.active, rows, longest)
    return {"tested": len(rows), "ways": found}


def stack_markdown(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Shares of all seeds together with their 95% intervals, and of each gain the share that is kept."""
    stacks = [seed["stacked"] for seed in seeds]
    count = sum(told["tested"] for told in stacks)
    mean = {
        way: {
            name: sum(told["ways"][way][name] * told["tested"] for told in stacks) / count
            for name in ("task", "manner")
        }
        for way in WAYS
    }
    gains = {"task": (mean["base"], mean[TASK]), "manner": (mean[TASK], mean[BOTH])}
    lines = [
        "| | task score | wanted manner | task gain kept | alignment gain kept |",
        "|---" * 5 + "|",
    ]
    for way in WAYS:
        cells = []
        for name in gains:
            low, high = wilson_interval(round(mean[way][name] * count), count)
            cells.append(f"{100 * mean[way][name]:.1f}% ({100 * low:.1f} to {100 * high:.1f})")
        for name, (least, most) in gains.items():
            gain = most[name] - least[name]
            told = way in ("base", TASK) or gain <= 0 or (name == "task" and way == WAYS[2])
            cells.append("" if told else f"{100 * (mean[way][name] - least[name]) / gain:.0f}%")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
