"""Measurement of a machine's rates, in a process that does nothing else.

    python -m afina.training.measure_machine DEVICE NUM_THREADS

Each rate is the best of several tries, since other processes may be running. Two real steps of the
embedded base with a LoRA, of few and of many tokens, determine the rest: bytes of the libraries,
allocated over counted activations (at least 1), seconds over counted seconds, seconds per layer.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from afina.adapters.attach import attach
from afina.data.packing import pack_examples
from afina.data.renderer import Example
from afina.kernels.nf4 import dequantize, quantize
from afina.kernels.varlen_attention import causal_attention
from afina.models.loading import load_base
from afina.objectives.language_modeling import batch_loss
from afina.planning.estimates import SKINNY_COLUMNS, MachineRates, Workload
from afina.planning.model_shape import read_model_shape
from afina.planning.run_step import make_step
from afina.settings import TrainSettings
from afina.training import train as _imports  # noqa: F401  all that a training process imports
from afina.training.setup.optimizer import AdapterOptimizer
from afina.training.trainer import peak_memory_mb

ROWS, LENGTHS = (16, 64, 256, 1024), (32, 128, 512, 1024)
NUM_HEADS, HEAD_DIM = 8, 64  # of the attention
WIDTH, OUT = 1024, 4096  # of the matrix in the products: 8 MB in 16 bits
MIN_TRIES, MIN_SECONDS, MAX_TRIES = 4, 0.25, 100  # of each rate
FEW_TOKENS, MANY_TOKENS = 64, 1024  # of the embedded base's steps, in sequences of FEW_TOKENS
COMPILED_BYTES = 2e7  # of products compiled for another shape, which the plan counts separately
# Least seconds over counted seconds: a step has other weights each time, passes between products
# and a warm processor, and the small base's activations fit into caches, unlike others. Runs of
# benchmarks/plan_fit.py took 1.1 to 1.5, one 1.8.
MIN_TIME_FACTOR, MAX_TIME_FACTOR = 1.25, 4.0
NUM_SETTLING_STEPS = 4  # steps after which a heap has stopped growing


def measure(device: str) -> MachineRates:
    """Return the rates, measured now; the process must have done nothing else."""
    rates = _steps(
        device, MachineRates({}, {}, {}, 1.0, 1.0, 1.0, 0.0, 0.0, device != "cpu"), timed=False
    )
    types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    rates = replace(
        rates,
        matmul_rates={
            name: [[rows, _product(rows, OUT, dtype, device)] for rows in ROWS]
            for name, dtype in types.items()
        },
        attention={
            name: [[n, _attention(n, dtype, device)] for n in LENGTHS]
            for name, dtype in types.items()
        },
        skinny_matmul_rates={
            name: _product(512, SKINNY_COLUMNS, dtype, device) for name, dtype in types.items()
        },
        copy_bandwidth=_copy(device),
        dequantize=_dequantize(device),
    )
    return _steps(device, rates, timed=True)


def best(run: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest of several runs, after one to warm up."""
    times: list[float] = []
    run()
    while len(times) < MIN_TRIES or (sum(times) < MIN_SECONDS and len(times) < MAX_TRIES):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _product(rows: int, out: int, dtype: torch.dtype, device: str) -> float:
    a, w = (torch.randn(n, WIDTH, device=device).to(dtype) for n in (rows, out))
    return 2.0 * rows * out * WIDTH / best(lambda: a @ w.T, device)


def _attention(length: int, dtype: torch.dtype, device: str) -> float:
    """Return the rate of attention on 1,024 tokens, forward and backward, counted as non-causal."""
    shape = (1024 // length, NUM_HEADS, length, HEAD_DIM)
    query, key, value = (
        torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)
    )
    grad = torch.ones(shape, device=device, dtype=dtype)
    run = lambda: causal_attention(query, key, value, HEAD_DIM**-0.5).backward(grad)  # noqa: E731
    return 3.5 * 4 * 1024 * length * NUM_HEADS * HEAD_DIM / best(run, device)


def _copy(device: str) -> float:
    """Return the bytes read and written per second, of a tensor larger than any cache."""
    x = torch.ones(32 << 20, device=device)
    y = torch.empty_like(x)
    return 2.0 * x.nbytes / best(lambda: y.copy_(x), device)


def _dequantize(device: str) -> float:
    weight = quantize(torch.randn(OUT, WIDTH, device=device))
    return OUT * WIDTH / best(lambda: dequantize(weight, torch.bfloat16), device)


def _steps(device: str, rates: MachineRates, timed: bool) -> MachineRates:
    """Return the rates with the memory, or if `timed` the seconds, of steps of the embedded base.

    With two sizes, t = factor * counted + layers * overhead has one solution.
    """
    settings = TrainSettings(data=Path("none"), device=device)  # type: ignore[arg-type]
    shape = read_model_shape(settings, device)
    step, base = make_step(shape, settings, device), load_base(device=device)
    adapter = attach(base.model, base.forward_context, "probe", step.count.config)
    optimizer = AdapterOptimizer(adapter, 1e-4, {}, 0.0)
    adapter.train(True)

    mask = [False] + [True] * (FEW_TOKENS - 1)
    row = Example("", [5 + n for n in range(FEW_TOKENS)], mask, 0, None)
    labelled = (FEW_TOKENS - 1) / FEW_TOKENS
    few = Workload.full(FEW_TOKENS, FEW_TOKENS, labelled=labelled)
    many = Workload.full(MANY_TOKENS, FEW_TOKENS, labelled=labelled)

    def run(tokens: int) -> None:
        batch = pack_examples([row] * (tokens // FEW_TOKENS)).to(device)
        (batch_loss(base, batch, adapter.active) / batch.num_targets).backward()
        optimizer.step(1.0, 1.0)

    if not timed:
        if device != "cpu":
            return rates
        run(FEW_TOKENS)
        libraries = max(0.0, 1e6 * peak_memory_mb() - step.memory(few, 0.0).peak)
        for _ in range(NUM_SETTLING_STEPS):
            run(MANY_TOKENS)
        counted_bytes = step.memory(many, libraries)
        working = counted_bytes.activations + counted_bytes.other
        more = (1e6 * peak_memory_mb() - COMPILED_BYTES - counted_bytes.peak + working) / working
        return replace(rates, libraries=libraries, allocator_overhead=max(1.0, more))
    counted = [
        sum(asdict(step.time(load, rates)).values()) - rates.overlaps for load in (few, many)
    ]
    seconds = [best(partial(run, load.tokens), device) for load in (few, many)]
    if rates.overlaps:  # on a GPU so small a model measures Python alone
        return replace(rates, seconds_per_layer=max(1e-5, seconds[0] / shape.num_layers))
    factor = (seconds[1] - seconds[0]) / (counted[1] - counted[0])
    factor = min(MAX_TIME_FACTOR, max(MIN_TIME_FACTOR, factor))
    overhead = (seconds[0] - factor * counted[0]) / shape.num_layers
    return replace(rates, time_factor=factor, seconds_per_layer=max(1e-5, overhead))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(asdict(measure(sys.argv[1]))))
