"""Several processes of one run: each computes a part of every batch, and gradients are summed.

    torchrun --nproc-per-node 2 -m afina train rows.jsonl

    batch of a step   | row 1 | row 2 | row 3 | row 4 | row 5 |   for any number of processes
    process 0         | row 1 |       |       | row 4 | row 5 |   sequences, balanced by tokens
    process 1         |       | row 2 | row 3 |       |       |
    gradient          (sum over process 0 + sum over process 1) / targets of the entire batch

So a run's losses are those of one process up to rounding, and it resumes with any number of
processes. Adapters and optimizer states are replicated; the base is replicated or sharded
(`--fsdp`). The main process writes the run folder and prints; the others read the folder when a run
is resumed and when it ends.
"""

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from afina.errors import SettingsError, pluralize


class ProcessContext:
    """The processes of a run; this class is for a single one, where nothing is communicated."""

    rank, size = 0, 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def shard(self, batch: Any) -> Any:
        """Return this process's part of a batch."""
        return batch

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return numbers

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set each gradient to its sum over all processes; None where no process has one."""

    def broadcast(self, number: float) -> float:
        """Return the main process's number."""
        return number

    def barrier(self) -> None:
        """Wait until all processes have called this."""

    def seed(self, seed: int, step: int) -> None:
        """Seed dropout by process and step; the main process is not reseeded."""

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on the main process, then on the others; return when all have run it.

        The others find the caches and folders that the main process wrote. The barrier at the end
        keeps the main process from replacing a checkpoint that another one still reads.
        """
        if not self.is_main_process:
            self.barrier()
        yield
        if self.is_main_process:
            self.barrier()
        self.barrier()

    def first_to_fail(self) -> bool:
        """Return whether this process failed first; others fail alike, or because of it."""
        return True


SINGLE_PROCESS = ProcessContext()


class TorchProcesses(ProcessContext):
    """Processes that torchrun started: gloo between CPUs, NCCL between GPUs."""

    def __init__(self) -> None:
        meeting = dist.rendezvous("env://")  # type: ignore[attr-defined]
        self._store, self.rank, self.size = next(meeting)
        self._failed = False
        if cards := torch.cuda.device_count():
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local >= cards:
                what = f"process {local} of this machine has no GPU"
                why = f"there is {pluralize(cards, 'GPU')}"
                hint = f"--nproc-per-node {cards}"
                raise SettingsError(what, where="torchrun", why=why, hint=hint)
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl" if cards else "gloo"
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size)
        atexit.register(self._leave)

    def _leave(self) -> None:
        if not self._failed and dist.is_initialized():  # after a failure the others do not answer
            dist.destroy_process_group()

    def shard(self, batch: Any) -> Any:
        """Return this process's part of a batch."""
        return batch.shard(self.rank, self.size)

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """Return the sum over all processes."""
        is_supported = numbers.device.type in ("cpu", "cuda")
        total = numbers.detach().clone() if is_supported else numbers.detach().cpu()
        dist.all_reduce(total)
        return total.to(numbers.device)

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum all gradients in one message, in float32."""
        parameters = list(parameters)
        has_gradient = torch.tensor([float(p.grad is not None) for p in parameters])
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        flat = [gradient.flatten().float() for gradient in gradients]
        message = torch.cat([*flat, has_gradient.to(parameters[0].device)])
        sizes = [*(p.numel() for p in parameters), len(parameters)]
        *sums, counts = self.all_reduce(message).split(sizes)
        for parameter, total, count in zip(parameters, sums, counts.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if count else None

    def broadcast(self, number: float) -> float:
        """Return the main process's number."""
        value = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(value, 0)
        return value.item()

    def barrier(self) -> None:
        """Wait for all processes by gloo: torch's barrier would use NCCL where there are GPUs."""
        self.all_reduce(torch.zeros(1))

    def seed(self, seed: int, step: int) -> None:
        """Seed dropout by process and step."""
        if not self.is_main_process:
            torch.manual_seed(hash((seed, self.rank, step)) % (1 << 62))

    def first_to_fail(self) -> bool:
        """Return whether this process failed first: whether it increments the counter to one."""
        self._failed = True
        return self._store.add("afina/failed", 1) == 1


@lru_cache
def world() -> ProcessContext:
    """Return the processes of this run, connected at the first call; one without torchrun."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    is_started = all(name in os.environ for name in names)
    return TorchProcesses() if is_started and int(os.environ["WORLD_SIZE"]) > 1 else SINGLE_PROCESS
