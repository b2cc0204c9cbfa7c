"""The Triton kernels on a CUDA device, and steps of an 8B-shaped Llama beside PEFT's. `python benchmarks/gpu_kernels.py`

Each kernel is measured against the larger of two times that the device needs at least: for the bytes that must be moved,
at the copy bandwidth measured in the same run, and for the operations, at the bf16 product rate measured in the same run.
"of_limit" is the share of that ceiling that is reached, "over_torch" how many times faster than the reference in PyTorch.

Steps: random weights in the shape of Llama-3.1-8B, 4 x 1,024 tokens, bf16, rank 16 on all linear layers, every token a
label. Each side is a process of its own, in turn. MFU counts 4 x weights x tokens and causal attention, against the
measured product rate. Without bitsandbytes QLoRA has no peer here: it stands beside PEFT's LoRA.

Without CUDA nothing is measured, and that is said.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleave, median, publish
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "src"))  # where afina is not installed
DEVICE = "cuda"
WIDTH, WIDE, TOKENS = 4096, 14336, 8192
SHAPE = dict(
    vocab_size=128256,
    hidden_size=WIDTH,
    intermediate_size=WIDE,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
SEQUENCES, LENGTH, RANK, STEPS = 4, 1024, 16, 8
SIDES = ("lora", "qlora", "peft")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Case = tuple[Callable[[], object], float, float]  # what runs, bytes that must be moved, operations


def data(*shape: int) -> Tensor:
    """Random numbers in bf16."""
    return torch.randn(shape, device=DEVICE).bfloat16()


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call, the cache swept between calls."""
    import triton

    return triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median") / 1e3


def ceilings() -> dict[str, float]:
    """Copy bandwidth (GB/s, read and write) and bf16 product rate (GFLOP/s)."""
    x, a = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE), data(8192, 8192)
    y = torch.empty_like(x)
    return {
        "copy_gbs": 2 * x.numel() / seconds(lambda: y.copy_(x)) / 1e9,
        "bf16_gflops": 2 * 8192**3 / seconds(lambda: a @ a) / 1e9,
    }


# ---- the kernels


def weights() -> dict[str, Case]:
    """NF4: made, written out, times few rows."""
    from afina.kernels import nf4

    dense, count = data(WIDE, WIDTH), WIDE * WIDTH
    held = nf4.quantize(dense)
    cases: dict[str, Case] = {
        "nf4_encode": (lambda: nf4.encode(dense), 2 * count + 0.5625 * count, 0),
        "nf4_dequantize": (
            lambda: nf4.dequantize(held, torch.bfloat16),
            2 * count + held.nbytes,
            0,
        ),
    }
    for rows in (1, 4, 16, 32):
        x = data(rows, WIDTH)
        moved = held.nbytes + 2 * rows * (WIDTH + WIDE)
        cases[f"nf4_{rows}_rows"] = (lambda x=x: nf4.nf4_linear(x, held), moved, 2 * rows * count)  # type: ignore[misc]
    return cases


def adapters() -> dict[str, Case]:
    """The grouped product and its backward, of adapters with ranks (one each) x tokens each."""
    from afina.kernels import lora  # noqa: F401 (it enters the operations)

    ops, cases = torch.ops.afina, {}
    mixes = {
        "r16_1x8192": ([16], 8192),
        "r16_8x1024": ([16] * 8, 1024),
        "mixed_8x1024": ([4, 8, 8, 16, 16, 32, 64, 128], 1024),
        "r16_64x1": ([16] * 64, 1),
    }
    for name, (ranks, each) in mixes.items():
        tokens = len(ranks) * each
        x, y = data(tokens, WIDTH), data(tokens, WIDTH)
        a, bt = [data(r, WIDTH) for r in ranks], [data(WIDTH, r).T for r in ranks]
        table = torch.tensor([[k * each, (k + 1) * each, k] for k in range(len(ranks))])
        given = (x, table, torch.ones(len(ranks)), a, bt)
        run, matrices = 2 * tokens * WIDTH, 2 * 2 * sum(ranks) * WIDTH
        products = 2 * 2 * each * sum(ranks) * WIDTH
        cases[f"lowrank_{name}"] = (
            lambda y=y, g=given: ops.grouped_lora(y, *g),
            3 * run + matrices,
            products,
        )
        back = (
            lambda y=y, g=given: ops.grouped_lora_backward(y, *g),
            3 * run + 2 * matrices,
            3 * products,
        )
        cases[f"lowrank_{name}_backward"] = back
    return cases


