"""How does a step grow? Time per token against length, rank, adapters and layers, beside what the operation count predicts.

`python benchmarks/growth.py [--quick]`

A random Llama of width 512 in bf16, LoRA on all linear layers. In each sweep one thing changes and the tokens of a step stay the
same; its points are measured in turn, several times, in one process. Two predictions beside the medians, both by
`afina.planning`, and both scaled by one number a sweep (the median of measured over predicted):

    count    multiply-adds of products, attention and adapters, all at one rate
    plan     the same at the machine's measured rates by kind, and passes over memory, the optimizer, what a block costs

A point's figure is measured over plan: nothing should be above 1.2. results/growth_*.png have a picture a sweep.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, publish, roofline, run_side

SWEEPS = {
    "length": [128, 256, 512, 1024, 2048, 4096, 8192],
    "rank": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "adapters": [1, 2, 4, 8, 16, 32, 64],
    "layers": [1, 2, 4, 8, 16, 32],
}
TOKENS = {"length": 8192, "rank": 1024, "adapters": 2048, "layers": 512}  # of a step
BLOCKS, RANK, LENGTH = 6, 8, 256  # where the sweep is not over them
ROUNDS, QUICK = 5, 2
WIDTH, INNER, HEADS, VOCABULARY = 512, 1536, 8, 8192
LABELS = {
    "length": "tokens in a sequence",
    "rank": "rank",
    "adapters": "adapters in a step",
    "layers": "blocks",
}


def config(blocks: int) -> Any:
    """The model's configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def make_base(blocks: int) -> Any:
    """A random model of `blocks` blocks, frozen."""
    import torch
    from transformers import LlamaForCausalLM

    from afina.models.causal_lm import CausalLM
    from afina.models.fast_llama import install_fast_modules

    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config(blocks), attn_implementation="afina").to(
        torch.bfloat16
    )
    install_fast_modules(model.requires_grad_(False).eval())
    return CausalLM(model, "random")


