"""Each CPU kernel beside its reference in PyTorch, and beside what the machine can do. `python benchmarks/kernel_rates.py`

Both sides run in turn, in one process; figures are medians. Weights are larger than the caches, as in a model: 24 matrices
of 4096 x 1024. Activations are those of 512 tokens in a Llama of 215M (width 1024, feed-forward 2688).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import publish, roofline
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from afina.kernels import elementwise, lora, mora, nf4  # noqa: F401 (they enter the operations)
from afina.kernels.dispatch import data_pointer, kernels
from afina.kernels.paged_attention import Scores, paged_attention, paged_attention_reference
from afina.kernels.varlen_attention import varlen_attention

OUT, IN, MATRICES = 4096, 1024, 24
TOKENS, WIDTH, WIDE = 512, 1024, 2688
BF16 = torch.bfloat16
Sides = dict[str, tuple[Callable[[], object], Callable[[], object]]]  # kernel, reference


def data(*shape: int) -> Tensor:
    """Random numbers in bf16."""
    return torch.randn(shape).to(BF16)


def weights() -> Sides:
    """NF4 and few rows: all matrices, one after another, each result given back before the next, as in a model."""
    dense = [data(OUT, IN) for _ in range(MATRICES)]
    held = [nf4.quantize(matrix) for matrix in dense]

    def every(function: Callable[..., object], matrices: list[Any]) -> Callable[[], object]:
        def call() -> None:
            for matrix in matrices:
                function(matrix)

        return call

    def both(call: Callable[[], object]) -> tuple[Callable[[], object], Callable[[], object]]:
        return call, lambda: without(call)

    sides: Sides = {
        "nf4_quantize": both(every(nf4.encode, dense[:4])),
        "nf4_dequantize": both(every(lambda m: nf4.dequantize(m, BF16), held)),
    }
    for rows in (1, 4, 8, 16, 32):
        x = data(rows, IN)
        torchs = every(lambda m, x=x: torch.nn.functional.linear(x, m), dense)  # in bf16, for both
        sides[f"bf16_{rows}_rows"] = (every(lambda m, x=x: few(x, m), dense), torchs)
        sides[f"nf4_{rows}_rows"] = (every(lambda m, x=x: nf4.nf4_linear(x, m), held), torchs)
    return sides


def few(x: Tensor, matrix: Tensor) -> Tensor:
    """The kernel's product, however many rows."""
    y = x.new_empty(len(x), len(matrix))
    kernels.product(
        data_pointer(x),
        1,
        len(x),
        matrix.shape[1],
        len(matrix),
        data_pointer(matrix),
        0,
        data_pointer(y),
    )
    return y


def activations() -> Sides:
    """Norm, SwiGLU, rotary, and their backwards."""
    x, grad, scale = data(TOKENS, WIDTH), data(TOKENS, WIDTH), data(WIDTH)
    gate, up, wide = data(TOKENS, WIDE), data(TOKENS, WIDE), data(TOKENS, WIDE)
    heads, cos, sin = data(TOKENS, 16, 64), data(TOKENS, 64), data(TOKENS, 64)
    ops = torch.ops.afina
    calls: dict[str, Callable[[], object]] = {
        "rms_norm": lambda: ops.rms_norm(x, scale, 1e-5),
        "rms_norm_backward": lambda: ops.rms_norm_backward(grad, x, scale, 1e-5),
        "swiglu": lambda: ops.swiglu(gate, up),
        "swiglu_backward": lambda: ops.swiglu_backward(wide, gate, up),
        "rotary": lambda: ops.rotary(heads, cos, sin, False),
        "rotary_backward": lambda: ops.rotary(heads, cos, sin, True),
    }
    return {name: (call, lambda call=call: without(call)) for name, call in calls.items()}


def adapters() -> Sides:
    """The grouped product, adapters x tokens each, by rank; its reference is a loop over the segments."""
    sides: Sides = {}
    for rank, count, each in ((8, 1, 512), (8, 8, 64), (16, 16, 1), (16, 64, 8), (64, 8, 64)):
        tokens = count * each
        x, y, grad = data(tokens, WIDTH), data(tokens, WIDTH), data(tokens, WIDTH)
        a, bt = [data(rank, WIDTH) for _ in range(count)], [data(rank, WIDTH) for _ in range(count)]
        table = torch.tensor([[k * each, (k + 1) * each, k] for k in range(count)])
        arguments = (x, table, torch.ones(count), a, bt)
        calls: dict[str, Callable[[], object]] = {
            "": lambda y=y, s=arguments: torch.ops.afina.grouped_lora(y, *s),
            "_backward": lambda g=grad, s=arguments: torch.ops.afina.grouped_lora_backward(g, *s),
        }
        for part, call in calls.items():
            sides[f"lowrank_r{rank}_{count}x{each}{part}"] = (call, lambda call=call: without(call))
    return sides


