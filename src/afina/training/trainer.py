"""Training loop: packed batches, optimizer steps, evaluations, checkpoints, early stopping.

A `Trainer` trains one adapter. `train_in_one_pass` trains several on one base: their objectives
decide what shares a forward pass; gradients, optimizer and checkpoints are separate.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from afina.adapters.relora import merge_and_reset, restart_lr_factor
from afina.errors import TrainingError
from afina.io.jsonl import append_jsonl, read_jsonl, write_jsonl
from afina.io.migrations import migrate_metrics
from afina.objectives.multi_adapter import multi_adapter_losses
from afina.training import checkpoint
from afina.training.checkpoint import TrainerState
from afina.training.process_memory import process_peak_mb
from afina.training.setup.optimizer import AdapterOptimizer, schedule_factor
from afina.training.setup.processes import SINGLE_PROCESS, ProcessContext
from afina.training.setup.set_up import RunSetup
from afina.training.termination import EXIT_STATUS, termination

RISE_STEPS = 50  # warmup steps after a restart, as in ReMoRA's paper


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one optimizer step: loss and eval loss in nats per token, duration in seconds."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    eval_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the objective


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MB: of the GPU if one is in use, else of RAM."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    return process_peak_mb()


class Trainer:
    """Trainer of one adapter on one base.

    Args:
        run: the run folder.
        identity: what must be unchanged when the run is resumed.
        on_tick: called with the metrics of each step.
        on_best: called with the step of each evaluation that is the best so far.
    """

    def __init__(
        self,
        setup: RunSetup,
        run: Path,
        identity: dict[str, Any],
        on_tick: Callable[[StepMetrics], None],
        on_best: Callable[[int], None],
        world: ProcessContext = SINGLE_PROCESS,
    ) -> None:
        self.setup, self.run, self.identity, self.world = setup, run, identity, world
        self.on_tick, self.on_best = on_tick, on_best
        self.optimizer = AdapterOptimizer(
            setup.adapter,
            setup.learning_rate,
            setup.rates,
            setup.settings.weight_decay,
            setup.settings.optimizer,
        )
        self.progress = TrainerState()
        self.trackers: list[Any] = []  # of `afina.training.trackers`

    def resume(self) -> None:
        """Load the run's checkpoint, and remove the metrics of later steps from metrics.jsonl."""
        self.progress = checkpoint.load(self.run, self.optimizer, self.identity)
        if not self.world.is_main_process:
            return
        last = self.progress.step
        done = [line for line in read_metrics(self.run) if line.get("step", math.inf) <= last]
        write_jsonl(self.run / "metrics.jsonl", done)

    def train(self) -> None:
        """Train to the last step or until early stopping.

        Raises:
            TrainingError: the loss or a gradient is not finite.
        """
        for error in train_in_one_pass([self]).values():
            raise error

    @property
    def ended(self) -> bool:
        """Whether the last step is done, or early stopping has ended the run."""
        patience = self.setup.settings.early_stopping_patience
        return self.progress.step >= self.setup.steps or bool(
            patience and self.progress.num_bad_evals >= patience
        )

    def start_step(self) -> tuple[list[Any], int]:
        """Return the micro-batches of the next step and their number of targets."""
        task = self.setup.prepared.task
        self.world.seed(self.setup.settings.seed, self.progress.step)
        batches = task.step_batches(self.progress.step)
        self.setup.adapter.train(True)
        return batches, sum(task.num_targets(batch) for batch in batches)

    def finish_step(self, batches: Sequence[Any], loss: float, start: float) -> None:
        """Update the adapter with the accumulated gradients; evaluate, log and save when due.

        Args:
            loss: the mean loss of the step.
            start: `time.perf_counter()` at the beginning of the step.

        Raises:
            TrainingError: the loss or a gradient is not finite; the adapter is unchanged.
        """
        setup, progress, task = self.setup, self.progress, self.setup.prepared.task
        self.world.all_reduce_gradients(self.optimizer.parameters.values())
        norm = self.optimizer.step(factor := self._factor(), setup.settings.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self.not_finite("loss" if not math.isfinite(loss) else "gradient")
        tokens = sum(task.num_tokens(batch) for batch in batches)
        progress.step += 1
        progress.tokens += tokens
        if (
            setup.restart_every
            and progress.step % setup.restart_every == 0
            and progress.step < setup.steps
        ):
            generator = torch.Generator().manual_seed(setup.settings.seed + progress.step)
            merge_and_reset(setup.adapter, generator, self.optimizer.adamw)
        tick = StepMetrics(
            progress.step,
            loss,
            norm,
            factor * setup.learning_rate,
            tokens,
            time.perf_counter() - start,
        )
        check = tick.step % setup.check_every == 0 or tick.step == setup.steps
        tick = replace(tick, eval_loss=self.evaluate()) if check else tick
        tick = replace(tick, metrics=task.metrics(self.world.all_reduce))
        progress.seconds += time.perf_counter() - start
        self._log(tick)
        if check:
            self.save()
        self.on_tick(tick)

    def save(self) -> None:
        """Write the checkpoint from which the run can be resumed."""
        if self.world.is_main_process:
            checkpoint.save(self.run, self.optimizer, self.progress, self.identity)

    def save_between_checks(self) -> None:
        """Write a checkpoint after a step without evaluation, where the objective has a state."""
        if self.progress.step % self.setup.prepared.task.steps_per_rollout == 0:
            self.save()

    def _factor(self) -> float:
        """Return the learning rate factor of this step, with a warmup after each restart."""
        setup, step = self.setup, self.progress.step
        factor = schedule_factor(
            setup.settings.lr_scheduler_type, step, setup.steps, setup.settings.warmup_ratio
        )
        every = setup.restart_every
        return (
            factor * restart_lr_factor(step, every, min(RISE_STEPS, every // 4))
            if every
            else factor
        )

    def evaluate(self) -> float:
        """Return the loss on the eval rows; save the adapter if it is the best so far."""
        adapter = self.setup.adapter
        adapter.train(False)
        return self.keep_best(self.setup.prepared.task.eval_loss(adapter.active))

    def keep_best(self, eval_loss: float) -> float:
        """Return the loss of the main process; save the adapter if it is the best so far."""
        progress, loss = self.progress, self.world.broadcast(eval_loss)
        if not math.isfinite(loss):  # before saving: the best adapter so far is kept
            raise self.not_finite("eval loss", progress.step - 1)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.num_bad_evals = loss, progress.step, 0
            if self.world.is_main_process:
                self.on_best(progress.step)
        else:
            progress.num_bad_evals += 1
        return loss

    def _log(self, tick: StepMetrics) -> None:
        if not self.world.is_main_process:
            return
        record = {name: value for name, value in vars(tick).items() if name != "metrics"}
        record |= tick.metrics
        append_jsonl(self.run / "metrics.jsonl", record, sync=False)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for tracker in self.trackers:
            tracker.log(numbers, tick.step)

    def not_finite(self, what: str, step: int | None = None) -> TrainingError:
        """Return the error for `what` that is not finite: step, rows and hint.

        Args:
            what: Name of the number.
            step: Steps done before the one it belongs to, by default all; -1 before the first.
        """
        step = self.progress.step if step is None else step
        rows = self.setup.prepared.task.row_locations(step) if step >= 0 else []
        some = f"rows of this step: {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}"
        return TrainingError(
            f"the {what} is not finite at step {step + 1}",
            where=str(self.run),
            why=some if rows else None,
            hint="start again with a lower --learning-rate, or --dtype float32; "
            "the best adapter so far is kept in adapter/",
        )


def train_in_one_pass(loops: Sequence[Trainer]) -> dict[Trainer, TrainingError]:
    """Train several adapters on one base to their ends; return the errors of those that failed.

    A run whose loss is not finite is removed from the pass before its gradients reach other runs.
    """
    failed: dict[Trainer, TrainingError] = {}
    intervals = [loop.setup.settings.recomputed for loop in loops if loop.setup.settings.recomputed]
    base = loops[0].setup.prepared.base
    with base.gradient_checkpointing(min(intervals, default=0)), termination.between_steps():
        active = [loop for loop in loops if not loop.ended]
        while active:
            failed |= _step(active)
            active = [loop for loop in active if loop not in failed and not loop.ended]
            # after an error here the other processes do not answer; the last step has been saved
            if active and _is_terminated(active[0].world):
                for loop in active:
                    loop.save_between_checks()
                raise SystemExit(EXIT_STATUS)
    return failed


def _is_terminated(world: ProcessContext) -> bool:
    """Return whether any process has to end: all leave after the same step."""
    return bool(world.all_reduce(torch.tensor(float(termination.is_requested))) > 0)


def _step(loops: Sequence[Trainer]) -> dict[Trainer, TrainingError]:
    """Take one step of each run, with their micro-batches in as few passes as possible."""
    start, world = time.perf_counter(), loops[0].world
    begun = {loop: loop.start_step() for loop in loops}
    totals = dict.fromkeys(loops, 0.0)
    for number in range(max(len(batches) for batches, _ in begun.values())):
        present = [loop for loop, (batches, _) in begun.items() if number < len(batches)]
        setups = [loop.setup for loop in present]
        shares = [world.shard(begun[loop][0][number]) for loop in present]
        parts = [
            (own.prepared.task, share, own.adapter.active)
            for own, share in zip(setups, shares, strict=True)
        ]
        means = torch.stack(
            [
                loss / begun[loop][1]
                for loop, loss in zip(present, multi_adapter_losses(parts), strict=True)
            ]
        )
        losses = world.all_reduce(means.detach()).tolist()
        broken = [
            loop for loop, mean in zip(present, losses, strict=True) if not math.isfinite(mean)
        ]
        if broken and len(loops) > 1:
            # repeat the step without them: non-finite values must not reach other gradients
            for loop in loops:
                loop.optimizer.zero_grad()
            rest = [loop for loop in loops if loop not in broken]
            return {loop: loop.not_finite("loss") for loop in broken} | (
                _step(rest) if rest else {}
            )
        means.sum().backward()
        for loop, mean in zip(present, losses, strict=True):
            totals[loop] += mean
    failed: dict[Trainer, TrainingError] = {}
    for loop, (batches, _) in begun.items():
        try:
            loop.finish_step(batches, totals[loop], start)
        except TrainingError as error:
            failed[loop] = error
    return failed


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step of a run, from metrics.jsonl."""
    lines = read_jsonl(run / "metrics.jsonl")
    return [migrate_metrics(one) if "held_out_loss" in one else one for one in lines]
