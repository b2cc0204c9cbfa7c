"""Merged mode against a static merge and against adapters as always. `python benchmarks/merged_mode.py`

134M (30 x 576), bf16, 8 sequences at a time of 64 tokens in and 48 out, closed loop. Nine of ten requests are one adapter's:
tokens a second of that adapter in an engine that may merge, in one that may not, and of the merged model without adapters. Then
uniform load over eight adapters, where merging must cost nothing.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import publish, roofline
from serve_shapes import make_engine, make_folder, prompts

RUNNING, NEW = 8, 48


def run(engine: Any, names: list[str | None], seed: int, hot: str | None) -> tuple[float, float]:
    """Tokens a second of a closed loop in all, and of the requests of `hot` while they run."""
    from afina.engine.request import AdapterWeight, GenerationRequest, OutputChunk, SamplingParams

    sampling = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    left = len(names)
    spent = 0.0

    def asked(name: str | None) -> Any:
        begun: list[float] = []

        def listen(event: OutputChunk) -> None:
            nonlocal left, spent
            if not begun:
                begun.append(time.perf_counter())
            if event.finish_reason:
                left -= 1
                if name == hot:
                    spent += time.perf_counter() - begun[0]

        return listen

    start = time.perf_counter()
    for text, name in zip(prompts(len(names), 64, seed), names, strict=True):
        parts = (AdapterWeight(engine.registry.get(name).hash),) if name else ()
        engine.add_request(GenerationRequest(text, sampling, parts), asked(name))
    while left:
        engine.step()
    count = sum(name == hot for name in names)
    return len(names) * NEW / (time.perf_counter() - start), count * (
        NEW - 1
    ) / spent if spent else 0.0


def merge_statically(engine: Any, folder: Path) -> None:
    """Take the adapter into the base's own weights, as `afina merge` does."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            layer = engine.base.model.get_submodule(path)
            with torch.no_grad():
                layer.weight.copy_(layer.weight.float().addmm(b.float(), a.float(), alpha=2.0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "afina-serve-mixed" / "134M"
    )
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    make_folder(options.folder, "134M", 8)
    engines = {
        "merging": make_engine("134M", max_num_seqs=RUNNING, merged_weights_bytes=1 << 30),
        "plain": make_engine("134M", max_num_seqs=RUNNING),
        "static": make_engine("134M", max_num_seqs=RUNNING),
    }
    for name in ("merging", "plain"):
        for number in range(8):
            engines[name].registry.add(f"a{number}", options.folder / f"a{number}")
    merge_statically(engines["static"], options.folder / "a0")
    rng = random.Random(0)
    skewed = [
        "a0" if rng.random() < 0.9 else f"a{rng.randrange(1, 8)}" for _ in range(options.requests)
    ]
    uniform = [f"a{rng.randrange(8)}" for _ in range(options.requests // 2)]
    rates: dict[str, list[float]] = {}
    for repeat in range(
        options.repeats + 1
    ):  # the first: warm-up, and the merging engine finds out
        for name, engine in engines.items():
            names: list[str | None] = [None] * len(skewed) if name == "static" else list(skewed)
            total, hot = run(engine, names, repeat, None if name == "static" else "a0")
            if repeat:
                rates.setdefault(f"{name}_skewed", []).append(total)
                rates.setdefault(f"{name}_hot", []).append(hot)
                print(
                    f"{name}: {total:.1f} tokens/s, the hot adapter's sequences {hot:.2f} each",
                    flush=True,
                )
    merged_steps = engines["merging"].figures()["merged_steps"]
    for repeat in range(options.repeats):
        for name in ("merging", "plain"):
            rates.setdefault(f"{name}_uniform", []).append(
                run(engines[name], list(uniform), 100 + repeat, None)[0]
            )
    medians = {name: statistics.median(values) for name, values in rates.items()}
    figures = {
        "hot_over_static": medians["merging_hot"] / medians["static_hot"],
        "skewed_over_plain": medians["merging_skewed"] / medians["plain_skewed"],
        "uniform_over_plain": medians["merging_uniform"] / medians["plain_uniform"],
        "plain_hot_over_static": medians["plain_hot"] / medians["static_hot"],
        "merged_steps": float(merged_steps),
    }
    targets = {"hot_over_static": (">=", 0.97), "uniform_over_plain": (">=", 0.95)}
    for key, value in figures.items():
        print(f"{key:26} {value:8.3f}")
    publish("merged_mode", figures, targets, rates, roofline())


if __name__ == "__main__":
    main()
