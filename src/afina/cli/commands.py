"""Commands that use the terminal: progress of `train`, log of `compare`, questions of `advise`."""

import sys
from pathlib import Path

from afina.comparison.results import AdviceResult, ComparisonResult
from afina.io.translation import translate
from afina.settings import AdviseSettings, CompareSettings, TrainSettings
from afina.training.results import SweepResult, TrainResult


def train(settings: TrainSettings) -> TrainResult | SweepResult:
    """Train with a progress bar; return the finished run, or the runs of a sweep file."""
    from afina.training.sweep import SUFFIXES, sweep
    from afina.training.termination import termination
    from afina.training.train import train as train_one

    with termination.handled():
        if isinstance(settings.data, Path) and settings.data.suffix in SUFFIXES:
            given = {name: getattr(settings, name) for name in settings.model_fields_set}
            return sweep(settings.data, given, quiet=False)
        return train_one(settings, quiet=False)


def compare(settings: CompareSettings) -> ComparisonResult:
    """Compare methods; each stage is logged on standard error."""
    from afina.comparison.compare import compare as compare_methods

    return compare_methods(settings, log=_log)


def advise(settings: AdviseSettings) -> AdviceResult:
    """Advise; in a terminal, settings that are missing are requested."""
    from afina.comparison.advise import advise as advise_on
    from afina.comparison.advise import ask

    return advise_on(ask(settings, _read_answer) if sys.stdin.isatty() else settings)


def _log(text: str) -> None:
    print(f"afina: {translate(text)}", file=sys.stderr, flush=True)


def _read_answer(question: str) -> str:
    try:
        return input(f"{question} ").strip()
    except EOFError:  # Ctrl-D ends the command
        raise KeyboardInterrupt from None
