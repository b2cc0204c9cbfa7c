"""Estimates of memory and time of a run, changes that make it fit, and a table of methods."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method, registered_methods
from afina.data.packing import BatchSampler
from afina.data.renderer import Example
from afina.errors import AfinaError, SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.dtype import machine_memory
from afina.models.loading import choose_device
from afina.planning.estimates import MachineRates, MemoryEstimate, Workload
from afina.planning.machine_rates import known_rates, measured_rates
from afina.planning.model_shape import ModelShape, count_parameters
from afina.planning.step_cost import StepCost
from afina.settings import PlanSettings, TrainSettings
from afina.training.setup.set_up import build_adapter_config

GPU_SIZES_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 288)  # GiB of GPUs on sale
CONTEXT = 1.0e9  # bytes of a GPU that CUDA's context, its libraries and holes between tensors take
SPARE = 0.95  # share of a machine's memory that one process may take
BESIDES = 110e6  # bytes that rows, logs, judging and the curve's picture take in a training process
LIBRARIES = 6e8  # bytes of a process with torch and transformers, where it has not been measured
SMALLEST = 64  # tokens of the smallest batch that is worth proposing
# of checkpointing: each takes less memory and more time than the one before
CHECKPOINTING_LEVELS: tuple[str | int, ...] = ("off", 4, 3, 2, "all")


@dataclass(frozen=True)
class Machine:
    """Device of a run: its kind, memory in bytes (None: absent) and rates (None: not measured)."""

    device: str
    memory: float | None
    rates: MachineRates | None

    @property
    def libraries(self) -> float:
        """Bytes that are taken before a model is loaded."""
        if self.device == "cuda":
            return 0.0
        return BESIDES + (self.rates.libraries if self.rates else LIBRARIES)

    @property
    def heap(self) -> float:
        """What activations take over what is counted, as the probe found it."""
        return self.rates.allocator_overhead if self.rates else 1.0


def detect_machine(settings: TrainSettings, anew: bool = False, measure: bool = True) -> Machine:
    """Return the device of the settings; an absent GPU has no memory and no rates.

    Without `measure` nothing is measured: rates are those of an earlier plan, if there was one.
    """
    device = choose_device("auto").type if settings.device == "auto" else settings.device
    if device == "cuda" and not torch.cuda.is_available():
        return Machine(device, None, None)
    rates = (
        (measured_rates(device, anew) if measure else known_rates(device))
        if device in ("cpu", "cuda")
        else None
    )
    if device == "cuda":
        return Machine(device, torch.cuda.get_device_properties(0).total_memory, rates)
    memory, processes = (
        machine_memory(),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )  # those of torchrun on this machine
    return Machine(device, memory and memory / processes, rates)


def load_of(train: Sequence[Example], settings: TrainSettings) -> Workload:
    """The passes of a run over `train`, as they will be packed in its first epoch."""
    sampler = BatchSampler(
        list(train),
        settings.max_tokens_per_batch,
        settings.gradient_accumulation_steps,
        settings.seed,
    )
    steps = [sampler.step_examples(step) for step in range(sampler.steps_per_epoch)]
    passes = [examples for step in steps for examples in step]
    tokens = [sum(len(e.token_ids) for e in examples) for examples in passes]
    labels = [sum(map(sum, (e.loss_mask for e in examples))) for examples in passes]
    lengths = [len(e.token_ids) for examples in passes for e in examples]
    return Workload(
        max(tokens),
        max(labels),
        max(lengths),
        sum(tokens) / len(tokens),
        sum(labels) / len(labels),
        sum(n * n for n in lengths) / sum(lengths),
        round(len(passes) / len(steps)),
    )


def full_load(shape: ModelShape, settings: PlanSettings) -> Workload:
    """Passes as full as the settings allow, where there are no rows to look at."""
    return Workload.full(
        settings.max_tokens_per_batch,
        settings.max_length or min(shape.max_positions, 2048),
        settings.gradient_accumulation_steps,
    )


def make_step(
    shape: ModelShape, settings: PlanSettings, place: Machine, spec: AdapterConfig | None = None
) -> StepCost:
    """A training step as the settings mean it; `spec` is the adapter where it is known already."""
    meant = get_preset(settings.method, shape.num_layers)
    quantization = "nf4" if shape.quantised else meant.quantization
    if quantization == "nf4" and get_method(meant.method).replaces_base:
        raise SettingsError(
            "codes have no gradient",
            where="method",
            why="this base is in 4 bits",
            hint="--method lora",
        )
    tokens = {name: number for number, name in enumerate(settings.new_tokens)}
    spec = spec or build_adapter_config(shape.model, settings, tokens=tokens)
    return StepCost(
        shape,
        count_parameters(shape, spec),
        settings,
        quantization,
        place.device,
        settings.recomputed,
    )


def peak_memory(step: StepCost, load: Workload, place: Machine) -> MemoryEstimate:
    """What a run holds at its largest moment, there."""
    return step.memory(load, place.libraries, place.heap)


def choose_checkpointing(
    step: StepCost, load: Workload, place: Machine, besides: float = 0.0
) -> tuple[StepCost, str | int, str | None]:
    """Return the step at its checkpointing level, the level, and the reason of an automatic one.

    `besides` are bytes of other adapters in the same passes.
    """
    told = step.settings.gradient_checkpointing
    if told != "auto":
        return step, told, None
    if not step.shape.model.supports_gradient_checkpointing:
        return step, "off", "this family's blocks cannot make their activations again"
    if place.memory is None:
        return step, "off", "there is no such device here, so that its memory is not known"
    room, first = f"{place.memory / 1e9:,.1f} GB", 0.0
    for value in CHECKPOINTING_LEVELS:
        turned = step.with_checkpointing(
            step.settings.model_copy(update={"gradient_checkpointing": value}).recomputed
        )
        peak = peak_memory(turned, load, place).peak + besides
        first = first or peak
        if fits(peak, place):
            break
    if value == "off":
        return turned, value, f"{peak / 1e9:,.2f} GB fit in {room}"
    short = "" if fits(peak, place) else ", still too much"
    return (
        turned,
        value,
        f"without, {first / 1e9:,.2f} GB of {room} would be taken; so {peak / 1e9:,.2f} GB{short}",
    )


def estimate_run(
    step: StepCost, load: Workload, place: Machine, steps: int | None, held_tokens: int
) -> dict[str, Any]:
    """Memory and time of a run of `steps` optimizer steps; what is not known is None."""
    step, dial, why = choose_checkpointing(step, load, place)
    memory = peak_memory(step, load, place)
    seconds = step.time(load, place.rates) if place.rates else None
    shown = None
    if seconds is not None and steps is not None:
        checks = (
            steps // (step.settings.eval_steps or max(1, steps // 10)) + 3
        )  # and before, and twice at the end
        forwards = checks * held_tokens / (load.mean_tokens * load.num_micro_batches) / 3
        shown = seconds.step * (steps + forwards)
    return {
        "peak_bytes": round(memory.peak),
        "memory": {name: round(value) for name, value in asdict(memory).items()},
        "step_seconds": seconds.step if seconds else None,
        "time": {n: v for n, v in asdict(seconds).items() if n != "overlaps"} if seconds else None,
        "run_seconds": shown,
        "fits": fits(memory.peak, place),
        "checkpointing": {"used": dial, "why": why},
        "card_gib": smallest_gpu(memory.peak) if place.device == "cuda" else None,
        "card_gib_all": smallest_gpu(peak_memory(step.with_checkpointing(1), load, place).peak)
        if place.device == "cuda"
        else None,
        "trainable_parameters": step.count.trainable,
        "file_bytes": step.count.file_bytes,
    }


def fits(peak: float, place: Machine) -> bool | None:
    """Whether a peak fits in the place's memory; None where the device is not here."""
    if place.memory is None:
        return None
    return peak + (CONTEXT if place.device == "cuda" else 0.0) <= SPARE * place.memory