def make_step(base: Any, sweep: str, x: int) -> Callable[[], None]:
    """An optimizer step of the sweep's point `x`."""
    import torch

    from afina.adapters.attach import attach
    from afina.adapters.target_selection import resolve_target_modules
    from afina.data.renderer import Example
    from afina.io.adapter_config import AdapterConfig
    from afina.objectives.language_modeling import LanguageModelingObjective
    from afina.objectives.multi_adapter import multi_adapter_losses
    from afina.training.setup.optimizer import AdapterOptimizer

    adapters, rank = x if sweep == "adapters" else 1, x if sweep == "rank" else RANK
    tokens, length = TOKENS[sweep] // adapters, x if sweep == "length" else LENGTH
    length = min(length, tokens)
    targets = resolve_target_modules(base.model, "all-linear", None, False)
    parts, optimizers = [], []
    for number in range(adapters):
        adapter = attach(
            base.model,
            base.forward_context,
            f"{sweep}{x}-{number}",
            AdapterConfig("lora", targets, rank=rank, alpha=2.0 * rank),
        )
        adapter.train(True)
        rows = torch.randint(5, VOCABULARY, (tokens // length, length)).tolist()
        examples = [Example("", row, [False] + [True] * (length - 1), 0, None) for row in rows]
        task = LanguageModelingObjective(base, examples, examples[:1], 10**6, 1, 0)
        parts.append((task, task.step_batches(0)[0], adapter.active))
        optimizers.append(AdapterOptimizer(adapter, 1e-4, {}, 0.0))

    def step() -> None:
        losses = multi_adapter_losses(parts)
        torch.stack(
            [loss / batch.num_targets for loss, (_, batch, _) in zip(losses, parts, strict=True)]
        ).sum().backward()
        for optimizer in optimizers:
            optimizer.step(1.0, 1.0)

    return step


def predict(sweep: str, x: int) -> dict[str, float]:
    """Operations of the point's step, and its seconds as the plan says."""
    import torch
    from transformers import LlamaForCausalLM

    from afina.planning.estimates import MachineRates, Workload
    from afina.planning.machine_rates import measured_rates
    from afina.planning.model_shape import ModelShape, count_parameters
    from afina.planning.step_cost import StepCost
    from afina.settings import TrainSettings
    from afina.training.setup.set_up import build_adapter_config

    with torch.device("meta"):
        model = LlamaForCausalLM(config(x if sweep == "layers" else BLOCKS))
    settings = TrainSettings(
        data=Path("none"), rank=x if sweep == "rank" else RANK, gradient_checkpointing="off"
    )
    shape = ModelShape("random", Path(), model, torch.bfloat16, False, False)
    step = StepCost(
        shape, count_parameters(shape, build_adapter_config(model, settings)), settings, "plain"
    )
    adapters = x if sweep == "adapters" else 1
    length = min(x if sweep == "length" else LENGTH, TOKENS[sweep] // adapters)
    load, every = (
        Workload.full(TOKENS[sweep], length, labelled=(length - 1) / length),
        {"bfloat16": [[1, 1.0]], "float32": [[1, 1.0]]},
    )
    alone = MachineRates(
        every, every, {"bfloat16": 1.0, "float32": 1.0}, float("inf"), float("inf"), 1.0, 0.0, 0.0
    )
    seconds = step.time(load, measured_rates("cpu"))
    return {
        "count": step.time(load, alone).step,
        "plan": seconds.step + (adapters - 1) * seconds.optimizer,
    }


def side(sweep: str, points: list[int], rounds: int) -> dict[str, Any]:
    """Median seconds of each point's step, and its predictions."""
    import torch

    bases = {blocks: make_base(blocks) for blocks in (points if sweep == "layers" else [BLOCKS])}
    steps = {x: make_step(bases[x if sweep == "layers" else BLOCKS], sweep, x) for x in points}
    seconds: dict[int, list[float]] = {x: [] for x in points}
    for turn in range(rounds + 1):
        for x, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first round warms up
                seconds[x].append(time.perf_counter() - start)
    predicted = {x: predict(sweep, x) for x in points}
    return {
        "threads": torch.get_num_threads(),
        "seconds": {x: statistics.median(s) for x, s in seconds.items()},
        "repeats": seconds,
        "predicted": predicted,
    }


def scaled(result: dict[str, Any], kind: str) -> dict[str, float]:
    """A prediction of each point in seconds, scaled to the sweep."""
    ratio = statistics.median(
        result["seconds"][x] / p[kind] for x, p in result["predicted"].items()
    )
    return {x: ratio * p[kind] for x, p in result["predicted"].items()}


def draw(sweep: str, result: dict[str, Any], folder: Path) -> None:
    """The picture of a sweep, into `folder`: microseconds a token, measured and predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    xs = [int(x) for x in result["seconds"]]
    per_token = 1e6 / TOKENS[sweep]
    for kind, style, label in (
        ("count", ":", "operations at one rate"),
        ("plan", "--", "the plan: operations at the rate of their kind"),
    ):
        axes.plot(
            xs,
            [per_token * s for s in scaled(result, kind).values()],
            style,
            color="gray",
            label=label,
        )
    repeats = [[per_token * s for s in times] for times in result["repeats"].values()]
    axes.fill_between(
        xs, [min(r) for r in repeats], [max(r) for r in repeats], color="tab:blue", alpha=0.2, lw=0
    )
    axes.plot(
        xs,
        [per_token * s for s in result["seconds"].values()],
        "o-",
        color="tab:blue",
        label="measured: median, least to most",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(
        xlabel=LABELS[sweep],
        ylabel="microseconds a token",
        title=f"{TOKENS[sweep]:,} tokens a step, width {WIDTH}",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"growth_{sweep}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=SWEEPS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="each second point, two rounds; pictures into the folder for temporary files",
    )
    parser.add_argument("--only", choices=SWEEPS, nargs="*", default=list(SWEEPS))
    arguments = parser.parse_args()
    if arguments.side:
        points = SWEEPS[arguments.side][:: 2 if arguments.quick else 1]
        print(json.dumps(side(arguments.side, points, QUICK if arguments.quick else ROUNDS)))
        return
    machine, results, figures = roofline(), {}, {}
    for sweep in arguments.only:
        flags = ["--quick"] if arguments.quick else []
        result = results[sweep] = run_side(sys.executable, [__file__, "--side", sweep, *flags])
        expected, counted = scaled(result, "plan"), scaled(result, "count")
        print(f"\n{LABELS[sweep]:>22} {'us a token':>11} {'over plan':>10} {'over count':>11}")
        for x, seconds in result["seconds"].items():
            print(
                f"{int(x):22,} {1e6 * seconds / TOKENS[sweep]:11.1f} {seconds / expected[x]:10.2f} {seconds / counted[x]:11.2f}",
                flush=True,
            )
        figures[f"{sweep}_most_over_plan"] = max(
            s / expected[x] for x, s in result["seconds"].items()
        )
        figures[f"{sweep}_most_over_count"] = max(
            s / counted[x] for x, s in result["seconds"].items()
        )
        draw(sweep, result, Path(tempfile.gettempdir()) if arguments.quick else RESULTS)
    if arguments.quick or len(arguments.only) < len(SWEEPS):
        print(json.dumps(figures))
        return
    publish(
        "growth",
        figures,
        {f"{sweep}_most_over_plan": ("<=", 1.2) for sweep in SWEEPS},
        results,
        machine,
    )


if __name__ == "__main__":
    main()
