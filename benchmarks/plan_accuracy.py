"""Does `afina plan` know what `afina train` will take? `python benchmarks/plan_accuracy.py [--only NUMBER ...]`

Random Llamas of 10M to 1B; each case is planned, then trained for a few steps, each in a process of its own. Memory is the
largest resident set of the training process, time the median of its steps. The plan's rates come from
the probe and the embedded base. Its constants for holes in memory (SLACK, HOLES, BESIDES) were fitted to lora runs of the
10M and 40M shapes that are not among the cases: 10M 1,024 tokens in 128s, 40M 2,048 and 4,096 in 256s, the last also
with checkpointing.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import publish, roofline, run_side

SIZES = {  # width, feed-forward, blocks, heads, heads of keys, vocabulary
    "10M": (256, 768, 8, 4, 2, 8192),
    "40M": (512, 1536, 10, 8, 4, 16000),
    "134M": (768, 2304, 14, 12, 4, 32000),
    "215M": (1024, 2816, 16, 16, 16, 32000),
    "500M": (1280, 4096, 24, 20, 4, 50000),
    "1B": (2048, 8192, 16, 32, 8, 128256),
}
STEPS = 5


def case(size: str, method: str, tokens: int, length: int, checkpointing: bool = False, **more: Any) -> dict[str, Any]:
    """A case: what is trained, and the settings."""
    settings = {"method": method, "batch_tokens": tokens, "max_length": length, "checkpointing": checkpointing}
    return {"size": size, "settings": settings | more}


CASES = [
    case("10M", "lora", 3072, 192),
    case("10M", "full", 2048, 256),
    case("10M", "dora", 4096, 512),
    case("10M", "mora", 2048, 128, dtype="float32"),
    case("40M", "lora", 3072, 384),
    case("40M", "lora", 3072, 384, True),
    case("40M", "qlora", 2048, 512),
    case("40M", "full", 1024, 256, optimizer="adamw-8bit"),
    case("40M", "freeze", 2048, 256),
    case("134M", "lora", 2048, 512, rank=64),
    case("134M", "lora", 2048, 512, dtype="float32"),
    case("134M", "dora", 2048, 256, True),
    case("134M", "qdora", 1024, 256),
    case("134M", "full", 1024, 256, True),
    case("215M", "lora", 512, 256),
    case("215M", "qlora", 512, 256),
    case("215M", "mora", 1024, 256),
    case("215M", "lora", 2048, 1024, True),
    case("215M", "full", 512, 256),
    case("500M", "lora", 1024, 256, layers="last:6"),
    case("500M", "qmora", 1024, 512, True),
    case("500M", "freeze", 1024, 256),
    case("1B", "lora", 512, 256),
    case("1B", "qlora", 512, 512, True),
]


def make_base(size: str, folder: Path) -> None:
    """Random weights in bf16 on disk, with the embedded base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from afina.base.load import EMBEDDED_FOLDER

    width, inner, blocks, heads, shared, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=shared, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_FOLDER).save_pretrained(folder)


def make_rows(file: Path, tokens: int) -> None:
    """A text of at least `tokens` tokens, to be cut into pieces of one length."""
    file.write_text("".join(f"The {n} dogs of the house ran to the sea, {n * 7} came back at night.\n" for n in range(tokens // 10)))


def side(name: str, number: int, folder: Path) -> dict[str, float]:
    """Plan or train case `number`, here."""
    import afina
    from afina.training.loop import read_metrics

    asked = CASES[number]
    base, data = folder / asked["size"], folder / f"{number}.txt"
    values = asked["settings"] | {"base": str(base), "steps": STEPS, "check_every": STEPS, "general": folder / "general.txt"}
    if name == "plan":
        cost = afina.plan(data, **values)["cost"]
        return {"bytes": cost["peak_bytes"], "seconds": cost["step_seconds"]} | cost["memory"] | {
            f"s_{part}": value for part, value in cost["time"].items()}  # fmt: skip
    run = afina.train(data, **values, out=folder / f"run-{number}")
    ticks = read_metrics(run.folder)
    return {"bytes": 1e6 * run.story["peak_memory_mb"], "seconds": statistics.median(tick["seconds"] for tick in ticks[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("make", "plan", "train"))
    parser.add_argument("--case", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", type=int, nargs="*")
    arguments = parser.parse_args()
    if arguments.side == "make":
        make_base(CASES[arguments.case]["size"], arguments.folder / CASES[arguments.case]["size"])
        print("{}")
        return
    if arguments.side:
        print(json.dumps(side(arguments.side, arguments.case, arguments.folder)))
        return
    lines: dict[str, Any] = {}
    machine = {} if arguments.only else roofline()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "general.txt").write_text("A bird sat on a stone by the road.\n")
        for number, asked in enumerate(CASES):
            if arguments.only and number not in arguments.only:
                continue
            make_rows(folder / f"{number}.txt", 4 * asked["settings"]["batch_tokens"])
            sides = [*(() if (folder / asked["size"]).exists() else ("make",)), "plan", "train"]
            told = {s: run_side(sys.executable, [__file__, "--side", s, "--case", str(number), "--folder", name]) for s in sides}
            off = {key: told["plan"][key] / told["train"][key] - 1 for key in ("bytes", "seconds")}
            lines[f"{number} {asked['size']} {json.dumps(asked['settings'])}"] = told | {"off": off}
            print(f"{number:2} {asked['size']:5} {asked['settings']['method']:6} memory {told['train']['bytes'] / 1e6:8.1f} MB "
                  f"{100 * off['bytes']:+6.1f}%   time {told['train']['seconds']:7.3f} s {100 * off['seconds']:+6.1f}%", flush=True)
    memory, seconds = ([line["off"][key] for line in lines.values()] for key in ("bytes", "seconds"))
    figures = {
        "cases": len(lines),
        "memory_most_over": max(memory),
        "memory_most_under": -min(0.0, *memory, 0.0),
        "time_most_off": max(map(abs, seconds)),
        "time_median_off": statistics.median(map(abs, seconds)),
    }
    targets = {"cases": (">=", 20), "memory_most_over": ("<=", 0.1), "memory_most_under": ("<=", 0.0), "time_most_off": ("<=", 0.25)}
    if arguments.only:
        print(json.dumps(figures))
        return
    publish("plan_accuracy", figures, targets, lines, machine)


if __name__ == "__main__":
    main()
