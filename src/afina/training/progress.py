"""Progress of a run on standard error: loss, speed, remaining time, memory."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from afina.io.translation import translate
from afina.training.results import data_notes
from afina.training.setup.set_up import RunSetup
from afina.training.trainer import StepMetrics, peak_memory_mb

LINE_SECONDS = 5.0  # between two lines where standard error is not a terminal


class NullProgress:
    """Prints nothing: for Python callers and tests."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def tick(self, tick: StepMetrics, run: int = 0) -> None:
        """Record a step of run `run`; runs are counted in the order given."""


class ProgressDisplay(NullProgress):
    """A progress bar per run in a terminal; elsewhere a line every few seconds."""

    def __init__(self, setups: Sequence[RunSetup]) -> None:
        self._console = Console(stderr=True)
        self._steps = [setup.steps for setup in setups]
        self._piece = setups[0].prepared.units.piece
        outputs = [setup.settings.output_dir for setup in setups]
        names = [
            translate("training") if len(setups) == 1 or out is None else out.name
            for out in outputs
        ]
        self._labels = [""] if len(setups) == 1 else [f"{name}  " for name in names]
        self._num_eval_rows = sum(len(setup.prepared.task.eval_rows) for setup in setups)
        self._notes = [
            f"{label}{note}"
            for setup, label in zip(setups, self._labels, strict=True)
            for note in data_notes(setup.prepared.data_info)
        ]
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.fields[label]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn(translate("left")),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks = [
            self._bar.add_task("", total=n, label=name)
            for n, name in zip(self._steps, names, strict=True)
        ]

    def __enter__(self) -> Self:
        for note in self._notes:
            self._print(note)
        if not self._console.is_terminal:
            steps = " and ".join(f"{steps:,}" for steps in self._steps)
            rows = f"{self._num_eval_rows:,} eval rows before the first step"
            self._print(f"training {steps} optimizer steps; evaluating {rows}")
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def tick(self, tick: StepMetrics, run: int = 0) -> None:
        """Advance the bar; print a line at an evaluation, and elsewhere every few seconds."""
        speed = tick.tokens / tick.seconds
        text = (
            f"loss {tick.loss:.3f}  {speed:,.0f} {self._piece}s/s  peak {peak_memory_mb():,.0f} MB"
        )
        self._bar.update(self._tasks[run], completed=tick.step, description=translate(text))
        if "rewards/accuracies" in tick.metrics:
            text += f"  preferred {100 * tick.metrics['rewards/accuracies']:.0f}%"
        if "reward" in tick.metrics:
            text += f"  reward {tick.metrics['reward']:.3f}"
        line = f"{self._labels[run]}step {tick.step}/{self._steps[run]}  {text}"
        if tick.eval_loss is not None:
            reward = tick.metrics.get("eval_reward")
            name, value = ("loss", tick.eval_loss) if reward is None else ("reward", reward)
            self._print(f"{line}  eval {name} {value:.3f}")
        elif not self._console.is_terminal and time.monotonic() - self._last_line > LINE_SECONDS:
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(translate(line), highlight=False, soft_wrap=True)
        self._last_line = time.monotonic()
