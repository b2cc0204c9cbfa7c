"""Cost of a run whose passes are tried and not counted: encoders and models of pictures.

Their layers come in too many shapes for a formula. Two small micro-batches of the run's own rows go
forward and backward; what was allocated at the peak, and the seconds, make a line over the tokens
computed, and the run's largest micro-batch lies on it.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afina.objectives.workload import StepWorkload
from afina.planning.estimate import MIN_BATCH_TOKENS, NUM_OTHER_EVALS
from afina.planning.estimates import MemoryEstimate, Workload
from afina.planning.machine import MAX_MEMORY_RATIO, Machine, smallest_gpu
from afina.training.setup.set_up import RunSetup

Memory = Callable[[int], MemoryEstimate]  # of the tokens of the largest micro-batch

TRIAL_TOKENS = (128, 512)  # about, of the two passes; a longer row is a pass of its own
NUM_TIMED = 3  # repeats of each pass, of which the fastest counts
# Gaps of a CPU's heap over what was counted. All-MiniLM-L6-v2, 4 steps on 2 cores: without it the
# plan was 5% over the measured peak at 1,024 tokens, and 5% under it at 4,096.
HEAP_SLACK = 0.2
FORWARD_RATIO = 1 / 3  # seconds of a pass without gradients over those of one with them


@dataclass(frozen=True)
class Line:
    """A figure as a constant and a rate per token."""

    constant: float
    per_token: float

    @classmethod
    def through(cls, points: list[tuple[int, float]]) -> "Line":
        """Return the line through the first and the last point; through 0 where they are one."""
        (few, low), (many, high) = points[0], points[-1]
        rate = (high - low) / (many - few) if many > few else 0.0
        if rate <= 0:
            return cls(0.0, high / many)
        return cls(max(0.0, low - rate * few), rate)

    def at(self, tokens: float) -> float:
        """Return the figure at a number of tokens."""
        return self.constant + self.per_token * tokens


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate within `with`, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in self._seen and id(storage) not in given:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def remove() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, remove)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def trial_cost(setup: RunSetup, workload: StepWorkload, machine: Machine) -> dict[str, Any]:
    """Return memory and time of a run, and what fits on the machine, as `afina plan` shows them."""
    load, (memory, seconds) = Workload.of(workload), _try_passes(setup, machine)
    estimate, largest = memory(load.tokens), _largest_batch(memory, machine)
    fits, step_seconds = machine.fits(estimate.peak), seconds.at(load.mean_tokens)
    step_seconds *= load.num_micro_batches
    trainable = setup.adapter.num_parameters()
    return {
        "peak_bytes": round(estimate.peak),
        "memory": {name: round(value) for name, value in asdict(estimate).items()},
        "step_seconds": step_seconds,
        "time": None,
        "phases": {"learning": step_seconds},
        "not_counted": [],
        "run_seconds": _run_seconds(setup, workload, step_seconds, seconds),
        "fits": fits,
        "checkpointing": {"used": setup.settings.gradient_checkpointing, "why": None},
        "card_gib": smallest_gpu(estimate.peak) if machine.device == "cuda" else None,
        "card_gib_all": None,
        "trainable_parameters": trainable,
        "file_bytes": 4 * trainable,
        "device": machine.device,
        "machine_bytes": machine.memory,
        "batch": {
            "tokens": load.tokens,
            "labels": load.labels,
            "longest": load.max_length,
            "passes": load.num_micro_batches,
        },
        "exact": True,
        "largest_batch_tokens": largest,
        "largest_batch_tokens_all": None,
        "remedies": [_remedy(largest, memory, seconds)] if largest and fits is False else [],
        "target_unit": setup.prepared.task.units.unit,
    }


def _remedy(tokens: int, memory: Memory, seconds: Line) -> dict[str, Any]:
    return {
        "settings": {"max_tokens_per_batch": tokens},
        "peak_bytes": round(memory(tokens).peak),
        "step_seconds": seconds.at(tokens),
    }


def _memory(setup: RunSetup, machine: Machine, line: Line) -> Memory:
    """Return the memory of a run as a function of its largest micro-batch's tokens."""
    trainable = setup.adapter.num_parameters()
    parameters = list(setup.prepared.base.model.parameters())
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad)
    slack = machine.heap * (1.0 + HEAP_SLACK) if machine.device == "cpu" else 1.0
    moments = 8.0 if setup.settings.optimizer == "adamw" else 2.04
    # gradients, two temporaries of the optimizer, and the best adapter at the end
    other = slack * line.constant + 16.0 * trainable

    def memory(tokens: int) -> MemoryEstimate:
        return MemoryEstimate(
            libraries=machine.libraries,
            weights=float(frozen),
            learned=4.0 * trainable,
            optimizer=moments * trainable,
            activations=slack * line.per_token * tokens,
            other=other,
        )

    return memory


def _try_passes(setup: RunSetup, machine: Machine) -> tuple[Memory, Line]:
    """Return a run's memory, and the seconds of a pass, over the tokens computed in a pass."""
    task: Any = setup.prepared.task
    rows = task.rows_of_step(0)
    bytes_points, time_points = [], []
    setup.adapter.train(True)
    for wanted in TRIAL_TOKENS:
        some = rows[:1]
        for row in rows[1:]:
            if task.num_computed([*some, row]) > wanted:
                break
            some.append(row)
        tokens, batch = task.num_computed(some), task.collate(some, 0)

        def run() -> None:
            task.loss(batch, setup.adapter.active).backward()  # noqa: B023 (runs within the loop)
            for parameter in setup.adapter.parameters():
                parameter.grad = None

        run()  # allocates what later passes find: tables of positions, buffers of kernels
        with _LiveBytes() as counted:
            run()
        bytes_points.append((tokens, float(counted.peak)))
        time_points.append((tokens, min(_seconds(run) for _ in range(NUM_TIMED))))
    setup.adapter.train(False)
    return _memory(setup, machine, Line.through(bytes_points)), Line.through(time_points)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _largest_batch(memory: Memory, machine: Machine) -> int | None:
    """Return the most tokens of a micro-batch that fit: 0 for none, None for unknown memory."""
    if machine.memory is None:
        return None
    free = MAX_MEMORY_RATIO * machine.memory - memory(0).peak
    tokens = int(free / memory(1).activations)
    return tokens if tokens >= MIN_BATCH_TOKENS else 0


def _run_seconds(
    setup: RunSetup, workload: StepWorkload, step_seconds: float, seconds: Line
) -> float:
    """Return the seconds of all steps and evaluations."""
    evals = setup.steps // setup.check_every + NUM_OTHER_EVALS
    return (
        setup.steps * step_seconds
        + evals * workload.eval_tokens * seconds.per_token * FORWARD_RATIO
    )
