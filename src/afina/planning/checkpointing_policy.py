"""Choice of the gradient checkpointing level where the setting is "auto".

Of off, every fourth layer, every third, every second and all, the first with which a run fits: each
level takes less memory and more time than the one before. `afina plan` prints the level and the
reason; `afina train` uses the same function.
"""

from collections.abc import Sequence
from dataclasses import replace

from afina.planning.estimates import MemoryEstimate, Workload
from afina.planning.machine import Machine, detect_machine
from afina.planning.model_shape import read_model_shape
from afina.planning.run_step import run_step
from afina.planning.step_cost import StepCost
from afina.training.setup.set_up import RunSetup

CHECKPOINTING_LEVELS: tuple[str | int, ...] = ("off", 4, 3, 2, "all")


def choose_checkpointing(
    setups: Sequence[RunSetup],
) -> tuple[str | int, str | None, float | None]:
    """Return the level of runs that share a base and its passes, why, and the planned peak memory.

    The memory is in bytes, and None where it is not predicted.
    """
    settings = setups[0].settings
    tasks = [setup.prepared.task for setup in setups]
    workloads = [None if task.planned_by_trial else task.step_workload() for task in tasks]
    known = [workload for workload in workloads if workload is not None]
    if len(known) < len(setups):
        return "off", "memory is not predicted for this objective", None
    machine = detect_machine(settings, measure=False)
    shape = read_model_shape(settings, machine.device)
    steps = [
        run_step(shape, setup, workload, machine.device)
        for setup, workload in zip(setups, known, strict=True)
    ]
    load = _in_one_pass([Workload.of(workload) for workload in known])
    memories = [step.memory(load, 0.0) for step in steps]
    largest = max(range(len(steps)), key=lambda number: memories[number].activations)
    others = sum(
        memory.learned + memory.optimizer + 4.0 * step.count.trainable
        for number, (memory, step) in enumerate(zip(memories, steps, strict=True))
        if number != largest
    )
    step = replace(steps[largest], extra_bytes=steps[largest].extra_bytes + others)
    chosen, level, why = choose_level(step, load, machine)
    return level, why, peak_memory(chosen, load, machine).peak


def _in_one_pass(loads: Sequence[Workload]) -> Workload:
    """Return the passes of several runs whose micro-batches are joined."""
    longest = max(loads, key=lambda load: load.max_length)
    tokens, targets = sum(load.tokens for load in loads), sum(load.labels for load in loads)
    return replace(longest, tokens=tokens, labels=targets)


def choose_level(
    step: StepCost, load: Workload, machine: Machine
) -> tuple[StepCost, str | int, str | None]:
    """Return the step at its checkpointing level, the level, and the reason of an automatic one."""
    if step.settings.gradient_checkpointing != "auto":
        return step, step.settings.gradient_checkpointing, None
    if not step.shape.model.supports_gradient_checkpointing:
        return step, "off", "this model family does not support gradient checkpointing"
    if machine.memory is None:
        return step, "off", "the device is absent, so its memory is not known"
    memory, without = f"{machine.memory / 1e9:,.1f} GB", 0.0
    for level in CHECKPOINTING_LEVELS:
        settings = step.settings.model_copy(update={"gradient_checkpointing": level})
        chosen = step.with_checkpointing(settings.recomputed)
        peak = peak_memory(chosen, load, machine).peak
        without = without or peak
        if machine.fits(peak):
            break
    if level == "off":
        return chosen, level, f"{peak / 1e9:,.2f} GB fit in {memory}"
    short = "" if machine.fits(peak) else ", still too much"
    return (
        chosen,
        level,
        f"without, {without / 1e9:,.2f} GB of {memory} would be allocated; with it, "
        f"{peak / 1e9:,.2f} GB{short}",
    )


def peak_memory(step: StepCost, load: Workload, machine: Machine) -> MemoryEstimate:
    """Return the peak memory of a run on a machine, in bytes."""
    return step.memory(load, machine.libraries, machine.heap)
