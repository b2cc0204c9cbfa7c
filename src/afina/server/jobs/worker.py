"""The job worker: a thread that has each queued job trained by a process and serves its adapter.

    queued --> running --> succeeded | failed     paused, cancelled: by request; ends the process
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
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import update

from afina.data.unread import list_unused
from afina.engine.encoder_engine import EncoderEngine
from afina.engine.engine import Engine
from afina.errors import AdapterError, AfinaError, AuditError, BaseError, DataError
from afina.io.atomic import atomic_directory, recover_interrupted_replace, write_json, write_text
from afina.io.strict_json import read_json_object
from afina.server.jobs.bounded import limit_process
from afina.server.jobs.process import ERROR, GRADER, JOB, RUN
from afina.server.jobs.watcher import RunWatcher
from afina.server.logs import LOG
from afina.server.metrics import ServerMetrics
from afina.server.store import AdapterRow, JobCheckpoint, JobEvent, JobRow, Store, now
from afina.settings import ServeSettings

# between two checks of running jobs: an adapter is served within a second of the end of its job
POLL_SECONDS = 0.1
IDLE_POLL_SECONDS = 5.0  # between two checks of the table where no job runs
LEASE_SECONDS = 60  # after so long without a renewal, another server takes a job over
MAX_ATTEMPTS = 8  # to start a process, within 4 minutes
RETRY_SECONDS = 5.0  # between two attempts to store the end of a job


@dataclass
class _Running:
    """A job's process."""

    job: JobRow
    process: "subprocess.Popen[bytes]"
    watcher: RunWatcher
    steps: set[int] = field(default_factory=set)  # of checkpoints that are stored already
    new_events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # not stored yet
    retry_at: float = 0.0  # seconds of the monotonic clock: when its end is handled again