def elementwise() -> dict[str, Case]:
    """Norm, SwiGLU, rotary, and their backwards."""
    from afina.kernels import elementwise  # noqa: F401 (it enters the operations)

    ops = torch.ops.afina
    x, grad, scale = data(TOKENS, WIDTH), data(TOKENS, WIDTH), data(WIDTH)
    gate, up, wide = data(TOKENS, WIDE), data(TOKENS, WIDE), data(TOKENS, WIDE)
    heads, cos, sin = data(TOKENS, WIDTH // 128, 128), data(TOKENS, 128), data(TOKENS, 128)
    return {
        "rms_norm": (lambda: ops.rms_norm(x, scale, 1e-5), 4 * x.numel(), 0),
        "rms_norm_backward": (
            lambda: ops.rms_norm_backward(grad, x, scale, 1e-5),
            6 * x.numel(),
            0,
        ),
        "swiglu": (lambda: ops.swiglu(gate, up), 6 * gate.numel(), 0),
        "swiglu_backward": (lambda: ops.swiglu_backward(wide, gate, up), 10 * gate.numel(), 0),
        "rotary": (lambda: ops.rotary(heads, cos, sin, False), 4 * x.numel() + 4 * cos.numel(), 0),
    }


def paged() -> dict[str, Case]:
    """A decoding step's attention: 64 sequences, and one alone, over 4,096 keys each (32 heads, 8 of keys, 128 wide)."""
    from afina.kernels.triton import paged_attention

    cases: dict[str, Case] = {}
    for count, keys in ((64, 4096), (1, 4096)):
        kv, query = data(count * keys // 16, 2, 8, 16, 128), data(count, 32, 128)
        tables = torch.randperm(len(kv), device=DEVICE).view(count, -1).int()
        out, bounds, pasts = torch.empty_like(query), tuple(range(count + 1)), [keys - 1] * count
        arguments = (query, kv, bounds, pasts, tables, out, 16, 128**-0.5)
        cases[f"paged_{count}x{keys}"] = (
            lambda a=arguments: paged_attention(*a),
            kv.nbytes,
            4 * count * 32 * keys * 128,
        )  # type: ignore[misc]
    return cases


def kernel_figures(machine: dict[str, float]) -> dict[str, float]:
    """Share of the ceiling, and speed over the reference, of each kernel."""
    from afina.kernels.dispatch import kernels

    figures: dict[str, float] = {}
    for family in (weights, adapters, elementwise, paged):
        for name, (call, moved, operations) in family().items():
            least = max(moved / machine["copy_gbs"], operations / machine["bf16_gflops"]) / 1e9
            took = seconds(call)
            figures[f"{name}_of_limit"] = least / took
            if not name.startswith("paged"):  # which is called by itself here
                before, kernels.triton = kernels.triton, ()
                figures[f"{name}_over_torch"] = seconds(call) / took
                kernels.triton = before
            print(
                f"{name:32} {took * 1e6:10.1f} us   {100 * least / took:5.1f}% of the ceiling",
                flush=True,
            )
        torch.cuda.empty_cache()
    return figures


# ---- the steps


def random_llama(attention: str | None = None) -> Any:
    """A Llama of random weights, on the device, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM._from_config(
            LlamaConfig(**SHAPE), attn_implementation=attention, dtype=torch.bfloat16
        )


def our_step(method: str) -> Callable[[], None]:
    """A step of afina's lora or qlora."""
    from afina.adapters.attach import attach
    from afina.adapters.target_selection import resolve_target_modules
    from afina.data.packing import pack_examples
    from afina.data.renderer import Example
    from afina.io.adapter_config import AdapterConfig
    from afina.models.causal_lm import CausalLM
    from afina.models.fast_llama import install_fast_modules
    from afina.models.nf4 import quantize_model
    from afina.objectives.language_modeling import batch_loss
    from afina.training.setup.optimizer import AdapterOptimizer

    model = random_llama("afina").requires_grad_(False).eval()
    if method == "qlora":
        quantize_model(model)
        torch.cuda.empty_cache()
    install_fast_modules(model)
    base = CausalLM(model, "random")
    spec = AdapterConfig(
        "lora", resolve_target_modules(model, "all-linear", None, False), rank=RANK, alpha=2 * RANK
    )
    adapter = attach(model, base.forward_context, "a", spec)
    optimizer = AdapterOptimizer(adapter, 1e-4, {}, 0.01)
    rows = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, LENGTH)).tolist()
    batch = pack_examples(
        [Example("", row, [False] + [True] * (LENGTH - 1), 0, None) for row in rows]
    ).to(DEVICE)

    def step() -> None:
        (batch_loss(base, batch, adapter.active) / batch.num_targets).backward()
        optimizer.step(1.0, 1.0)

    return step


