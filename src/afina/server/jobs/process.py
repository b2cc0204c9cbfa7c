"""The process of a job, started by the job worker: `python -m afina.server.jobs.process FOLDER`.

    FOLDER/job.json      settings of `afina train`, number of threads, niceness
    FOLDER/grader.json   the grader of a reinforcement job
    FOLDER/run/          the run folder, with the checkpoint from which the job resumes
    FOLDER/error.json    the error of a failed run

Training runs in a separate process because a backward pass would delay every completion in the
engine's thread, because the operating system then shares the machine (threads, niceness), and
because a crash does not end the server. When the server ends, the pipe to standard input closes and
the process ends at once; its checkpoint is kept. The pipe is watched before torch is imported:
the import takes seconds, during which the state directory would stay locked.
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
    """Start or resume the run of job.json; return the exit status."""
    threading.Thread(target=_exit_with_server, daemon=True).start()
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    # Windows has no niceness, and a container may forbid it
    with suppress(AttributeError, OSError):
        os.nice(job["nice"])
    import torch

    from afina.training.train import train

    torch.set_num_threads(job["threads"])
    (folder / ERROR).unlink(missing_ok=True)
    if (folder / RUN / "README.md").is_file():
        return 0  # the run was complete, and the server ended before the job was
    try:
        train(_settings(folder / RUN, job))
    except AfinaError as error:
        fields = ("what", "where", "why", "hint")
        write_json(folder / ERROR, {name: getattr(error, name) for name in fields})
        return 1
    return 0


def _settings(run: Path, job: dict[str, Any]) -> TrainSettings:
    """Return the settings of job.json, or those of a run that has begun."""
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
        update={"max_tokens_per_batch": _tokens_per_batch(settings, job["batch_size"])}
    )


def _tokens_per_batch(settings: TrainSettings, rows: int) -> int:
    """Return about the number of tokens of `rows` rows: batches are measured in tokens."""
    from afina.data.renderer import Renderer
    from afina.data.schemas import SFT
    from afina.io.chat_format import ChatFormat
    from afina.models.loading import load_tokenizer, resolve_model_dir
    from afina.objectives.run_rows import read_files

    tokenizer = load_tokenizer(
        resolve_model_dir(settings.base, settings.revision),
        settings.base,
        settings.trust_remote_code,
    )
    length = settings.max_length if settings.truncate and settings.max_length else 1 << 30
    renderer, table = (
        Renderer(tokenizer, ChatFormat.from_settings(settings), length, settings.truncate),
        read_files(settings, SFT),
    )
    lengths = [len(example.token_ids) for row in table.rows for example in _examples(renderer, row)]
    return max(1, round(rows * sum(lengths) / max(1, len(lengths))))


def _examples(renderer: Any, row: Any) -> list[Any]:
    return (
        renderer.chunk_text(row, renderer.max_length)
        if row.text is not None
        else renderer.examples(row)
    )


def _exit_with_server() -> None:
    """End the process when standard input, a pipe from the server, closes."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would keep Python from exiting
        pass
    os._exit(75)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
