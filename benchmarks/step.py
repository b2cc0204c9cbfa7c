"""The dense step of each method, beside PEFT's. `python benchmarks/step.py`

A random Llama of 215M (12 x 1024), 2 x 256 tokens, bf16, adapters of rank 8 on all linear layers. Our methods take their steps
in turn, in one process; PEFT's methods, and PEFT + bitsandbytes, in one process each. All these run in turn, too.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

from common import PEERS, interleave, median, publish, roofline
from train_vs_trl import DENSE

ROUNDS, TOKENS = 9, 512
OURS = ("lora", "dora", "mora", "qlora")


def ours() -> None:
    """Median seconds of a step of each of our methods, and of writing all NF4 weights out once."""
    import torch

    torch.set_num_threads(2)
    from transformers import LlamaConfig, LlamaForCausalLM

    from afina.adapters.attach import attach
    from afina.adapters.target_selection import resolve_target_modules
    from afina.data.packing import pack_examples
    from afina.data.renderer import Example
    from afina.io.adapter_config import AdapterConfig
    from afina.models.causal_lm import CausalLM
    from afina.models.fast_llama import install_fast_modules
    from afina.models.nf4 import NF4Linear, quantize_model
    from afina.objectives.language_modeling import batch_loss
    from afina.training.setup.optimizer import AdapterOptimizer

    def make_step(method: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(LlamaConfig(**DENSE), attn_implementation="afina").to(
            torch.bfloat16
        )
        model.requires_grad_(False).eval()
        if method.startswith("q"):
            quantize_model(model)
        install_fast_modules(model)
        base = CausalLM(model, "random")
        targets = resolve_target_modules(model, "all-linear", None, False)
        adapter = attach(
            model,
            base.forward_context,
            "a",
            AdapterConfig(method.removeprefix("q"), targets, rank=8, alpha=16),
        )
        optimizer = AdapterOptimizer(adapter, 1e-4, {}, 0.01)
        rows = torch.randint(0, 32000, (2, 256)).tolist()
        batch = pack_examples([Example("", row, [False] + [True] * 255, 0, None) for row in rows])
        bases[method] = base

        def step() -> None:
            (batch_loss(base, batch, adapter.active) / batch.num_targets).backward()
            optimizer.step(1.0, 1.0)

        return step

    bases: dict[str, CausalLM] = {}
    steps = {method: make_step(method) for method in OURS}
    layers = [m for m in bases["qlora"].model.modules() if isinstance(m, NF4Linear)]

    def dequantise() -> None:
        for layer in layers:  # each dropped before the next, as in a step
            layer.dequantize()

    steps["dequantise"] = dequantise
    print(
        json.dumps(
            in_turn(steps) | {"nf4_weights": sum(layer.codes.numel() * 2 for layer in layers)}
        )
    )


def in_turn(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peft(method: str) -> None:
    """Median seconds of a step of PEFT's lora, dora, or lora on bitsandbytes' NF4."""
    import torch

    torch.set_num_threads(2)
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**DENSE)).to(torch.bfloat16)
    if method == "qlora":
        import tempfile

        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = LlamaForCausalLM.from_pretrained(
                folder, quantization_config=how, device_map="cpu", dtype=torch.bfloat16
            )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=names, use_dora=method == "dora")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = torch.randint(0, 32000, (2, 256))

    def step() -> None:
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    print(json.dumps(in_turn({method: step})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("ours", "lora", "dora", "qlora"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        return ours() if arguments.side == "ours" else peft(arguments.side)
    if not PEERS.exists():
        sys.exit("the peers' environment is missing: make peers")
    machine = roofline()
    sides = {"ours": (sys.executable, [__file__, "--side", "ours"])}
    runs = interleave(
        sides | {m: (PEERS, [__file__, "--side", m]) for m in ("lora", "dora", "qlora")},
        arguments.repeats,
    )
    seconds = {method: median(runs["ours"], method) for method in (*OURS, "dequantise")}
    moved = runs["ours"][0]["nf4_weights"] * (
        0.516 + 2
    )  # bytes: codes and scales read, bf16 written
    flops = 4 * 182e6 * TOKENS
    figures = {
        **{
            f"{method}_ratio": median(runs[method], method) / seconds[method]
            for method in ("lora", "dora", "qlora")
        },
        "dora_over_lora": seconds["dora"] / seconds["lora"],
        "mora_over_lora": seconds["mora"] / seconds["lora"],
        "qlora_over_lora": seconds["qlora"] / seconds["lora"],
        "dequant_of_copy": moved / seconds["dequantise"] / 1e9 / machine["copy_gbs"],
        "lora_share_of_roofline": flops / seconds["lora"] / 1e9 / machine["bf16_gflops"],
        **{f"{method}_tokens_per_second": TOKENS / seconds[method] for method in OURS},
    }
    targets = {
        "lora_ratio": (">=", 1.7),
        "dora_ratio": (">=", 2),
        "qlora_ratio": (">=", 1.6),
        "dora_over_lora": ("<=", 1.25),
        "mora_over_lora": ("<=", 1.25),
        "qlora_over_lora": ("<=", 1.05),
        "dequant_of_copy": (">=", 0.7),
    }
    publish("step", figures, targets, runs, machine)


if __name__ == "__main__":
    main()
