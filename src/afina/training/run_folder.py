"""The folder of a run: which one it is, what is written into it before the first step.

RUN/settings.yaml     the resolved settings; `afina train --config` runs them again
RUN/example.txt       one row as token ids are decoded, target tokens marked
RUN/metrics.jsonl     one line per optimizer step
RUN/eval.jsonl        the eval rows
RUN/reference.json    dpo, kto, grpo, rloo and ppo: the reference policy
RUN/probe.json        classify: scores of the linear probe that the head starts from
RUN/completions/      grpo, rloo and ppo: some completions of each evaluation
RUN/checkpoint/       the state from which --resume continues
RUN/adapter/          the best adapter, in PEFT's format, and its routing profile
RUN/trackers.json     the run's ids in experiment trackers
RUN/failure.json      why a run ended before its last step
RUN/run.json          data, base, environment, figures, verdict
RUN/curve.png, RUN/README.md
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from afina.errors import SettingsError, TrainingError
from afina.io.atomic import write_json, write_text
from afina.io.run_record import FAILURE_FILE
from afina.objectives.prepared import EVAL_ROWS, to_jsonl
from afina.settings import TrainSettings, resolved
from afina.training.checkpoint import SETTINGS
from afina.training.setup.set_up import RunSetup

# Settings that a resumed run may change: files may have moved (data and base are compared by their
# content), and checkpointing changes no number.
MAY_CHANGE = (
    "resume",
    "report_to",
    "overwrite",
    "output_dir",
    "data",
    "base",
    "device",
    "gradient_checkpointing",
)


def check_folder(folder: Path, settings: TrainSettings) -> None:
    """Raise where a new run would replace something, or a resumed one has not begun.

    Raises:
        SettingsError: The folder is a file, or contains something that is not to be replaced.
        TrainingError: There is nothing to resume.
    """
    has_begun = (folder / SETTINGS).is_file()
    if folder.exists() and not folder.is_dir():
        what, hint = "this is a file, not a run folder", "choose another --output-dir"
        raise SettingsError(what, where=str(folder), hint=hint)
    if settings.resume is True and not has_begun:
        hint = "leave out --resume to start"
        raise TrainingError("nothing to resume here", where=str(folder), hint=hint)
    if (settings.resume and has_begun) or not folder.exists() or not any(folder.iterdir()):
        return
    if settings.overwrite and has_begun:
        return
    what = "there is a run in this folder already" if has_begun else "this folder is not empty"
    hint = "choose another --output-dir"
    if has_begun:
        hint += ", or --overwrite to replace that run"
        is_finished = (folder / "README.md").exists()
        hint = hint if is_finished else f"add --resume to continue that run; or {hint}"
    raise SettingsError(what, where=str(folder), hint=hint)


def run_identity(setup: RunSetup) -> dict[str, Any]:
    """Return what must be unchanged when a run is resumed: settings, data, base, eval rows."""
    prepared = setup.prepared
    records = to_jsonl(prepared.eval_records).encode()
    identity = {
        "settings": {k: v for k, v in resolved(setup.settings).items() if k not in MAY_CHANGE},
        "data": prepared.data_info["sha256"],
        "base": prepared.base.hash,
        "held-out rows": hashlib.sha256(records).hexdigest(),
        "adapter it goes on from": prepared.init_adapter,
        "adapter it learns over": prepared.frozen_adapter,
        "judge that gives the rewards": prepared.reward_hash,
    }
    return {name: value for name, value in identity.items() if value is not None}


def begin_run(setup: RunSetup, folder: Path) -> None:
    """Write settings, example and eval rows into a new run folder."""
    if setup.settings.overwrite and folder.exists():
        shutil.rmtree(folder)
    settings = {"format_version": 2} | resolved(setup.settings)
    settings |= {"resume": False, "overwrite": False, "output_dir": str(folder)}
    write_text(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_text(folder / "example.txt", setup.prepared.example + "\n")
    write_text(folder / EVAL_ROWS, to_jsonl(setup.prepared.eval_records))
    write_text(folder / "metrics.jsonl", "")


def record_failure(folder: Path, error: TrainingError) -> None:
    """Record why a run ended before its last step, for `afina runs`."""
    write_json(folder / FAILURE_FILE, {"what": error.what, "why": error.why})


@contextmanager
def removed_on_failure(folders: Sequence[Path]) -> Iterator[None]:
    """Remove the folders of runs whose first step was not reached; an interruption keeps them."""
    try:
        yield
    except Exception:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
