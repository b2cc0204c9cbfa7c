"""The machine of a run: its device, how much memory it has, and what fits in it."""

import os
from dataclasses import dataclass

import torch

from afina.models.dtype import machine_memory
from afina.models.loading import choose_device
from afina.planning.estimates import MachineRates
from afina.planning.machine_rates import known_rates, measured_rates
from afina.settings import TrainSettings

GPU_SIZES_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 288)  # of GPUs on sale
# Bytes of a GPU that CUDA's context, its libraries and gaps between tensors take.
CUDA_CONTEXT_BYTES = 1.0e9
MAX_MEMORY_RATIO = 0.95  # of a machine's memory that one process may take
# Bytes that rows, logs, evaluation and the plot take in a training process on a CPU.
PROCESS_BYTES = 110e6
# Bytes of a process with torch and transformers, where the machine has not been measured.
LIBRARY_BYTES = 6e8


@dataclass(frozen=True)
class Machine:
    """Device of a run: its kind, memory in bytes (None: absent) and rates (None: not measured)."""

    device: str
    memory: float | None
    rates: MachineRates | None

    @property
    def libraries(self) -> float:
        """Bytes that are allocated before a model is loaded."""
        if self.device == "cuda":
            return 0.0
        return PROCESS_BYTES + (self.rates.libraries if self.rates else LIBRARY_BYTES)

    @property
    def heap(self) -> float:
        """Allocated over counted bytes of activations, as measured; 1 where not measured."""
        return self.rates.allocator_overhead if self.rates else 1.0

    def fits(self, peak: float) -> bool | None:
        """Return whether `peak` bytes fit in the memory; None where the device is absent."""
        if self.memory is None:
            return None
        context = CUDA_CONTEXT_BYTES if self.device == "cuda" else 0.0
        return peak + context <= MAX_MEMORY_RATIO * self.memory


def detect_machine(settings: TrainSettings, anew: bool = False, measure: bool = True) -> Machine:
    """Return the device of the settings; an absent GPU has no memory and no rates.

    Without `measure` nothing is measured: rates are those of an earlier plan, if there was one.
    """
    device = choose_device("auto").type if settings.device == "auto" else settings.device
    if device == "cuda" and not torch.cuda.is_available():
        return Machine(device, None, None)
    rates = None
    if device in ("cpu", "cuda"):
        rates = measured_rates(device, anew) if measure else known_rates(device)
    if device == "cuda":
        return Machine(device, torch.cuda.get_device_properties(0).total_memory, rates)
    memory, processes = machine_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Machine(device, memory and memory / processes, rates)  # torchrun's processes share it


def smallest_gpu(peak: float) -> int | None:
    """Return the GiB of the smallest GPU on which `peak` bytes fit; None where they fit on none."""
    takes = peak + CUDA_CONTEXT_BYTES
    fitting = (size for size in GPU_SIZES_GIB if takes <= MAX_MEMORY_RATIO * size * 2**30)
    return next(fitting, None)
