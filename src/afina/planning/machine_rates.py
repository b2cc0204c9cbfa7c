"""Rates of this machine, measured in a subprocess within seconds and cached on disk.

    $AFINA_CACHE/probe.json, or ~/.cache/afina/probe.json      a mapping from machine to `Rates`

The machine is its processor, torch's version, the number of threads, the kernels and the device: a
change of one of them leads to a new measurement. Each rate is the best of several tries, since
other processes may be running. Two real steps of the embedded base with a lora, of few and of many
tokens, determine the rest: bytes of the libraries, activations over counted ones (at least 1),
seconds over counted seconds, and seconds per layer.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from afina.errors import AfinaError
from afina.io.atomic import write_json
from afina.kernels.dispatch import kernels
from afina.planning.estimates import THIN, MachineRates, Workload
from afina.planning.model_shape import count_parameters, read_model_shape
from afina.planning.step_cost import StepCost
from afina.settings import TrainSettings

ROWS, LENGTHS = (16, 64, 256, 1024), (32, 128, 512, 1024)
HEADS, HEAD = 8, 64  # of the attention
WIDTH, OUT = 1024, 4096  # of the matrix in the products: 8 MB in 16 bits
TRIES, SECONDS = 4, 0.25  # of each figure: at least so many tries, and no more once so long
FEW, MANY = 64, 1024  # tokens of the embedded base's steps, in sequences of FEW
COMPILED = 2e7  # bytes of products compiled for another shape, which the plan counts apart
# Least seconds over counted seconds: a step has other weights each time, passes between products
# and a warm processor, and the small base's activations fit into caches, unlike others. Runs of
# benchmarks/plan_fit.py took 1.1 to 1.5, one 1.8.
MIN_TIME_FACTOR = 1.25
NUM_SETTLING_STEPS = 4  # steps after which a heap has stopped growing


def cache_file() -> Path:
    """Where rates are kept."""
    return (
        Path(os.environ.get("AFINA_CACHE") or Path.home() / ".cache" / "afina").expanduser()
        / "probe.json"
    )


def machine_key(device: str) -> str:
    """What the rates hold for."""
    where, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if found := re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else ""):
        where = found[1]
    if device == "cuda":
        where += f", {torch.cuda.get_device_name()}"
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return (
        f"{platform.node()}, {where}, {threads}, torch {torch.__version__}, {kernels.isa}, {device}"
    )


def measured_rates(device: str, anew: bool = False) -> MachineRates:
    """The rates of this machine, measured now where they are not known, or `anew`."""
    known, key = _read(), machine_key(device)
    if key not in known or anew:
        known[key] = _measured_apart(device)
        write_json(cache_file(), known)
    return MachineRates(**known[key])


def known_rates(device: str) -> MachineRates | None:
    """The rates of this machine, where they have been measured."""
    found = _read().get(machine_key(device))
    return MachineRates(**found) if found else None


def _read() -> dict[str, Any]:
    """All that is kept; nothing where the file is damaged or from another version."""
    try:
        names = set(MachineRates.__dataclass_fields__)
        return {
            key: value
            for key, value in json.loads(cache_file().read_text()).items()
            if set(value) == names
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _measured_apart(device: str) -> dict[str, Any]:
    """Return rates measured in a subprocess, whose memory is that of a training process."""
    print("afina: measuring this machine, once, for about ten seconds", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "afina.planning.machine_rates",
        device,
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise AfinaError(
            "this machine could not be measured",
            where=device,
            why=why,
            hint="try again with --remeasure",
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- what the process measures


def measure(device: str) -> MachineRates:
    """The rates, measured here and now; for a process that has done nothing else."""
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
            name: _product(512, THIN, dtype, device) for name, dtype in types.items()
        },
        copy_bandwidth=_copy(device),
        dequantise=_dequantise(device),
    )
    return _steps(device, rates, timed=True)


def best(run: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    times: list[float] = []
    run()
    while len(times) < TRIES or (sum(times) < SECONDS and len(times) < 100):
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
    from afina.kernels.varlen_attention import causal_attention

    shape = (1024 // length, HEADS, length, HEAD)
    query, key, value = (
        torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)
    )
    grad = torch.ones(shape, device=device, dtype=dtype)
    run = lambda: causal_attention(query, key, value, HEAD**-0.5).backward(grad)  # noqa: E731
    return 3.5 * 4 * 1024 * length * HEADS * HEAD / best(run, device)


def _copy(device: str) -> float:
    """Bytes read and written a second, larger than any cache."""
    x = torch.ones(32 << 20, device=device)
    y = torch.empty_like(x)
    return 2.0 * x.nbytes / best(lambda: y.copy_(x), device)


def _dequantise(device: str) -> float:
    from afina.kernels.nf4 import dequantize, quantize

    weight = quantize(torch.randn(OUT, WIDTH, device=device))
    return OUT * WIDTH / best(lambda: dequantize(weight, torch.bfloat16), device)


def _steps(device: str, rates: MachineRates, timed: bool) -> MachineRates:
    """Return the rates with the memory, or if `timed` the seconds, of steps of the embedded base.

    With two loads, t = factor * counted + blocks * overhead has one solution.
    """
    from afina.adapters.attach import attach
    from afina.data.packing import pack_examples
    from afina.data.renderer import Example
    from afina.models.loading import load_base
    from afina.objectives.language_modeling import batch_loss
    from afina.training import train as _imports  # noqa: F401  all that a training process imports
    from afina.training.setup.optimizer import AdapterOptimizer
    from afina.training.setup.set_up import build_adapter_config
    from afina.training.trainer import peak_memory_mb

    settings = TrainSettings(data=Path("none"), device=device)  # type: ignore[arg-type]
    shape = read_model_shape(settings, device)
    spec = build_adapter_config(shape.model, settings)
    step = StepCost(shape, count_parameters(shape, spec), settings, "none", device)
    base = load_base(device=device)
    adapter = attach(base.model, base.forward_context, "probe", spec)
    optimizer = AdapterOptimizer(adapter, 1e-4, {}, 0.0)
    adapter.train(True)

    def run(tokens: int) -> None:
        row = Example("", [5 + n for n in range(FEW)], [False] + [True] * (FEW - 1), 0, None)
        batch = pack_examples([row] * (tokens // FEW)).to(device)
        (batch_loss(base, batch, adapter.active) / batch.num_targets).backward()
        optimizer.step(1.0, 1.0)

    few, many = (Workload.full(tokens, FEW, labelled=(FEW - 1) / FEW) for tokens in (FEW, MANY))
    if not timed:
        if device != "cpu":
            return rates
        run(FEW)
        libraries = max(0.0, 1e6 * peak_memory_mb() - step.memory(few, 0.0).peak)
        for _ in range(NUM_SETTLING_STEPS):
            run(MANY)
        counted_bytes = step.memory(many, libraries)
        working = counted_bytes.activations + counted_bytes.other
        more = (1e6 * peak_memory_mb() - COMPILED - counted_bytes.peak + working) / working
        return replace(rates, libraries=libraries, allocator_overhead=max(1.0, more))
    counted = [
        sum(asdict(step.time(load, rates)).values()) - rates.overlaps for load in (few, many)
    ]
    seconds = [best(partial(run, load.tokens), device) for load in (few, many)]
    factor = (seconds[1] - seconds[0]) / (counted[1] - counted[0])
    factor = (
        1.0 if rates.overlaps else min(4.0, max(MIN_TIME_FACTOR, factor))
    )  # on a GPU so small a model measures Python alone
    block = max(
        1e-5, (seconds[0] - (0.0 if rates.overlaps else factor * counted[0])) / shape.num_layers
    )
    return replace(rates, time_factor=factor, seconds_per_layer=block)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(asdict(measure(sys.argv[1]))))
