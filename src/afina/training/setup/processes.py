"""Several processes, one run: each takes its part of every batch, and gradients are added up over all.

    torchrun --nproc-per-node 2 -m afina train rows.jsonl

    batch of a step   | row 1 | row 2 | row 3 | row 4 | row 5 |      the same, however many processes there are
    process 0         | row 1 |       |       | row 4 | row 5 |      whole sequences, as many tokens as the others
    process 1         |       | row 2 | row 3 |       |       |
    gradient          (sum over process 0 + sum over process 1) / labels of the whole batch

So a run's losses are those of one process but for rounding, and it goes on with more or fewer processes than it began
with. Adapters and their optimizer are alike everywhere; the base is too, or is split (`--device sharded`). The first
process writes the run folder and speaks; the others read the folder when a run is resumed, and when it ends.
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
    """The processes of a run. This one is alone: it is the first, and its own sums are the sums."""

    rank, size = 0, 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def shard(self, batch: Any) -> Any:
        """This process's part of a batch."""
        return batch

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        return numbers

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each parameter the sum of its gradients in all processes; none where none has one."""

    def broadcast(self, number: float) -> float:
        """The first process's number."""
        return number

    def barrier(self) -> None:
        """Go on when all have come here."""

    def seed(self, seed: int, step: int) -> None:
        """Let each process draw its own dropout, the same again when the run is resumed; the first goes on as alone."""

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
        """Whether this process's error is the cause; others fail alike, or because of it."""
        return True


SINGLE_PROCESS = ProcessContext()


class TorchProcesses(ProcessContext):
    """Those that torchrun started together: gloo between CPUs, NCCL between GPUs."""

    def __init__(self) -> None:
        self._store, self.rank, self.size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        self._failed = False
        if cards := torch.cuda.device_count():
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local >= cards:
                what = f"process {local} of this machine has no GPU: there is {pluralize(cards, 'GPU')}"
                raise SettingsError(what, where="torchrun", hint=f"--nproc-per-node {cards}")
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl" if cards else "gloo"
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size)
        atexit.register(self._leave)

    def _leave(self) -> None:
        if not self._failed and dist.is_initialized():  # after a failure the others do not answer
            dist.destroy_process_group()

    def shard(self, batch: Any) -> Any:
        """See `World`."""
        return batch.shard(self.rank, self.size)

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """See `World`."""
        total = (
            numbers.detach().clone()
            if numbers.device.type in ("cpu", "cuda")
            else numbers.detach().cpu()
        )
        dist.all_reduce(total)
        return total.to(numbers.device)

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `World`; in one message, in float32."""
        parameters = list(parameters)
        there = torch.tensor(
            [float(p.grad is not None) for p in parameters], device=parameters[0].device
        )
        flat = [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().float()
            for p in parameters
        ]
        *sums, there = self.all_reduce(torch.cat([*flat, there])).split(
            [*(p.numel() for p in parameters), len(parameters)]
        )
        for parameter, total, count in zip(parameters, sums, there.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if count else None

    def broadcast(self, number: float) -> float:
        """See `World`."""
        told = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(told, 0)
        return told.item()

    def barrier(self) -> None:
        """See `World`; a barrier would be NCCL's where there are GPUs."""
        self.all_reduce(torch.zeros(1))

    def seed(self, seed: int, step: int) -> None:
        """See `World`."""
        if not self.is_main_process:
            torch.manual_seed(hash((seed, self.rank, step)) % (1 << 62))

    def first_to_fail(self) -> bool:
        """See `World`: who counts to one is the first."""
        self._failed = True
        return self._store.add("afina/failed", 1) == 1


@lru_cache
def world() -> ProcessContext:
    """The processes of this run, joined at the first call and left when Python ends; this one alone without torchrun."""
    started = all(
        name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    return TorchProcesses() if started and int(os.environ["WORLD_SIZE"]) > 1 else SINGLE_PROCESS
