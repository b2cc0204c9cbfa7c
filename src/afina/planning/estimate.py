"""Estimates of memory and time of a run, changes that make it fit, and a table of methods."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method, registered_methods
from afina.errors import AfinaError
from afina.objectives.workload import StepWorkload
from afina.planning.checkpointing_policy import choose_level, peak_memory
from afina.planning.estimates import Workload
from afina.planning.generation_cost import eval_seconds, phase_seconds
from afina.planning.machine import Machine, smallest_gpu
from afina.planning.model_shape import ModelShape
from afina.planning.run_step import make_step
from afina.planning.step_cost import StepCost
from afina.settings import PlanSettings

MIN_BATCH_TOKENS = 64  # a smaller micro-batch is not proposed
MAX_BATCH_TOKENS = 1 << 24
NUM_OTHER_EVALS = 3  # evaluations besides those of `eval_steps`: one before, two at the end


def estimate_run(
    step: StepCost, load: Workload, workload: StepWorkload, machine: Machine, steps: int | None
) -> dict[str, Any]:
    """Return memory and time of a run of `steps` optimizer steps; what is not known is None."""
    step, level, why = choose_level(step, load, machine)
    memory = peak_memory(step, load, machine)
    update = step.time(load, machine.rates) if machine.rates else None
    phases = phase_seconds(step, load, workload, machine.rates) if machine.rates else None
    is_cuda = machine.device == "cuda"
    with_all = peak_memory(step.with_checkpointing(1), load, machine)
    return {
        "peak_bytes": round(memory.peak),
        "memory": {name: round(value) for name, value in asdict(memory).items()},
        "step_seconds": sum(phases.values()) if phases else None,
        "time": {n: v for n, v in asdict(update).items() if n != "overlaps"} if update else None,
        "phases": phases,
        "not_counted": list(workload.not_counted),
        "run_seconds": _run_seconds(step, load, workload, machine, steps),
        "fits": machine.fits(memory.peak),
        "checkpointing": {"used": level, "why": why},
        "card_gib": smallest_gpu(memory.peak) if is_cuda else None,
        "card_gib_all": smallest_gpu(with_all.peak) if is_cuda else None,
        "trainable_parameters": step.count.trainable,
        "file_bytes": step.count.file_bytes,
    }


def _run_seconds(
    step: StepCost, load: Workload, workload: StepWorkload, machine: Machine, steps: int | None
) -> float | None:
    if machine.rates is None or steps is None:
        return None
    each = sum(phase_seconds(step, load, workload, machine.rates).values())
    evals = steps // (step.settings.eval_steps or max(1, steps // 10)) + NUM_OTHER_EVALS
    first = workload.initial_tokens * step.forward(load, machine.rates) / load.mean_tokens
    return steps * each + evals * eval_seconds(step, load, workload, machine.rates) + first


def largest_batch(step: StepCost, load: Workload, machine: Machine) -> int | None:
    """Return the most tokens per micro-batch that fit: 0 for none, None for unknown memory."""
    if machine.memory is None:
        return None

    def fits(tokens: int) -> bool:
        return bool(machine.fits(peak_memory(step, load.at(tokens), machine).peak))

    low, high = 0, MIN_BATCH_TOKENS
    while high <= MAX_BATCH_TOKENS and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low >= MIN_BATCH_TOKENS else 0


def remedies(
    shape: ModelShape,
    settings: PlanSettings,
    machine: Machine,
    load: Workload,
    extra_bytes: float = 0.0,
) -> list[dict[str, Any]]:
    """Return changes that make a run fit, the mildest first.

    Tried are checkpointing, smaller micro-batches, a base in 4 bits, and combinations of them;
    `extra_bytes` are those that no change reduces.
    """
    if machine.memory is None:
        return []
    found: list[dict[str, Any]] = []
    for change in _changes(shape, settings):
        changed = settings.model_copy(update=change)
        step = replace(make_step(shape, changed, machine.device), extra_bytes=extra_bytes)
        is_auto = settings.gradient_checkpointing == "auto"
        batch = largest_batch(step.with_checkpointing(1) if is_auto else step, load, machine)
        if not batch:
            continue
        smaller = load.at(min(batch, load.tokens))
        if smaller.tokens < load.tokens:
            change = {**change, "max_tokens_per_batch": int(smaller.tokens * load.attention_ratio)}
        step = choose_level(step, smaller, machine)[0]
        seconds = step.time(smaller, machine.rates).step if machine.rates else None
        peak = round(peak_memory(step, smaller, machine).peak)
        found.append({"settings": change, "peak_bytes": peak, "step_seconds": seconds})
    return found


def _changes(shape: ModelShape, settings: PlanSettings) -> Iterator[dict[str, Any]]:
    method = get_preset(settings.method, shape.num_layers).method
    in_4_bits = "qlora" if get_method(method).replaces_base else f"q{settings.method}"
    quantized: list[dict[str, Any]] = [{}]
    if not settings.method.startswith("q"):
        quantized.append({"method": in_4_bits})
    levels: list[dict[str, Any]] = [{}]
    if settings.gradient_checkpointing not in ("all", "auto"):
        levels.append({"gradient_checkpointing": "all"})
    for method_change in quantized:
        yield from (level | method_change for level in levels)


def estimate_methods(
    shape: ModelShape,
    settings: PlanSettings,
    machine: Machine,
    load: Workload,
    workload: StepWorkload,
    steps: int | None,
) -> list[dict[str, Any]]:
    """Return the estimate of each method, on a base in 16 or 32 and in 4 bits.

    A method that cannot be used has "why" instead.
    """
    lines: list[dict[str, Any]] = []
    for name, kind in registered_methods().items():
        for method in [name, "freeze"] if kind.replaces_base else [name, f"q{name}"]:
            changed = settings.model_copy(update={"method": method})
            try:
                step = make_step(shape, changed, machine.device)
                figures = estimate_run(step, load, workload, machine, steps)
            except AfinaError as error:
                figures = {"why": error.what}
            lines.append({"method": method} | figures)
    return sorted(lines, key=lambda line: line.get("peak_bytes", float("inf")))
