"""What a person sees while a run goes on: loss, speed, time left, memory."""

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

from afina.training.setup.set_up import RunSetup
from afina.training.trainer import StepMetrics, peak_memory_mb


class NullProgress:
    """Shows nothing: for Python callers and tests."""

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
        """One step of a run is done; runs are counted in the order given."""


class ProgressDisplay(NullProgress):
    """A progress bar a run on standard error; a line a check where that is no terminal."""

    def __init__(self, setups: Sequence[RunSetup]) -> None:
        self._console = Console(stderr=True)
        self._steps = [setup.steps for setup in setups]
        self._piece = setups[0].prepared.units.piece
        names = (
            ["training"]
            if len(setups) == 1
            else [
                str(setup.settings.output_dir and setup.settings.output_dir.name)
                for setup in setups
            ]
        )
        self._labels = [""] if len(setups) == 1 else [f"{name}  " for name in names]
        self._bar = Progress(
            TextColumn("{task.fields[label]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks = [
            self._bar.add_task("", total=n, label=name)
            for n, name in zip(self._steps, names, strict=True)
        ]

    def __enter__(self) -> Self:
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
        """Move the bar on, and say how it goes."""
        speed = f"loss {tick.loss:.3f}  {tick.tokens / tick.seconds:,.0f} {self._piece}s/s  peak {peak_memory_mb():,.0f} MB"
        self._bar.update(self._tasks[run], completed=tick.step, description=speed)
        if "accuracy" in tick.metrics:
            speed += f"  preferred {100 * tick.metrics['accuracy']:.0f}%"
        if "reward" in tick.metrics:
            speed += f"  reward {tick.metrics['reward']:.3f}"
        if tick.eval_loss is not None:
            step = f"{self._labels[run]}step {tick.step}/{self._steps[run]}"
            reward = tick.metrics.get("eval_reward")
            judged = f"loss {tick.eval_loss:.3f}" if reward is None else f"reward {reward:.3f}"
            self._console.print(f"{step}  {speed}  held-out {judged}", highlight=False)
