"""`afina train` as a person runs it: with progress, and the story of the run as its result."""

from typing import Any

from afina.config import TrainSettings
from afina.training import run


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train with a progress bar; returns run.json and the folder."""
    finished = run.train(settings, quiet=False)
    return {"folder": str(finished.folder)} | finished.story
