"""The job worker: a thread that has each queued job trained by a process and serves its adapter.

    queued --> running --> succeeded | failed          paused, cancelled: by request; ends the process
       ^----------'  the server stopped: after a restart the job resumes from its checkpoint

Progress is read from the run folder: each evaluation becomes an event, each new best adapter a
checkpoint.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import delete

from afina.data.unread import list_unused
from afina.engine.engine import Engine
from afina.errors import AfinaError
from afina.io.atomic import atomic_directory, recover_interrupted_replace, write_json
from afina.io.strict_json import read_json_object
from afina.server.jobs.process import ERROR, GRADER, JOB, RUN
from afina.server.jobs.watcher import RunWatcher
from afina.server.logs import LOG
from afina.server.metrics import ServerMetrics
from afina.server.store import AdapterRow, JobCheckpoint, JobEvent, JobRow, Store, now
from afina.settings import ServeSettings

# between two checks of running jobs: an adapter is served within a second of the end of its job
POLL_SECONDS = 0.1
IDLE_POLL_SECONDS = 5.0  # between two checks of the table where no job runs


@dataclass
class _Running:
    """A job's process."""

    job: JobRow
    process: "subprocess.Popen[bytes]"
    watcher: RunWatcher
    steps: set[int] = field(default_factory=set)  # of checkpoints that are stored already


