"""QLoRA's claim: how much memory does it save, and what does it cost in quality? `python benchmarks/qlora_memory.py`

Memory: a random Llama of Llama-3.2-1B's shape, one training step of 512 tokens with activation checkpointing, in a process
each: lora on bf16 weights, qlora on the same weights in NF4 (and `--side full`, with 8-bit AdamW, which wants more than 20 GB).
Quality: held-out loss of the demo's task, three seeds each.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import interleave, median, peak_mb, publish, roofline

SHAPE = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)
TOKENS, SEEDS = 512, 3


def make_base(folder: Path) -> None:
    """Random weights on disk, with any tokenizer: the embedded base's."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from afina.models.loading import EMBEDDED_FOLDER

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_FOLDER).save_pretrained(folder)


def step(method: str, folder: Path) -> None:
    """Load, attach, train three steps; print the peak."""
    import torch

    from afina.adapters.attach import attach
    from afina.adapters.target_selection import resolve_target_modules
    from afina.data.packing import pack_examples
    from afina.data.renderer import Example
    from afina.io.adapter_config import AdapterConfig
    from afina.models.loading import load_base
    from afina.objectives.language_modeling import batch_loss
    from afina.training.setup.optimizer import AdapterOptimizer

    torch.set_num_threads(2)
    full = method == "full"
    base = load_base(str(folder), dtype="bfloat16", storage="nf4" if method == "qlora" else "plain")
    loaded = peak_mb()
    targets = resolve_target_modules(base.model, "all" if full else "all-linear", None, full)
    adapter = attach(
        base.model,
        base.forward_context,
        "a",
        AdapterConfig("full" if full else "lora", targets, rank=8),
    )
    optimizer = AdapterOptimizer(adapter, 1e-4, {}, 0.0, "adamw-8bit" if full else "adamw")
    batch = pack_examples(
        [
            Example(
                "",
                torch.randint(5, 128000, (TOKENS,)).tolist(),
                [False] + [True] * (TOKENS - 1),
                0,
                None,
            )
        ]
    )
    seconds = []
    with base.gradient_checkpointing(True):
        for _ in range(3):
            start = time.perf_counter()
            (batch_loss(base, batch, adapter.active) / batch.num_targets).backward()
            optimizer.step(1.0, 1.0)
            seconds.append(time.perf_counter() - start)
    peak = peak_mb()
    print(
        json.dumps(
            {"peak_mb": peak, "loaded_mb": loaded, "step_seconds": statistics.median(seconds)}
        )
    )


def quality(folder: Path) -> dict[str, list[float]]:
    """Held-out losses of the demo's task after the demo's training, lora against qlora."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    from demo_rows import make_rows

    from afina.objectives.prepared import to_jsonl
    from afina.training.train import train

    losses: dict[str, list[float]] = {"lora": [], "qlora": []}
    for seed in range(SEEDS):
        rows, held = make_rows(seed)
        (folder / f"train-{seed}.jsonl").write_text(to_jsonl(rows))
        (folder / f"held-{seed}.jsonl").write_text(to_jsonl(held))
        for method in losses:
            run = train(
                folder / f"train-{seed}.jsonl",
                eval_data=folder / f"held-{seed}.jsonl",
                method=method,
                rank=16,
                learning_rate=2e-3,
                max_steps=150,
                max_tokens_per_batch=2048,
                seed=seed,
                output_dir=folder / f"{method}-{seed}",
            )
            losses[method].append(run.record["losses"]["eval_loss_after"])
            print(seed, method, losses[method][-1], flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("full", "lora", "qlora"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.side:
        step(arguments.side, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        machine = roofline()
        losses = quality(Path(name))
        interleave(
            {
                "make": (
                    sys.executable,
                    [
                        "-c",
                        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
                        f"import qlora_memory as q; from pathlib import Path; q.make_base(Path({name!r}) / 'base'); print('{{}}')",
                    ],
                )
            },
            1,
        )

        def side(which: str) -> tuple[str, list[str]]:
            return sys.executable, [__file__, "--side", which, "--folder", f"{name}/base"]

        runs = interleave({method: side(method) for method in ("lora", "qlora")}, arguments.repeats)
    lora, qlora = statistics.mean(losses["lora"]), statistics.mean(losses["qlora"])
    figures = {
        "lora_peak_mb": median(runs["lora"], "peak_mb"),
        "qlora_peak_mb": median(runs["qlora"], "peak_mb"),
        "memory_ratio": median(runs["qlora"], "peak_mb") / median(runs["lora"], "peak_mb"),
        "lora_step_seconds": median(runs["lora"], "step_seconds"),
        "qlora_step_seconds": median(runs["qlora"], "step_seconds"),
        "lora_held_loss": lora,
        "qlora_held_loss": qlora,
        "loss_difference": qlora - lora,
    }
    targets = {"qlora_peak_mb": ("<=", 2000), "loss_difference": ("<=", max(0.02, 0.01 * lora))}
    publish("qlora_memory", figures, targets, {"memory": runs, "losses": losses}, machine)


if __name__ == "__main__":
    main()