def peft_step() -> Callable[[], None]:
    """The same step in PEFT."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        random_llama("sdpa"), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    )
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-4, fused=True)
    x = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, LENGTH), device=DEVICE)

    def step() -> None:
        model(input_ids=x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def one_side(side: str) -> None:
    """Print the median seconds of a step and the peak memory (GB) of a side."""
    step = peft_step() if side == "peft" else our_step(side)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(STEPS + 2):  # two to warm up: kernels are compiled, memory is taken
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times += [time.perf_counter() - start] if number > 1 else []
    print(
        json.dumps(
            {
                "seconds": statistics.median(times),
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            }
        )
    )


def step_figures(
    machine: dict[str, float], repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Tokens a second, MFU and peak of each side; ours over PEFT's."""
    heads = 2 * WIDTH * (WIDTH + 1024)  # q, o; k, v
    weights = 32 * (heads + 3 * WIDTH * WIDE) + SHAPE["vocab_size"] * WIDTH
    tokens = SEQUENCES * LENGTH
    operations = 4 * weights * tokens + 6 * 32 * tokens * LENGTH * WIDTH
    runs = interleave(
        {side: (sys.executable, [__file__, "--side", side]) for side in SIDES}, repeats
    )
    took = {side: median(runs[side], "seconds") for side in SIDES}
    peaks = {side: median(runs[side], "peak_gb") for side in SIDES}
    figures = {f"{side}_tokens_per_second": tokens / took[side] for side in SIDES}
    figures |= {
        f"{side}_mfu": operations / took[side] / 1e9 / machine["bf16_gflops"] for side in SIDES
    }
    figures |= {f"{side}_peak_gb": peaks[side] for side in SIDES}
    figures |= {f"{side}_ratio": took["peft"] / took[side] for side in ("lora", "qlora")}
    return figures | {"qlora_over_lora": took["qlora"] / took["lora"]}, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--only", choices=("kernels", "steps"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu_kernels: there is no CUDA device here. Nothing was measured, and no figures are written."
        )
        return
    if arguments.side:
        return one_side(arguments.side)
    machine = ceilings()
    print(json.dumps({"device": torch.cuda.get_device_name()} | machine), flush=True)
    figures: dict[str, float] = {} if arguments.only == "steps" else kernel_figures(machine)
    runs: dict[str, Any] = {}
    if arguments.only != "kernels":
        more, runs = step_figures(machine, arguments.repeats)
        figures |= more
    goals = {
        "nf4_dequantize_of_limit": (">=", 0.8),
        "lowrank_r16_1x8192_of_limit": (">=", 0.8),
        "lora_ratio": (">=", 1.0),
    }
    targets = {key: goal for key, goal in goals.items() if key in figures}
    publish("gpu_kernels", figures, targets, runs, machine)


if __name__ == "__main__":
    main()