def smallest_gpu(peak: float) -> int | None:
    """GiB of the smallest GPU on which a peak fits; None where it fits on none."""
    return next((size for size in GPU_SIZES_GIB if peak + CONTEXT <= SPARE * size * 2**30), None)


def largest_batch(step: StepCost, load: Workload, place: Machine) -> int | None:
    """Return the most tokens per micro-batch that fit: 0 for none, None for unknown memory."""
    if place.memory is None:
        return None
    low, high = 0, SMALLEST
    while high <= 1 << 24 and fits(peak_memory(step, load.at(high), place).peak, place):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (
            (middle, high)
            if fits(peak_memory(step, load.at(middle), place).peak, place)
            else (low, middle)
        )
    return low if low >= SMALLEST else 0


def remedies(
    shape: ModelShape, settings: PlanSettings, place: Machine, load: Workload, besides: float = 0.0
) -> list[dict[str, Any]]:
    """Return changes that make a run fit, the mildest first.

    Tried are checkpointing, smaller micro-batches, a base in 4 bits, and combinations of them;
    `besides` are bytes that no change reduces.
    """
    if place.memory is None:
        return []
    found: list[dict[str, Any]] = []
    delta = get_preset(settings.method, shape.num_layers).method
    four_bits = {"method": "qlora" if get_method(delta).replaces_base else f"q{settings.method}"}
    changes: list[dict[str, Any]] = (
        [{}]
        if settings.gradient_checkpointing in ("all", "auto")
        else [{}, {"gradient_checkpointing": "all"}]
    )
    if not settings.method.startswith("q"):
        changes += [{**change, **four_bits} for change in changes]
    for change in changes:
        changed = settings.model_copy(update=change)
        step = replace(make_step(shape, changed, place), besides=besides)
        batch = largest_batch(
            step.with_checkpointing(1) if settings.gradient_checkpointing == "auto" else step,
            load,
            place,
        )
        if not batch:
            continue
        smaller = load.at(min(batch, load.tokens))
        if smaller.tokens < load.tokens:
            change = {**change, "max_tokens_per_batch": int(smaller.tokens * load.attention_ratio)}
        step = choose_checkpointing(step, smaller, place)[0]
        peak = peak_memory(step, smaller, place).peak
        found.append(
            {
                "settings": change,
                "peak_bytes": round(peak),
                "step_seconds": step.time(smaller, place.rates).step if place.rates else None,
            }
        )
    return found


def compare(
    shape: ModelShape,
    settings: PlanSettings,
    place: Machine,
    load: Workload,
    steps: int | None,
    held: int,
) -> list[dict[str, Any]]:
    """A line for each method, plain and on 4 bits; `why` says why one cannot be."""
    names = [
        m
        for name, kind in registered_methods().items()
        for m in ([name, "freeze"] if kind.replaces_base else [name, f"q{name}"])
    ]
    lines: list[dict[str, Any]] = []
    for name in names:
        changed = settings.model_copy(update={"method": name})
        try:
            lines.append(
                {"method": name}
                | estimate_run(make_step(shape, changed, place), load, place, steps, held)
            )
        except AfinaError as error:
            lines.append({"method": name, "why": error.what})
    return sorted(lines, key=lambda line: line.get("peak_bytes", float("inf")))
