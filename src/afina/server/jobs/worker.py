"""The worker: a thread that takes jobs off the tables, has each trained by a process, and puts its adapter on the shelf.

    queued --> running --> succeeded | failed          paused and cancelled by who asked; then the process is ended
       ^----------'  the server died: after a restart the job goes on from its checkpoint

What a job does is read from its run folder: each check becomes an event, each new best adapter a checkpoint.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete

from afina.errors import AfinaError
from afina.io.atomic import atomic_directory, recover_interrupted_replace, write_json
from afina.io.strict_json import read_json_object
from afina.server.jobs.process import ERROR, GRADER, JOB, RUN
from afina.server.jobs.watcher import RunWatcher
from afina.server.logs import LOG
from afina.server.store import AdapterRow, JobCheckpoint, JobEvent, JobRow, Store, now
from afina.settings import ServeSettings

if TYPE_CHECKING:
    from afina.server.state import ServerState

POLL_SECONDS = (
    0.1  # seconds between two looks at running jobs: an adapter answers within a second of its end
)
ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class _Running:
    """A job's process."""

    job: JobRow
    process: "subprocess.Popen[bytes]"
    follower: RunWatcher
    steps: set[int] = field(default_factory=set)  # checkpoints that are kept already


class JobWorker:
    """Trains the jobs of one server; `settings.jobs` of them at once."""

    def __init__(self, settings: ServeSettings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.state: ServerState = None  # type: ignore[assignment]
        self._running: dict[str, _Running] = {}
        self._wake, self._ending = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="afina-jobs", daemon=True)

    def start(self, state: "ServerState") -> None:
        """Begin; jobs that were running when the server died go on."""
        self.state = state
        for job in self.store.query(JobRow, JobRow.status == "running"):
            self.store.transition(job.id, ("running",), status="queued")
            self.add_event(
                job.id,
                "The server was started again; the job goes on from its last checkpoint",
                "warn",
            )
        self._thread.start()

    def stop(self) -> None:
        """End all processes; their jobs go on when the server is started again."""
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Something about the jobs has changed."""
        self._wake.set()

    def add_event(self, job: str, message: str, level: str = "info", **data: Any) -> None:
        """Add to a job's events."""
        self.store.add(JobEvent(job=job, level=level, message=message, data=data))

    # ---- the thread

    def _work(self) -> None:
        while not self._ending:
            try:
                self._look()
            except Exception:  # a full disk, a lost database: said, and tried again
                LOG.exception("the worker failed; it goes on")
                time.sleep(1.0)
            self._wake.wait(POLL_SECONDS if self._running else 5.0)
            self._wake.clear()
        for one in self._running.values():
            _end(one.process)

    def _look(self) -> None:
        """One look at everything."""
        status = (
            {job.id: job.status for job in self.store.query(JobRow, JobRow.id.in_(self._running))}
            if self._running
            else {}
        )
        for one in list(self._running.values()):
            ended = (
                one.process.poll() is not None
            )  # before its folder is read, so that nothing of it is missed
            if status.get(one.job.id) != "running":
                _end(one.process)
                del self._running[one.job.id]
                continue
            self._follow(one)
            if ended:
                del self._running[one.job.id]
                self._ended(one)
        room = self.settings.max_training_jobs - len(self._running)
        if room > 0:
            for job in self.store.query(
                JobRow, JobRow.status == "queued", order=[JobRow.created, JobRow.id], limit=room
            ):
                if self.store.transition(job.id, ("queued",), status="running"):
                    self._begin(job)

    def _begin(self, job: JobRow) -> None:
        folder = folder_of(self.settings, job)
        threads = self.settings.job_num_threads or max(1, (os.cpu_count() or 2) // 2)
        own = {"settings": job.request["settings"], "batch_size": job.request["batch_size"]}
        write_json(folder / JOB, own | {"threads": threads, "nice": self.settings.job_nice})
        if reinforced := job.request["method"].get("reinforcement"):
            write_json(folder / GRADER, reinforced["grader"])
        command = [sys.executable, "-m", "afina.server.jobs.process", str(folder)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=self.state.inherited_fds,
            )
        past = [
            event.data.get("step", 0)
            for event in self.store.query(JobEvent, JobEvent.job == job.id)
        ]
        kept = {row.step for row in self.store.query(JobCheckpoint, JobCheckpoint.job == job.id)}
        self._running[job.id] = _Running(
            job, process, RunWatcher(folder / RUN, max(past, default=0)), kept
        )
        self.add_event(
            job.id,
            "Fine-tuning job started" if not past or max(past) == 0 else "Fine-tuning job goes on",
        )
        LOG.info("job began", extra={"job": job.id, "trainer": process.pid, "threads": threads})

    def _follow(self, one: _Running) -> None:
        """What is new in the run folder: events, and checkpoints."""
        told = one.follower.events()
        if told:
            self.store.add(
                *(JobEvent(job=one.job.id, level="info", message=m, data=data) for m, data in told)
            )
        step = one.follower.best_step()
        if step is not None and step not in one.steps:
            name = f"{one.job.model}:ckpt-step-{step}"
            place = self.settings.state_dir / "adapters" / one.job.id / f"step-{step}"
            if one.follower.copy(place, step):
                one.steps.add(step)
                row = JobCheckpoint(
                    model=name, job=one.job.id, step=step, metrics=one.follower.metrics_at(step)
                )
                try:
                    self._serve(name, place, one.job.owner, row)
                except AfinaError as error:
                    self.add_event(
                        one.job.id,
                        f"The checkpoint of step {step} cannot be served: {error.what}",
                        "warn",
                    )

    def _serve(self, name: str, folder: Path, owner: str | None, *rows: Any) -> None:
        """The adapter in `folder` answers as `name` from now on, also after a restart."""
        shelf = self.state.engine.registry
        if shelf.get(name) is None:
            shelf.add(name, folder, owner)
        with self.store.write() as session:
            session.merge(AdapterRow(name=name, folder=str(folder), owner=owner))
            session.add_all(rows)

    def _withdraw(self, name: str) -> None:
        self.state.engine.registry.remove(name)
        with self.store.write() as session:
            session.execute(delete(AdapterRow).where(AdapterRow.name == name))

    def _ended(self, one: _Running) -> None:
        """The process has ended by itself: its adapter onto the shelf, or its error into the tables."""
        job, folder, code = one.job, folder_of(self.settings, one.job), one.process.returncode
        try:
            if code == 0:
                self._succeed(job, folder / RUN)
            else:
                self._fail(job, _reason(folder, code))
        except (AfinaError, OSError) as error:
            self._fail(job, f"the adapter cannot be served: {error}")

    def _succeed(self, job: JobRow, run: Path) -> None:
        place = self.settings.state_dir / "adapters" / job.id / "final"
        recover_interrupted_replace(place)
        with atomic_directory(place) as new:
            shutil.copytree(run / "adapter", new, dirs_exist_ok=True)
        story = read_json_object(run / "run.json")
        self._serve(job.model, place, job.owner)
        if not self.store.transition(
            job.id, ("running",), status="succeeded", finished=now(), tokens=int(story["tokens"])
        ):
            self._withdraw(job.model)  # cancelled in the last moment
            return
        self.add_event(job.id, f"New fine-tuned model created: {job.model}")
        for sentence in story["verdict"]:
            self.add_event(job.id, sentence)
        self.add_event(job.id, "The job has successfully completed")
        self.state.metrics.jobs.labels("succeeded").inc()
        LOG.info("job succeeded", extra={"job": job.id, "model": job.model})

    def _fail(self, job: JobRow, message: str) -> None:
        error = {"code": "training_failed", "message": message, "param": None}
        if self.store.transition(
            job.id, ("running",), status="failed", finished=now(), error=error
        ):
            self.add_event(job.id, message, "error")
            self.state.metrics.jobs.labels("failed").inc()
            LOG.warning("job failed", extra={"job": job.id, "why": message})


def folder_of(settings: ServeSettings, job: JobRow) -> Path:
    """Where a job's process works."""
    folder = settings.state_dir / "jobs" / job.id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process: first by closing the pipe that it listens to."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reason(folder: Path, code: int) -> str:
    """Why a process has ended, for who asked for the job: without the paths of this machine."""
    if (folder / ERROR).is_file():
        told = read_json_object(folder / ERROR)
        where = f"{Path(told['where']).name}: " if told["where"] else ""
        return where + "; ".join(part for part in (told["what"], told["why"]) if part)
    return (
        f"the training process was ended by signal {-code}"
        if code < 0
        else f"the training process ended with status {code}"
    )
