"""MoRA's own claim at small scale: who memorises new facts faster at equal parameters? `python benchmarks/mora_memory.py`

Random UUID pairs (arXiv 2405.12130, section 3) on the embedded base: given one UUID, say the other. Share of its tokens found against
steps for full, and for lora and mora at ranks 2, 8 and 32, three seeds each, at learning rates found beforehand on a seed of
their own (--search; stored in mora_memory_rates.json). The paper's order: full > mora > lora, the gap closing with rank.
"""

import argparse
import json
import random
import statistics
import tempfile
import uuid
from pathlib import Path

from common import RESULTS, publish, roofline

PAIRS, STEPS, SEARCH_STEPS, EVERY, SEEDS, BATCH = 64, 200, 120, 40, 3, 2048
MODELS = ["full", *(f"{method}-{rank}" for rank in (2, 8, 32) for method in ("lora", "mora"))]
GRID = {"full": (5e-4, 1e-3, 2e-3), "lora": (1e-3, 2e-3, 5e-3), "mora": (2e-3, 5e-3, 1e-2)}
RATES = Path(__file__).parent / "mora_memory_rates.json"


def pairs(seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    draw = lambda: str(uuid.UUID(int=rng.getrandbits(128)))  # noqa: E731
    return [{"prompt": draw(), "completion": draw()} for _ in range(PAIRS)]


def learn(
    model: str, rate: float, seed: int, folder: Path, steps: int = STEPS
) -> list[dict[str, float]]:
    """Percent of the answers' tokens that are the likeliest ones (1.03 characters each), at each check."""
    import torch

    from afina.settings import TrainSettings
    from afina.training.setup.set_up import set_up_run
    from afina.training.trainer import StepMetrics, Trainer

    method, _, rank = model.partition("-")
    rows = folder / f"pairs-{seed}.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs(seed)))
    settings = TrainSettings(
        data=rows,
        eval_size=rows,
        method=method,
        rank=int(rank or 8),
        learning_rate=rate,
        max_steps=steps,
        max_tokens_per_batch=BATCH,
        seed=seed,
        warmup_ratio=0.05,
        lr_scheduler_type="constant",
        eval_steps=10**6,
        output_dir=folder / "run",
    )
    setup = set_up_run(settings)
    base, task = setup.prepared.base, setup.prepared.task
    curve: list[dict[str, float]] = []

    @torch.no_grad()
    def measure(tick: StepMetrics) -> None:
        if tick.step % EVERY:
            return
        from afina.data.packing import group_by_length, pack_examples

        right = count = 0
        for indices in group_by_length(
            [len(e.tokens) for e in task.eval_rows], 4096, range(len(task.eval_rows))
        ):
            batch = pack_examples([task.eval_rows[i] for i in indices])
            with base.forward_context.use(
                setup.adapter.active.segments(batch.token_ids, batch.cu_seqlens)
            ):
                hidden = base.hidden(batch.token_ids, batch.positions, batch.cu_seqlens)
            keep = batch.labels >= 0
            right += int((base.logits(hidden[keep]).argmax(-1) == batch.labels[keep]).sum())
            count += int(keep.sum())
        curve.append(
            {
                "step": tick.step,
                "accuracy": 100 * right / count,
                "loss": tick.loss,
                "trainable": setup.adapter.num_parameters(),
            }
        )

    (folder / "run").mkdir(exist_ok=True)
    Trainer(setup, folder / "run", {}, measure, lambda _: None).train()
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the learning rates on a seed of their own, and store them",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.search:
            found = {}
            for model in MODELS:
                trials = {
                    rate: area(learn(model, rate, 1000, folder, SEARCH_STEPS))
                    for rate in GRID[model.partition("-")[0]]
                }
                found[model] = max(trials, key=lambda rate: trials[rate])
                print(model, trials, flush=True)
            RATES.write_text(json.dumps(found, indent=1) + "\n")
            return
        rates = json.loads(RATES.read_text())
        curves: dict[str, list] = {model: [] for model in MODELS}
        for seed in range(SEEDS):
            for model in MODELS:
                curves[model].append(learn(model, rates[model], seed, folder))
                print(seed, model, [round(c["accuracy"], 1) for c in curves[model][-1]], flush=True)
    draw(curves)
    figures = {}
    for model in MODELS:
        areas = [area(curve) for curve in curves[model]]
        figures[f"{model}_mean_accuracy"] = statistics.mean(areas)
        figures[f"{model}_spread"] = max(areas) - min(areas)
        figures[f"{model}_final"] = statistics.mean(
            curve[-1]["accuracy"] for curve in curves[model]
        )
        figures[f"{model}_trainable"] = curves[model][0][-1]["trainable"]
    for rank in (2, 8, 32):
        figures[f"mora_minus_lora_{rank}"] = (
            figures[f"mora-{rank}_mean_accuracy"] - figures[f"lora-{rank}_mean_accuracy"]
        )
    targets = {f"mora_minus_lora_{rank}": (">=", 0.0) for rank in (2, 8, 32)}
    publish("mora_memory", figures, targets, {"curves": curves, "rates": rates}, roofline())


def area(curve: list[dict[str, float]]) -> float:
    """Mean accuracy over the run: high where facts are learned early."""
    return statistics.mean(point["accuracy"] for point in curve)


def draw(curves: dict[str, list]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"full": "-", "lora": "--", "mora": "-"}
    colours = {"full": "black", "2": "tab:blue", "8": "tab:orange", "32": "tab:green"}
    for model, runs in curves.items():
        method, _, rank = model.partition("-")
        steps = [point["step"] for point in runs[0]]
        middle = [statistics.mean(run[i]["accuracy"] for run in runs) for i in range(len(steps))]
        axes.plot(
            steps,
            middle,
            styles[method],
            color=colours[rank or "full"],
            label=model.replace("-", " r "),
        )
        axes.fill_between(
            steps,
            [min(r[i]["accuracy"] for r in runs) for i in range(len(steps))],
            [max(r[i]["accuracy"] for r in runs) for i in range(len(steps))],
            color=colours[rank or "full"],
            alpha=0.12,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("tokens of the answer found, %")
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "mora_memory.png", dpi=120)


if __name__ == "__main__":
    main()