class JobWorker:
    """Trains the jobs of one server, at most `settings.max_training_jobs` at once."""

    def __init__(
        self, settings: ServeSettings, store: Store, engine: Engine, metrics: ServerMetrics
    ) -> None:
        self.settings, self.store, self.engine, self.metrics = settings, store, engine, metrics
        self._inherited_fds: tuple[int, ...] = ()
        self._running: dict[str, _Running] = {}
        self._wake, self._ending = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="afina-jobs", daemon=True)

    def start(self, inherited_fds: tuple[int, ...] = ()) -> None:
        """Start the thread; jobs that were running when the server stopped are resumed.

        Args:
            inherited_fds: File descriptors that a job's process keeps open, such as the lock on
                the state directory.
        """
        self._inherited_fds = inherited_fds
        for job in self.store.query(JobRow, JobRow.status == "running"):
            self.store.transition(job.id, ("running",), status="queued")
            self.add_event(
                job.id,
                "The server was restarted; the job resumes from its last checkpoint",
                "warn",
            )
        self._thread.start()

    def stop(self) -> None:
        """End all processes; their jobs resume when the server is started again."""
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Check the jobs now; called after a change of the table."""
        self._wake.set()

    def add_event(self, job: str, message: str, level: str = "info", **data: Any) -> None:
        """Add an event to a job."""
        self.store.add(JobEvent(job=job, level=level, message=message, data=data))

    # ---- the thread

    def _work(self) -> None:
        while not self._ending:
            try:
                self._check_jobs()
            except Exception:  # a full disk or a lost database: logged, and tried again
                LOG.exception("the job worker failed and continues")
                time.sleep(1.0)
            self._wake.wait(POLL_SECONDS if self._running else IDLE_POLL_SECONDS)
            self._wake.clear()
        for running in self._running.values():
            _end(running.process)

    def _check_jobs(self) -> None:
        """Follow the running jobs, end those that are no longer wanted, and start queued ones."""
        jobs = self.store.query(JobRow, JobRow.id.in_(self._running)) if self._running else []
        status = {job.id: job.status for job in jobs}
        for running in list(self._running.values()):
            # polled before its run folder is read, so that nothing of the run is missed
            has_ended = running.process.poll() is not None
            if status.get(running.job.id) != "running":
                _end(running.process)
                del self._running[running.job.id]
                continue
            self._follow(running)
            if has_ended:
                del self._running[running.job.id]
                self._finish(running)
        num_free = self.settings.max_training_jobs - len(self._running)
        if num_free <= 0:
            return
        order = [JobRow.created, JobRow.id]
        queued = self.store.query(JobRow, JobRow.status == "queued", order=order, limit=num_free)
        for job in queued:
            if self.store.transition(job.id, ("queued",), status="running"):
                self._begin(job)

    def _begin(self, job: JobRow) -> None:
        """Start or resume the process of a job."""
        folder = folder_of(self.settings, job)
        threads = self.settings.job_num_threads or max(1, (os.cpu_count() or 2) // 2)
        own = {"settings": job.request["settings"], "batch_size": job.request["batch_size"]}
        write_json(folder / JOB, own | {"threads": threads, "nice": self.settings.job_nice})
        reinforcement = job.request["method"].get("reinforcement")
        if reinforcement:
            write_json(folder / GRADER, reinforcement["grader"])
        number = str(threads)
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "afina.server.jobs.process", str(folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number},
                pass_fds=self._inherited_fds,
            )
        events = self.store.query(JobEvent, JobEvent.job == job.id)
        step = max((event.data.get("step", 0) for event in events), default=0)
        checkpoints = self.store.query(JobCheckpoint, JobCheckpoint.job == job.id)
        stored = {checkpoint.step for checkpoint in checkpoints}
        self._running[job.id] = _Running(job, process, RunWatcher(folder / RUN, step), stored)
        self.add_event(job.id, f"Fine-tuning job {'resumed' if step else 'started'}")
        LOG.info("job started", extra={"job": job.id, "trainer": process.pid, "threads": threads})

    def _follow(self, running: _Running) -> None:
        """Store what is new in the run folder: events and checkpoints."""
        job, events = running.job, running.watcher.events()
        if events:
            rows = [JobEvent(job=job.id, level="info", message=m, data=data) for m, data in events]
            self.store.add(*rows)
        step = running.watcher.best_step()
        if step is None or step in running.steps:
            return
        folder = self.settings.state_dir / "adapters" / job.id / f"step-{step}"
        if not running.watcher.copy(folder, step):
            return
        running.steps.add(step)
        name = f"{job.model}:ckpt-step-{step}"
        metrics = running.watcher.metrics_at(step)
        row = JobCheckpoint(model=name, job=job.id, step=step, metrics=metrics)
        try:
            self._serve(name, folder, job.owner, row)
        except AfinaError as error:
            message = f"The checkpoint of step {step} cannot be served: {error.what}"
            self.add_event(job.id, message, "warn")

    def _serve(self, name: str, folder: Path, owner: str | None, *rows: Any) -> None:
        """Register the adapter in `folder` as `name`, also for the time after a restart."""
        registry = self.engine.registry
        if registry.get(name) is None:
            registry.add(name, folder, owner)
        with self.store.write() as session:
            session.merge(AdapterRow(name=name, folder=str(folder), owner=owner))
            session.add_all(rows)

    def _withdraw(self, name: str) -> None:
        self.engine.registry.remove(name)
        with self.store.write() as session:
            session.execute(delete(AdapterRow).where(AdapterRow.name == name))

    def _finish(self, running: _Running) -> None:
        """Register the adapter of a job whose process has ended, or store its error."""
        job, code = running.job, running.process.returncode
        folder = folder_of(self.settings, job)
        try:
            if code == 0:
                self._succeed(job, folder / RUN)
            else:
                self._fail(job, _failure_reason(folder, code))
        except (AfinaError, OSError) as error:
            self._fail(job, f"the adapter cannot be served: {error}")

    def _succeed(self, job: JobRow, run: Path) -> None:
        place = self.settings.state_dir / "adapters" / job.id / "final"
        recover_interrupted_replace(place)
        with atomic_directory(place) as new:
            shutil.copytree(run / "adapter", new, dirs_exist_ok=True)
        record = read_json_object(run / "run.json")
        self._serve(job.model, place, job.owner)
        if not self.store.transition(
            job.id, ("running",), status="succeeded", finished=now(), tokens=int(record["tokens"])
        ):
            self._withdraw(job.model)  # cancelled while its adapter was copied
            return
        self.add_event(job.id, f"New fine-tuned model created: {job.model}")
        if unused := list_unused(record["data"].get("unused_columns") or {}):
            self.add_event(job.id, f"Columns not used: {unused}", "warn")
        for sentence in record["verdict"]:
            self.add_event(job.id, sentence)
        self.add_event(job.id, "The job has successfully completed")
        self.metrics.jobs.labels("succeeded").inc()
        LOG.info("job succeeded", extra={"job": job.id, "model": job.model})

    def _fail(self, job: JobRow, message: str) -> None:
        error = {"code": "training_failed", "message": message, "param": None}
        if self.store.transition(
            job.id, ("running",), status="failed", finished=now(), error=error
        ):
            self.add_event(job.id, message, "error")
            self.metrics.jobs.labels("failed").inc()
            LOG.warning("job failed", extra={"job": job.id, "why": message})


def folder_of(settings: ServeSettings, job: JobRow) -> Path:
    """Return the folder of a job's process, created where it is missing."""
    folder = settings.state_dir / "jobs" / job.id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process: close its standard input, and kill it after 5 seconds."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _failure_reason(folder: Path, code: int) -> str:
    """Return why a process has ended, for the owner of the job: without paths of this machine."""
    if (folder / ERROR).is_file():
        error = read_json_object(folder / ERROR)
        where = f"{Path(error['where']).name}: " if error["where"] else ""
        return where + "; ".join(part for part in (error["what"], error["why"]) if part)
    if code < 0:
        return f"the training process was ended by signal {-code}"
    return f"the training process ended with status {code}"