def squares() -> Sides:
    """MoRA's operators at rank 8, one adapter on 512 tokens and eight on 64 each; the reference is a loop over the segments."""
    size, blocks = 128, WIDTH // 128
    forms = {
        "truncation": mora.MoRALayout(size, 1, size, size),
        "sharing": mora.MoRALayout(size, 1, WIDTH, WIDTH),
        "runs": mora.MoRALayout(size, 1, WIDTH, WIDTH, is_sharing=True),
        "decoupling": mora.MoRALayout(size, blocks, WIDTH, WIDTH),
        "rotation": mora.MoRALayout(size, blocks, WIDTH, WIDTH, is_rotated=True),
    }
    sides: Sides = {}
    for count, each in ((1, 512), (8, 64), (8, 1)):
        tokens = count * each
        x, y, grad = data(tokens, WIDTH), data(tokens, WIDTH), data(tokens, WIDTH)
        table = torch.tensor([[k * each, (k + 1) * each, k] for k in range(count)])
        m = [data(size, size) for _ in range(count)]
        for name, f in forms.items():
            numbers = [
                size,
                f.num_vectors,
                f.num_inputs,
                f.num_outputs,
                int(f.is_sharing),
                int(f.is_rotated),
            ] * count
            arguments: tuple[Any, ...] = (x, table, torch.ones(count), numbers, m)
            calls: dict[str, Callable[[], object]] = {
                "": lambda y=y, s=arguments: torch.ops.afina.grouped_mora(y, *s),
                "_backward": lambda g=grad, s=arguments: torch.ops.afina.grouped_mora_backward(
                    g, *s
                ),
            }
            for part, call in calls.items():
                sides[f"square_{name}_{count}x{each}{part}"] = (
                    call,
                    lambda call=call: without(call),
                )
    return sides


def attentions() -> Sides:
    """Attention of whole sequences beside PyTorch's flash kernel, with gradients too, and of pieces over pages, which PyTorch's
    gets laid side by side: tokens x sequences, heads of 64; new tokens after a history."""
    sides: Sides = {}
    for tokens, count, heads in ((27, 75, 4), (256, 2, 16), (512, 1, 9), (4096, 1, 4)):
        q, k, v = (data(tokens * count, heads, 64).requires_grad_() for _ in range(3))
        seed, bounds = data(tokens * count, heads, 64), range(0, tokens * count + 1, tokens)

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, bounds: range = bounds) -> Tensor:
            return varlen_attention(q, k, v, bounds, 0.125)

        def flash(q: Tensor = q, k: Tensor = k, v: Tensor = v, count: int = count) -> Tensor:
            rows = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2).flatten(0, 1)

        both = torch.no_grad()(ours), torch.no_grad()(flash)
        sides[f"attention_{tokens}x{count}"] = both
        sides[f"attention_{tokens}x{count}_with_backward"] = (
            lambda f=ours, g=seed: f().backward(g),
            lambda f=flash, g=seed: f().backward(g),
        )
    for new, past in ((512, 0), (64, 4032), (768, 3328)):
        kv, query, table = (
            data((past + new) // 16, 2, 3, 16, 64),
            data(new, 9, 64),
            torch.arange((past + new) // 16),
        )
        sides[f"pages_{new}_after_{past}"] = (
            lambda q=query, kv=kv, t=table, n=new, p=past: paged_attention(
                q, kv, [0, n], [p], t[None], 0.125
            ),
            lambda q=query, kv=kv, t=table, p=past: paged_attention_reference(
                q, kv, p, t, Scores(0.125)
            ),
        )
    return sides


def without(call: Callable[[], object]) -> object:
    """The reference: the same call without the C++ library."""
    library, kernels.library = kernels.library, None
    try:
        return call()
    finally:
        kernels.library = library


def in_turn(sides: Sides, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(kernel, reference) seconds of each round, after one to warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, pair in sides.items():
            times = []
            for call in pair:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            if turn:
                seconds[name].append((times[0], times[1]))
    return seconds


def read_bandwidth() -> float:
    """GB/s of a sum over numbers that no cache holds."""
    x = torch.randn(64 << 20)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return 4 * x.numel() / statistics.median(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    if not kernels.library:
        parser.exit(1, "the C++ kernels are not built here\n")
    machine = roofline() | {"read_gbs": read_bandwidth()}
    parts = (weights, activations, adapters, squares, attentions)
    seconds = {name: times for part in parts for name, times in in_turn(part(), rounds).items()}
    ours = {name: statistics.median(t for t, _ in times) for name, times in seconds.items()}
    theirs = {name: statistics.median(t for _, t in times) for name, times in seconds.items()}
    dense, codes = 2 * OUT * IN * MATRICES, 0.516 * OUT * IN * MATRICES  # bytes
    figures = {f"{name}_ratio": theirs[name] / ours[name] for name in ours}
    figures |= {"dequant_gbs": (dense + codes) / ours["nf4_dequantize"] / 1e9}
    figures["dequant_of_copy"] = figures["dequant_gbs"] / machine["copy_gbs"]
    for rows in (1, 4, 8, 16, 32):
        flops = 2 * rows * OUT * IN * MATRICES / 1e9
        figures[f"bf16_{rows}_rows_of_read"] = (
            dense / ours[f"bf16_{rows}_rows"] / 1e9 / machine["read_gbs"]
        )
        figures[f"bf16_{rows}_rows_of_products"] = (
            flops / ours[f"bf16_{rows}_rows"] / machine["bf16_gflops"]
        )
        figures[f"nf4_{rows}_rows_of_read"] = (
            codes / ours[f"nf4_{rows}_rows"] / 1e9 / machine["read_gbs"]
        )
        figures[f"nf4_{rows}_rows_of_products"] = (
            flops / ours[f"nf4_{rows}_rows"] / machine["bf16_gflops"]
        )
    for name in sorted(ours):
        print(
            f"{name:32} {1e3 * ours[name]:9.3f} ms   reference {1e3 * theirs[name]:9.3f} ms   {theirs[name] / ours[name]:6.2f}x"
        )
    print(
        f"instruction set {kernels.isa}, {torch.get_num_threads()} threads",
        {k: round(v, 1) for k, v in machine.items()},
    )
    publish(
        "kernel_rates", figures, {"dequant_of_copy": (">=", 0.7)}, {"seconds": seconds}, machine
    )


if __name__ == "__main__":
    main()
