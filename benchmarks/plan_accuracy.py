"""Does `afina plan` know what `afina train` will take? `python benchmarks/plan_accuracy.py [--only NUMBER ...] [--folder F]`

Random Llamas of 10M to 1B, every method, several lengths, checkpointing off, of each n-th block and of all. Each case is
planned, then trained for a few steps, each in a process of its own. Memory is the largest resident set of the training process
at its end, time the median of its steps. What was trained is kept in the folder: a run that was cut off goes on where it
was, and a change of the plan alone needs no training again.

The plan's rates come from the probe and the embedded base, anew for each benchmark. SLACK, HOLES, BESIDES and STEADY were
set on runs that are none of these cases (plan_fit.py). The machine may be slower in one minute than in the
next: the rate of products is taken again before each training, and `paced` are predicted seconds times (the probe's rate /
the rate now).
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, peak_mb, publish, roofline, run_side

SIZES = {  # width, feed-forward, blocks, heads, heads of keys, vocabulary
    "10M": (256, 768, 8, 4, 2, 8192),
    "40M": (512, 1536, 10, 8, 4, 16000),
    "134M": (768, 2304, 14, 12, 4, 32000),
    "215M": (1024, 2816, 16, 16, 16, 32000),
    "500M": (1280, 4096, 24, 20, 4, 50000),
    "1B": (2048, 8192, 16, 32, 8, 128256),
}
STEPS = 4


def case(
    size: str, method: str, tokens: int, length: int, checkpointing: str | int = "off", **more: Any
) -> dict[str, Any]:
    """A case: what is trained, and the settings."""
    settings = {
        "method": method,
        "max_tokens_per_batch": tokens,
        "max_length": length,
        "gradient_checkpointing": checkpointing,
    }
    return {"size": size, "settings": settings | more}


CASES = [
    case("10M", "lora", 3072, 192),
    case("10M", "lora", 4096, 256, 2),
    case("10M", "full", 2048, 256),
    case("10M", "dora", 4096, 512),
    case("10M", "mora", 2048, 128, dtype="float32"),
    case("40M", "lora", 3072, 384),
    case("40M", "lora", 3072, 384, "all"),
    case("40M", "qlora", 2048, 512),
    case("40M", "mora", 3072, 256, 3),
    case("40M", "full", 1024, 256, optimizer="adamw-8bit"),
    case("40M", "freeze", 2048, 256),
    case("134M", "lora", 2048, 512, rank=64),
    case("134M", "lora", 1024, 128, dtype="float32"),
    case("134M", "dora", 2048, 256, "all"),
    case("134M", "qdora", 1024, 256),
    case("134M", "full", 1024, 256, "all"),
    case("215M", "lora", 512, 256),
    case("215M", "qlora", 512, 128),
    case("215M", "mora", 1024, 256, 2),
    case("215M", "lora", 2048, 1024, "all"),
    case("215M", "full", 512, 256),
    case("500M", "lora", 1024, 256, layers="last:6"),
    case("500M", "qmora", 512, 256, "all"),
    case("500M", "freeze", 512, 128),
    case("1B", "lora", 256, 256),
    case("1B", "qlora", 512, 512, "all"),
]


def make_base(size: str, folder: Path) -> None:
    """Random weights in bf16 on disk, with the embedded base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from afina.models.loading import EMBEDDED_FOLDER

    width, inner, blocks, heads, shared, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_FOLDER).save_pretrained(folder)


