"""The loop: flat batches in, optimizer steps out; checks, checkpoints, early stop. The same for every method.

A `Loop` is one adapter's way through its data. `train_together` walks any number of them through one base: what is put
into one pass is up to their tasks, what each makes of its gradients is its own.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from afina.adapters.relora import merge_and_reset, restart_lr_factor
from afina.errors import TrainingError
from afina.io.atomic import translate_os_errors, write_text
from afina.objectives.multi_adapter import multi_adapter_losses
from afina.training import checkpoint
from afina.training.checkpoint import TrainerState
from afina.training.process_memory import process_peak_mb
from afina.training.setup.optimizer import AdapterOptimizer, schedule_factor
from afina.training.setup.processes import SINGLE_PROCESS, ProcessContext
from afina.training.setup.set_up import RunSetup

RISE_STEPS = 50  # after a restart, as in ReMoRA's paper


@dataclass(frozen=True)
class StepMetrics:
    """What one step has to tell: loss and held-out loss in nats a token, speed in tokens a second."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    eval_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # what else the objective has to tell


def peak_memory_mb() -> float:
    """The most memory that this process has held, in MB: on the GPU where there is one in use, else in RAM."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    return process_peak_mb()


class Trainer:
    """One adapter learns on one base. `on_tick` is told of every step, `on_best` of every new best check."""

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
        told = setup.settings
        self.optimizer = AdapterOptimizer(
            setup.adapter, setup.learning_rate, setup.rates, told.weight_decay, told.optimizer
        )
        self.progress = TrainerState()

    def resume(self) -> None:
        """Go back to the run's checkpoint; what was logged after it is forgotten."""
        self.progress = checkpoint.load(self.run, self.optimizer, self.identity)
        if not self.world.is_main_process:
            return
        log = self.run / "metrics.jsonl"
        lines = [line for line in log.read_text().splitlines() if line] if log.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.progress.step]
        write_text(log, "".join(line + "\n" for line in kept))

    def train(self) -> None:
        """Run to the last step, or to the early stop. Raises `TrainingError` where a number is no longer finite."""
        for error in train_in_one_pass([self]).values():
            raise error

    @property
    def ended(self) -> bool:
        """Whether there is no step left: the last one is done, or the held-out loss has not improved for long enough."""
        patience = self.setup.settings.early_stopping_patience
        return self.progress.step >= self.setup.steps or bool(
            patience and self.progress.num_bad_evals >= patience
        )

    def start_step(self) -> tuple[list[Any], int]:
        """The micro-batches of the next step, and how many labels they have in all; the adapter is set to learn."""
        task = self.setup.prepared.task
        self.world.seed(self.setup.settings.seed, self.progress.step)
        batches = task.step_batches(self.progress.step)
        self.setup.adapter.train(True)
        return batches, sum(task.num_targets(batch) for batch in batches)

    def finish_step(self, batches: Sequence[Any], loss: float, start: float) -> None:
        """Take the step that the gradients say; check, log and save where it is time. `start` is when it began.

        Raises `TrainingError` where the loss or a gradient is not finite; then nothing has changed.
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
        tick = self._check(tick) if check else tick
        tick = replace(tick, metrics=task.metrics(self.world.all_reduce))
        progress.seconds += time.perf_counter() - start
        self._log(tick)
        if check:
            self.save()
        self.on_tick(tick)

    def save(self) -> None:
        """Write the state from which the run can go on."""
        if self.world.is_main_process:
            checkpoint.save(self.run, self.optimizer, self.progress, self.identity)

    def _factor(self) -> float:
        """Factor of the learning rate at this step: the schedule's, rising again after each restart."""
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

    def _check(self, tick: StepMetrics) -> StepMetrics:
        """Evaluate on the eval rows; save the adapter if it is the best so far."""
        setup, progress = self.setup, self.progress
        setup.adapter.train(False)
        loss = self.world.broadcast(setup.prepared.task.eval_loss(setup.adapter.active))
        if not math.isfinite(loss):  # before anything is saved: what was kept stays good
            progress.step -= 1
            raise self.not_finite("eval loss")
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.num_bad_evals = loss, progress.step, 0
            if self.world.is_main_process:
                self.on_best(progress.step)
        else:
            progress.num_bad_evals += 1
        return replace(tick, eval_loss=loss)

    def _log(self, tick: StepMetrics) -> None:
        if not self.world.is_main_process:
            return
        told = {name: value for name, value in vars(tick).items() if name != "metrics"} | tick.metrics
        with translate_os_errors(self.run), (self.run / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(told) + "\n")

    def not_finite(self, what: str) -> TrainingError:
        """Say where the numbers broke: at which step, on which rows, and what to do."""
        step = self.progress.step
        rows = self.setup.prepared.task.row_locations(step)
        return TrainingError(
            f"the {what} is not finite at step {step + 1}",
            where=str(self.run),
            why=f"rows of this step: {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}",
            hint="start again with a lower --learning-rate, or --dtype float32; the best adapter so far is kept in adapter/",
        )


def train_in_one_pass(loops: Sequence[Trainer]) -> dict[Trainer, TrainingError]:
    """Walk each loop, all on one base, to its end; returns what stopped those that could not go on.

    One that breaks, breaks alone: a loss that is not finite leaves the pass before its gradients reach the others.
    """
    failed: dict[Trainer, TrainingError] = {}
    told = [every for loop in loops if (every := loop.setup.settings.recomputed)]
    with loops[0].setup.prepared.base.gradient_checkpointing(min(told, default=0)):
        while active := [loop for loop in loops if loop not in failed and not loop.ended]:
            failed |= _step(active)
    return failed


def _step(loops: Sequence[Trainer]) -> dict[Trainer, TrainingError]:
    """One step of each loop, their micro-batches side by side in as few passes as their tasks allow."""
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
        told = world.all_reduce(means.detach()).tolist()
        broken = [loop for loop, mean in zip(present, told, strict=True) if not math.isfinite(mean)]
        if (
            broken and len(loops) > 1
        ):  # again, without them: their numbers must not touch the others' gradients
            for loop in loops:
                loop.optimizer.zero_grad()
            rest = [loop for loop in loops if loop not in broken]
            return {loop: loop.not_finite("loss") for loop in broken} | (
                _step(rest) if rest else {}
            )
        means.sum().backward()
        for loop, mean in zip(present, told, strict=True):
            totals[loop] += mean
    failed: dict[Trainer, TrainingError] = {}
    for loop, (batches, _) in begun.items():
        try:
            loop.finish_step(batches, totals[loop], start)
        except TrainingError as error:
            failed[loop] = error
    return failed


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (
        ValueError,
        KeyError,
        TypeError,
    ):  # the line that was being written when the run was killed
        return 1 << 62


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The ticks of a run, in order."""
    log = run / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
