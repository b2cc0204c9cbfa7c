"""What a person sees while a run goes on: loss, speed, time left, memory."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from afina.training.loop import Tick, peak_memory_mb
from afina.training.setup import Setup


class Silent:
    """Shows nothing: for Python callers and tests."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def tick(self, tick: Tick) -> None:
        """One step is done."""


class Display(Silent):
    """A progress bar on standard error; a line a check where that is no terminal."""

    def __init__(self, setup: Setup) -> None:
        self._console = Console(stderr=True)
        self._steps = setup.steps
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=self._steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def tick(self, tick: Tick) -> None:
        """Move the bar on, and say how it goes."""
        speed = f"loss {tick.loss:.3f}  {tick.tokens / tick.seconds:,.0f} tokens/s  peak {peak_memory_mb():,.0f} MB"
        self._bar.update(self._task, completed=tick.step, description=speed)
        if tick.held_out_loss is not None:
            self._console.print(
                f"step {tick.step}/{self._steps}  {speed}  held-out loss {tick.held_out_loss:.3f}", highlight=False
            )