class JobWorker:
    """Trains the jobs of one server, at most `settings.max_training_jobs` at once."""

    def __init__(
        self,
        settings: ServeSettings,
        store: Store,
        engine: Engine | EncoderEngine,
        metrics: ServerMetrics,
    ) -> None:
        self.settings, self.store, self.engine, self.metrics = settings, store, engine, metrics
        self.server_id = ""  # of the state directory, whose lock this process has
        self._inherited_fds: tuple[int, ...] = ()
        self._running: dict[str, _Running] = {}
        self._retry_at: dict[str, float] = {}  # seconds of the monotonic clock, by job
        self._renewed = 0.0
        self._wake, self._ending = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="afina-jobs", daemon=True)

    def start(self, inherited_fds: tuple[int, ...] = ()) -> None:
        """Start the thread; jobs that were running when the server stopped are resumed.

        Args:
            inherited_fds: File descriptors that a job's process keeps open, such as the lock on
                the state directory.
        """
        self._inherited_fds = inherited_fds
        self.server_id = _stored_id(self.settings.state_dir / "server.id")
        self._take_back_lost()
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
        self.store.add(event_of(job, message, level, **data))

    # ---- the thread

    def _work(self) -> None:
        while not self._ending:
            try:
                self._check_jobs()
            except Exception:  # a full disk or a lost database: logged, and tried again
                LOG.exception("the job worker failed and continues")
                time.sleep(1.0)
            is_waiting = bool(self._running or self._retry_at)
            self._wake.wait(POLL_SECONDS if is_waiting else IDLE_POLL_SECONDS)
            self._wake.clear()
        for running in self._running.values():
            _end(running.process)

    def _check_jobs(self) -> None:
        """Follow the running jobs, end those that are no longer wanted, and start queued ones."""
        self._renew_leases()
        jobs = self.store.query(JobRow, JobRow.id.in_(self._running)) if self._running else []
        current = {job.id for job in jobs if job.status == "running" and self._is_own(job)}
        for running in list(self._running.values()):
            try:
                self._check_running(running, running.job.id in current)
            except Exception:  # the others are followed all the same
                LOG.exception("a job could not be followed", extra={"job": running.job.id})
        self._take_back_lost()
        while len(self._running) < self.settings.max_training_jobs:
            if not self._claim_next():
                return

    def _check_running(self, running: _Running, is_wanted: bool) -> None:
        """Follow one job, and store its end."""
        job = running.job
        # polled before its run folder is read, so that nothing of the run is missed
        has_ended = running.process.poll() is not None
        if not is_wanted:
            _end(running.process)
            del self._running[job.id]
            return
        try:
            self._follow(running)
        finally:
            if not has_ended and time.time() - (job.started or 0) > self._max_seconds:
                _end(running.process)
                self._fail(job, f"it took longer than {self.settings.job_max_hours:g} h")
                del self._running[job.id]
            elif has_ended and time.monotonic() >= running.retry_at:
                self._finish(running)
                del self._running[job.id]

    @property
    def _max_seconds(self) -> float:
        return self.settings.job_max_hours * 3600

    def _is_own(self, job: JobRow) -> bool:
        return job.server == self.server_id

    def _renew_leases(self) -> None:
        """Extend the leases of the running jobs, in a third of their time."""
        if not self._running or time.monotonic() - self._renewed < LEASE_SECONDS / 3:
            return
        with self.store.write() as session:
            own = (JobRow.id.in_(self._running), JobRow.server == self.server_id)
            session.execute(update(JobRow).where(*own).values(lease=now() + LEASE_SECONDS))
        self._renewed = time.monotonic()

    def _take_back_lost(self) -> None:
        """Queue running jobs without a process: of an earlier start or of another server."""
        for job in self.store.query(JobRow, JobRow.status == "running"):
            is_lost = job.id not in self._running if self._is_own(job) else (job.lease or 0) < now()
            if is_lost:
                message = "The server was restarted; the job resumes from its last checkpoint"
                where = (JobRow.server == job.server,) if job.server else (JobRow.server.is_(None),)
                event = event_of(job.id, message, "warn")
                self.store.transition(job.id, ("running",), event, where=where, status="queued")

    def _claim_next(self) -> bool:
        """Start a queued job of the key with the fewest running ones; return False without one."""
        queued = self.store.query(
            JobRow, JobRow.status == "queued", order=[JobRow.created, JobRow.id]
        )
        waiting = {job.id for job in queued}
        self._retry_at = {job: at for job, at in self._retry_at.items() if job in waiting}
        ready = [job for job in queued if self._retry_at.get(job.id, 0.0) <= time.monotonic()]
        if not ready:
            return False
        running = Counter(one.job.owner for one in self._running.values())
        latest = self.store.latest_starts()
        job = min(ready, key=lambda one: (running[one.owner], latest.get(one.owner, 0)))
        claim: dict[str, Any] = {"server": self.server_id, "lease": now() + LEASE_SECONDS}
        claim |= {"started": now(), "attempt": job.attempt + 1}
        if self.store.transition(job.id, ("queued",), status="running", **claim):
            for name, value in claim.items():
                setattr(job, name, value)
            self._retry_at.pop(job.id, None)
            try:
                self._begin(job)
            except Exception as error:  # a full disk, no more processes: nothing of the job itself
                LOG.exception("a job could not be started", extra={"job": job.id})
                self._give_back(job, error)
        return True

    def _give_back(self, job: JobRow, error: Exception) -> None:
        """Queue a job that could not be started for another attempt; fail it after the last one."""
        running = self._running.pop(job.id, None)
        if running is not None:
            _end(running.process)
        if job.attempt >= MAX_ATTEMPTS:
            self._fail(job, "the server could not start the training process")
            return
        self._retry_at[job.id] = time.monotonic() + min(60.0, 2.0**job.attempt)
        event = event_of(job.id, "The job could not be started; it is tried again", "warn")
        self.store.transition(job.id, ("running",), event, status="queued")

    def _begin(self, job: JobRow) -> None:
        """Start or resume the process of a job."""
        folder = folder_of(self.settings, job)
        threads = self.settings.job_num_threads or max(1, (os.cpu_count() or 2) // 2)
        own = {"settings": job.request["settings"], "batch_size": job.request["batch_size"]}
        write_json(folder / JOB, own | {"threads": threads, "nice": self.settings.job_nice})
        reinforcement = job.request["method"].get("reinforcement")
        if reinforcement:
            write_json(folder / GRADER, reinforcement["grader"])
        events = self.store.query(JobEvent, JobEvent.job == job.id)
        step = max((event.data.get("step", 0) for event in events), default=0)
        checkpoints = self.store.query(JobCheckpoint, JobCheckpoint.job == job.id)
        stored = {checkpoint.step for checkpoint in checkpoints}
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
        self._running[job.id] = _Running(job, process, RunWatcher(folder / RUN, step), stored)
        limit_process(process.pid, self._memory_bytes)
        event = event_of(job.id, f"Fine-tuning job {'resumed' if step else 'started'}")
        self.store.transition(job.id, ("running",), event, attempt=0)
        LOG.info("job started", extra={"job": job.id, "trainer": process.pid, "threads": threads})

    def _follow(self, running: _Running) -> None:
        """Store what is new in the run folder: events and checkpoints."""
        job = running.job
        running.new_events += running.watcher.events()
        if running.new_events:
            self.store.add(*(event_of(job.id, m, **data) for m, data in running.new_events))
            running.new_events.clear()
        step = running.watcher.best_step()
        if step is None or step in running.steps:
            return
        folder = self.settings.state_dir / "adapters" / job.id / f"step-{step}"
        if not running.watcher.copy(folder, step):
            return
        name = f"{job.model}:ckpt-step-{step}"
        metrics = running.watcher.metrics_at(step)
        row = JobCheckpoint(model=name, job=job.id, step=step, metrics=metrics)
        try:
            adapter = self._register(name, folder, job.owner)
        except AfinaError as error:
            message = f"The checkpoint of step {step} cannot be served: {error.what}"
            self.add_event(job.id, message, "warn")
            running.steps.add(step)
            return
        with self.store.write() as session:
            session.merge(adapter)
            session.merge(row)
        running.steps.add(step)

    @property
    def _memory_bytes(self) -> int | None:
        limit = self.settings.job_memory_gb
        return None if limit is None else round(limit * 1e9)

    def _register(self, name: str, folder: Path, owner: str | None) -> AdapterRow:
        """Register the adapter in `folder` as `name`; return its row of the store."""
        registry = self.engine.registry
        if registry.get(name) is None:
            registry.add(name, folder, owner)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return AdapterRow(name=name, folder=str(folder), owner=owner, bytes=size)

    def _finish(self, running: _Running) -> None:
        """Register the adapter of a job whose process has ended, or store its error.

        Raises:
            Exception: The machine has failed, not the job: it is tried again in `RETRY_SECONDS`.
        """
        job, code = running.job, running.process.returncode
        folder = folder_of(self.settings, job)
        running.retry_at = time.monotonic() + RETRY_SECONDS
        try:
            if code == 0:
                self._succeed(job, folder / RUN)
            else:
                self._fail(job, _failure_reason(folder, code))
        except (AdapterError, AuditError, BaseError, DataError) as error:
            self._fail(job, f"the adapter cannot be served: {error.what}")
        shutil.rmtree(folder / RUN / "checkpoint", ignore_errors=True)  # it is not resumed

    def _succeed(self, job: JobRow, run: Path) -> None:
        final = self.settings.state_dir / "adapters" / job.id / "final"
        recover_interrupted_replace(final)
        with atomic_directory(final) as new:
            shutil.copytree(run / "adapter", new, dirs_exist_ok=True)
        record = read_json_object(run / "run.json")
        row = self._register(job.model, final, job.owner)
        unused = list_unused(record["data"].get("unused_columns") or {})
        events = [
            event_of(job.id, f"New fine-tuned model created: {job.model}"),
            *([event_of(job.id, f"Columns not used: {unused}", "warn")] if unused else []),
            *(event_of(job.id, sentence) for sentence in record["verdict"]),
            event_of(job.id, "The job has successfully completed"),
        ]
        values: dict[str, Any] = {
            "status": "succeeded",
            "finished": now(),
            "tokens": int(record["tokens"]),
        }
        try:
            is_done = self.store.transition(job.id, ("running",), row, *events, **values)
        except BaseException:
            self.engine.registry.remove(job.model)
            raise
        if not is_done:  # cancelled while its adapter was copied
            self.engine.registry.remove(job.model)
            return
        self.metrics.jobs.labels("succeeded").inc()
        LOG.info("job succeeded", extra={"job": job.id, "model": job.model})

    def _fail(self, job: JobRow, message: str) -> None:
        error = {"code": "training_failed", "message": message, "param": None}
        event = event_of(job.id, message, "error")
        values: dict[str, Any] = {"status": "failed", "finished": now(), "error": error}
        if self.store.transition(job.id, ("running",), event, **values):
            self.metrics.jobs.labels("failed").inc()
            LOG.warning("job failed", extra={"job": job.id, "why": message})


def event_of(job: str, message: str, level: str = "info", **data: Any) -> JobEvent:
    """Return the row of an event."""
    return JobEvent(job=job, level=level, message=message, data=data)


def _stored_id(file: Path) -> str:
    """Return the identity of a state directory, created where it is missing."""
    if not file.is_file():
        write_text(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8").strip()


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
