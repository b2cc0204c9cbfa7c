"""The state from which a run goes on bit for bit: parameters, optimizer, random numbers, where it stood."""

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
    """Where a run stands. Losses are nats a labelled token."""

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
    """Write the checkpoint of `run`, taking the place of the one before only when it is whole."""
    with atomic_directory(run / FOLDER) as folder:
        state = {name: t.detach().cpu().contiguous() for name, t in optimizer.state().items()}
        state[":rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state[":rng-cuda"] = torch.cuda.get_rng_state()
        save_file(state, folder / "state.safetensors")
        content = {"format_version": 2, "progress": asdict(progress), "identity": identity}
        write_json(folder / "progress.json", content)


def exists(run: Path) -> bool:
    """Whether `run` has a checkpoint to go on from."""
    recover_interrupted_replace(run / FOLDER)
    return (run / FOLDER / "progress.json").is_file()


def load(run: Path, optimizer: AdapterOptimizer, identity: dict[str, Any]) -> TrainerState:
    """Bring a run back to its checkpoint; raises `TrainingError` where `identity` (settings, data, base) differs."""
    content = migrate_progress(read_json_object(run / FOLDER / "progress.json"))
    _same_settings(run, content["identity"]["settings"], identity["settings"])
    for name, value in identity.items():
        if name != "settings" and content["identity"].get(name) != value:
            raise TrainingError(
                f"cannot go on: the {name} {'are' if name.endswith('s') else 'is'} not what the run began with",
                where=str(run),
                hint="bring it back, or start a new run with another --output-dir",
            )
    state = load_file(run / FOLDER / "state.safetensors")
    torch.set_rng_state(state.pop(":rng"))
    cuda = state.pop(":rng-cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    optimizer.load(state)
    return TrainerState(**content["progress"])


def _same_settings(run: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `TrainingError` with every setting that changed; one that an older afina did not have had its default."""
    complete = TrainSettings(**{"data": ""} | migrate_settings(before))
    known = {name: resolved(complete).get(name) for name in now}
    changed = [
        f"{name} is {_told(known[name])} in the run, {_told(now[name])} now"
        for name in now
        if known[name] != now[name]
    ]
    if changed:
        raise TrainingError(
            f"cannot go on: the setting {'; '.join(changed)}",
            where=str(run),
            hint=f"afina train --config {run / SETTINGS} --resume, or start a new run with another --output-dir",
        )


def _told(value: Any) -> str:
    """A setting's value as it is written in YAML."""
    return (
        "not set"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
