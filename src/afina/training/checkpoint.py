"""Checkpoints, from which a run resumes bit for bit: optimizer, random state, progress."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from afina.errors import TrainingError
from afina.io.atomic import atomic_directory, recover_interrupted_replace, write_json
from afina.io.migrations import migrate_progress, migrate_settings
from afina.io.strict_json import read_json_object
from afina.settings import TrainSettings, resolved
from afina.training.setup.optimizer import AdapterOptimizer

FOLDER, SETTINGS = "checkpoint", "settings.yaml"


@dataclass
class TrainerState:
    """Progress of a run; losses are nats per target token."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    num_bad_evals: int = 0
    before: dict[str, float] = field(default_factory=dict)


def save(
    run: Path, optimizer: AdapterOptimizer, progress: TrainerState, identity: dict[str, Any]
) -> None:
    """Write the checkpoint of `run`; it replaces the previous one only when it is complete."""
    with atomic_directory(run / FOLDER) as folder:
        state = {name: t.detach().cpu().contiguous() for name, t in optimizer.state().items()}
        state[":rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state[":rng-cuda"] = torch.cuda.get_rng_state()
        save_file(state, folder / "state.safetensors")
        content = {"format_version": 2, "progress": asdict(progress), "identity": identity}
        write_json(folder / "progress.json", content)


def exists(run: Path) -> bool:
    """Return whether `run` has a checkpoint to resume from."""
    recover_interrupted_replace(run / FOLDER)
    return (run / FOLDER / "progress.json").is_file()


def load(run: Path, optimizer: AdapterOptimizer, identity: dict[str, Any]) -> TrainerState:
    """Load the checkpoint of a run into `optimizer`, and return its progress.

    Raises:
        TrainingError: `identity` (settings, data, base) is not what the run began with.
    """
    content = migrate_progress(read_json_object(run / FOLDER / "progress.json"))
    _same_settings(run, content["identity"]["settings"], identity["settings"])
    for name, value in identity.items():
        if name != "settings" and content["identity"].get(name) != value:
            is_or_are = "are" if name.endswith("s") else "is"
            raise TrainingError(
                f"cannot resume: the {name} {is_or_are} not what the run began with",
                where=str(run),
                hint="restore it, or start a new run with another --output-dir",
            )
    state = load_file(run / FOLDER / "state.safetensors")
    torch.set_rng_state(state.pop(":rng"))
    cuda = state.pop(":rng-cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    optimizer.load(state)
    return TrainerState(**content["progress"])


def _same_settings(run: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `TrainingError` with every setting that changed; unrecorded ones have defaults."""
    complete = TrainSettings(**{"data": ""} | migrate_settings(before))
    known = {name: resolved(complete).get(name) for name in now}
    changed = [
        f"{name} is {_yaml(known[name])} in the run, {_yaml(now[name])} now"
        for name in now
        if known[name] != now[name]
    ]
    if changed:
        raise TrainingError(
            f"cannot resume: the setting {'; '.join(changed)}",
            where=str(run),
            hint=f"afina train --config {run / SETTINGS} --resume, "
            "or start a new run with another --output-dir",
        )


def _yaml(value: Any) -> str:
    """Return a setting's value as it is written in YAML."""
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)
