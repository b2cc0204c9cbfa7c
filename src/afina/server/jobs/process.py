"""A job's own process: `python -m afina.server.jobs.process FOLDER`, begun, followed and stopped by the server's worker.

    FOLDER/job.json      what to do: settings of `afina train`, threads, niceness
    FOLDER/grader.json   who judges its answers, where it learns from rewards
    FOLDER/run/          the run folder, with the checkpoint from which it goes on
    FOLDER/error.json    what was wrong, where it is somebody's to mend

It is a process of its own because a backward pass would hold up every answer in the engine's thread, because what it
takes of the machine is then the system's to share out (threads, niceness), and because it may die without taking the
server along. When the server dies, the pipe to it closes, and the process ends at once; its checkpoint stays. That is looked
at before torch is imported, which takes a while, and during which the state folder would stay locked.
"""

import json
import os
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from afina.errors import AfinaError
from afina.io.atomic import write_json
from afina.io.migrations import migrate_settings
from afina.settings import TrainSettings, make_settings, read_yaml

JOB, GRADER, RUN, ERROR = "job.json", "grader.json", "run", "error.json"


def main(folder: Path) -> int:
    """Train what job.json says, or go on with it; returns the exit status."""
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    with suppress(
        AttributeError, OSError
    ):  # Windows has no niceness, and a container may forbid it
        os.nice(job["nice"])
    import torch

    from afina.training.train import train

    torch.set_num_threads(job["threads"])
    (folder / ERROR).unlink(missing_ok=True)
    if (folder / RUN / "README.md").is_file():
        return 0  # it was done, and the server died before it was told
    try:
        train(_settings(folder / RUN, job))
    except AfinaError as error:
        write_json(
            folder / ERROR,
            {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint},
        )
        return 1
    return 0


def _settings(run: Path, job: dict[str, Any]) -> TrainSettings:
    """The settings as told, or those of the run that has begun."""
    if (run / "settings.yaml").is_file():
        return make_settings(
            TrainSettings,
            migrate_settings(read_yaml(run / "settings.yaml"))
            | {"output_dir": str(run), "resume": True},
        )
    shutil.rmtree(run, ignore_errors=True)
    settings = make_settings(
        TrainSettings, migrate_settings(job["settings"]) | {"output_dir": str(run)}
    )
    if job["batch_size"] is None:
        return settings
    return settings.model_copy(
        update={"max_tokens_per_batch": _tokens_of(settings, job["batch_size"])}
    )


def _tokens_of(settings: TrainSettings, rows: int) -> int:
    """About as many tokens as so many rows have: afina's batches are measured in tokens."""
    from afina.data.renderer import Renderer
    from afina.data.schemas import SFT
    from afina.data.table import read_table
    from afina.models.loading import load_tokenizer, resolve_model_dir

    tokenizer = load_tokenizer(
        resolve_model_dir(settings.base, settings.revision),
        settings.base,
        settings.trust_remote_code,
    )
    renderer, table = (
        Renderer(tokenizer, settings.chat_template, 1 << 30),
        read_table(settings.data, SFT),
    )
    lengths = [len(example.token_ids) for row in table.rows for example in _examples(renderer, row)]
    return max(1, round(rows * sum(lengths) / max(1, len(lengths))))


def _examples(renderer: Any, row: Any) -> list[Any]:
    return (
        renderer.chunk_text(row, renderer.max_length)
        if row.text is not None
        else [renderer.example(row)]
    )


def _end_with_the_server() -> None:
    """Standard input is a pipe from the server: when it closes, nobody waits for this any more."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would stop Python from ending by itself
        pass
    os._exit(75)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
