"""`afina train` as a person runs it: with progress, and the story of the run, or of each run of a sweep, as its result."""

from typing import Any

from afina.planning.checkpointing_policy import choose
from afina.planning.checkpointing_policy import train as train_one
from afina.settings import TrainSettings
from afina.training.sweep import SUFFIXES, sweep


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train with a progress bar; returns run.json and the folder, or a line for each run of a sweep."""
    if settings.data.suffix in SUFFIXES:
        told = {name: getattr(settings, name) for name in settings.model_fields_set}
        return sweep(settings.data, told, quiet=False, choose=choose)
    finished = train_one(settings, quiet=False)
    return {"folder": str(finished.folder)} | finished.story