def make_rows(file: Path, tokens: int) -> None:
    """A text of at least `tokens` tokens, to be cut into pieces of one length."""
    file.write_text(
        "".join(
            f"The {n} dogs of the house ran to the sea, {n * 7} came back at night.\n"
            for n in range(tokens // 10)
        )
    )


def side(name: str, asked: dict[str, Any], number: int, folder: Path) -> dict[str, float]:
    """Make the base of the case that was asked for, plan it or train it, here."""
    base, data = folder / asked["size"], folder / f"{number}.txt"
    if name == "make":
        make_base(asked["size"], base)
        return {}
    import afina
    from afina.training.trainer import read_metrics

    values = asked["settings"] | {
        "base": str(base),
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "retention_text": folder / "general.txt",
    }
    if name == "plan":
        cost = afina.plan(data, **values)["cost"]
        told = {
            "bytes": cost["peak_bytes"],
            "seconds": cost["step_seconds"],
            "pace": pace(values.get("dtype", "bfloat16")),
        }
        return told | cost["memory"] | {f"s_{part}": value for part, value in cost["time"].items()}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        ticks = read_metrics(afina.train(data, **values, output_dir=Path(out) / "run").folder)
    return {
        "bytes": 1e6 * peak_mb(),
        "seconds": statistics.median(tick["seconds"] for tick in ticks[1:]),
    }


def pace(dtype: str) -> float:
    """The probe's rate of products over the one now."""
    import torch

    from afina.planning.machine_rates import known_rates
    from afina.training.measure_machine import OUT, _product

    known = known_rates("cpu")
    return known.rate(dtype, 256) / _product(256, OUT, getattr(torch, dtype), "cpu")  # type: ignore[union-attr]


def told(
    name: str, asked: dict[str, Any], number: int, folder: Path, script: str = __file__
) -> dict[str, float]:
    """What a side of `script` says of a case; what was trained by the same code is known already."""
    code = hashlib.sha256(json.dumps([asked, STEPS]).encode())
    for file in sorted((ROOT.parent / "src" / "afina").rglob("*.py")):
        code.update(file.read_bytes() if file.parent.name not in ("planning", "cli") else b"")
    kept = folder / f"{name}-{code.hexdigest()[:16]}.json"
    if name == "train" and kept.exists():
        return json.loads(kept.read_text())
    figures = run_side(
        sys.executable, [script, "--side", name, "--case", str(number), "--folder", str(folder)]
    )
    kept.write_text(json.dumps(figures))
    return figures


def judge(number: int, folder: Path) -> dict[str, Any]:
    """A case, planned and trained: what both said, and by how much the plan was off."""
    asked, data = CASES[number], folder / f"{number}.txt"
    make_rows(data, 3 * asked["settings"]["batch_tokens"])
    if not (folder / asked["size"] / "tokenizer.json").exists():
        told("make", asked, number, folder)
    planned, trained = told("plan", asked, number, folder), told("train", asked, number, folder)
    off = {key: planned[key] / trained[key] - 1 for key in ("bytes", "seconds")}
    off["paced"] = planned["seconds"] * planned["pace"] / trained["seconds"] - 1
    print(
        f"{number:2} {asked['size']:5} {asked['settings']['method']:6} {asked['settings']['checkpointing']!s:4} memory "
        f"{trained['bytes'] / 1e6:8.1f} MB {100 * off['bytes']:+6.1f}%   time {trained['seconds']:7.3f} s "
        f"{100 * off['seconds']:+6.1f}%, paced {100 * off['paced']:+6.1f}%",
        flush=True,
    )
    return {"plan": planned, "train": trained, "off": off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("make", "plan", "train"))
    parser.add_argument("--case", type=int)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "afina-plan-accuracy"
    )
    parser.add_argument("--only", type=int, nargs="*")
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.side:
        print(json.dumps(side(arguments.side, CASES[arguments.case], arguments.case, folder)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "general.txt").write_text("A bird sat on a stone by the road.\n")
    machine = {} if arguments.only else roofline()
    if not arguments.only:
        from afina.planning.machine_rates import measured_rates

        measured_rates("cpu", anew=True)
    numbers = arguments.only or range(len(CASES))
    lines = {
        f"{n} {CASES[n]['size']} {json.dumps(CASES[n]['settings'])}": judge(n, folder)
        for n in numbers
    }
    memory, seconds, paced = (
        [line["off"][key] for line in lines.values()] for key in ("bytes", "seconds", "paced")
    )
    figures = {
        "cases": len(lines),
        "memory_most_over": max(memory),
        "memory_most_under": max(0.0, *(-off for off in memory)),
        "memory_median_off": statistics.median(map(abs, memory)),
        "time_most_off": max(map(abs, seconds)),
        "time_median_off": statistics.median(map(abs, seconds)),
        "time_most_off_paced": max(map(abs, paced)),
        "time_median_off_paced": statistics.median(map(abs, paced)),
    }
    targets = {
        "cases": (">=", 20),
        "memory_most_over": ("<=", 0.1),
        "memory_most_under": ("<=", 0.0),
        "time_most_off": ("<=", 0.25),
    }
    if arguments.only:
        print(json.dumps(figures))
        return
    publish("plan_accuracy", figures, targets, lines, machine)


if __name__ == "__main__":
    main()
