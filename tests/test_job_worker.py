"""A job ends with a reason, and is trained once, whatever fails between two of its states."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from afina.errors import AdapterError
from afina.server.errors import APIError
from afina.server.jobs import worker as module
from afina.server.jobs.limits import JOB_LIMITS, check_job_limits
from afina.server.jobs.worker import JobWorker
from afina.server.store import AdapterRow, JobEvent, JobRow, Store, now
from afina.settings import ServeSettings, TrainSettings, job_settings, settings_groups
from helpers import until

# the training process: it notes that it ran, and writes a run folder
PROCESS = """
import json, os, pathlib, sys
run = pathlib.Path(sys.argv[1]) / "run"
(run / "adapter").mkdir(parents=True, exist_ok=True)
(run / "adapter" / "weights").write_text("x" * 100)
(run / "checkpoint").mkdir(exist_ok=True)
(run / "run.json").write_text(json.dumps({"tokens": 7, "verdict": ["better"], "data": {}}))
with (run.parent / "runs").open("a") as log: log.write("once\\n")
"""


class Registry:
    """Names of adapters."""

    def __init__(self) -> None:
        self.names: dict[str, Path] = {}

    def get(self, name: str) -> Path | None:
        return self.names.get(name)

    def add(self, name: str, folder: Path, owner: str | None) -> None:
        self.names[name] = folder

    def remove(self, name: str) -> None:
        self.names.pop(name, None)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobWorker]:
    store = Store(f"sqlite:///{tmp_path / 'state.db'}")
    popen = subprocess.Popen
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)

    def start(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", PROCESS, command[-1]], **options)

    monkeypatch.setattr(module.subprocess, "Popen", start)

    def made(state: str = "state", jobs: int = 1, **settings: Any) -> JobWorker:
        values = {"state_dir": tmp_path / state, "max_training_jobs": jobs, **settings}
        counter = SimpleNamespace(labels=lambda _: SimpleNamespace(inc=lambda: None))
        engine: Any = SimpleNamespace(registry=Registry())
        worker = JobWorker(ServeSettings(**values), store, engine, SimpleNamespace(jobs=counter))
        worker.server_id = module._stored_id(tmp_path / state / "server.id")
        return worker

    return made


def job(number: int, owner: str = "ann", **values: Any) -> JobRow:
    request = {"settings": {}, "batch_size": None, "method": {}}
    return JobRow(
        id=f"ftjob-{number}",
        owner=owner,
        request=request,
        training_file="file-1",
        validation_file=None,
        seed=0,
        model=f"ft:{number}",
        created=1000 + number,
        **values,
    )


def until_ended(worker: JobWorker, *jobs: str, seconds: float = 250.0) -> list[JobRow]:
    """Look until the jobs have ended, as the worker's thread does: errors are tried again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            worker._check_jobs()
            rows = [worker.store.get(JobRow, name) for name in jobs]
        except (OSError, OperationalError):
            continue
        worker._retry_at = dict.fromkeys(worker._retry_at, 0.0)
        if all(row is not None and row.finished for row in rows):
            return [row for row in rows if row is not None]
        time.sleep(0.02)
    raise AssertionError([(row.status, row.attempt) for row in rows if row])


def messages(store: Store, name: str) -> list[str]:
    rows = store.query(JobEvent, JobEvent.job == name, order=[JobEvent.number])
    return [row.message for row in rows]


def locked(*_: Any, **__: Any) -> Any:
    raise OperationalError("", {}, Exception("database is locked"))


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


FAULTS = {
    "the disk is full at the start": (module, "write_json", full),
    "no process can be started": (module.subprocess, "Popen", full),
    "the database is locked at the claim": (Store, "transition", locked),
    "the database is locked at a look": (Store, "query", locked),
    "the disk is full at the end": (module.shutil, "copytree", full),
    "the run folder is not there": (module, "read_json_object", full),
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_between_two_states_is_tried_again(
    make: Callable[..., JobWorker], monkeypatch: pytest.MonkeyPatch, fault: str, times: int
) -> None:
    worker = make()
    worker.store.add(job(1))
    place, name, broken = FAULTS[fault]
    good, left = getattr(place, name), [times]

    def sometimes(*args: Any, **options: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            return broken()
        return good(*args, **options)

    monkeypatch.setattr(place, name, sometimes)
    (row,) = until_ended(worker, "ftjob-1")
    assert row.status == "succeeded" and row.tokens == 7 and left == [0]
    assert worker.engine.registry.names.keys() == {"ft:1"}
    assert worker.store.get(AdapterRow, "ft:1").bytes == 100
    folder = worker.settings.state_dir / "jobs" / "ftjob-1"
    assert (folder / "runs").read_text() == "once\n"
    assert not (folder / "run" / "checkpoint").exists()
    assert messages(worker.store, "ftjob-1")[-1] == "The job has successfully completed"
    assert messages(worker.store, "ftjob-1").count("The job has successfully completed") == 1


def test_a_fault_that_stays_fails_the_job_with_a_reason(
    make: Callable[..., JobWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make()
    worker.store.add(job(1), job(2))
    good = module.write_json
    monkeypatch.setattr(
        module, "write_json", lambda path, v: full() if "ftjob-1" in str(path) else good(path, v)
    )
    first, second = until_ended(worker, "ftjob-1", "ftjob-2")
    assert first.status == "failed" and "could not start" in first.error["message"]
    assert second.status == "succeeded"
    assert not worker._running and not worker._retry_at


def test_an_adapter_that_cannot_be_served_is_the_jobs_own_end(
    make: Callable[..., JobWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make()
    worker.store.add(job(1))

    def broken(*_: Any) -> None:
        raise AdapterError("not finite")

    monkeypatch.setattr(worker.engine.registry, "add", broken)
    (row,) = until_ended(worker, "ftjob-1")
    assert row.status == "failed" and "not finite" in row.error["message"]


@pytest.mark.slow
def test_keys_take_turns(make: Callable[..., JobWorker]) -> None:
    worker = make()
    worker.store.add(*(job(n, "flood") for n in range(6)), job(6, "quiet"), job(7, "quiet"))
    order: list[str] = []
    begin = worker._begin

    def note(one: JobRow) -> None:
        order.append(one.owner)
        begin(one)

    worker._begin = note  # type: ignore[method-assign]
    clock = iter(range(10**6, 10**7))
    module.now, kept = lambda: next(clock), module.now
    try:
        until_ended(worker, *(f"ftjob-{n}" for n in range(8)))
    finally:
        module.now = kept
    assert order[:4].count("quiet") == 2


def test_two_servers_train_each_job_once(make: Callable[..., JobWorker]) -> None:
    """A lease that is renewed is respected, one that has ended is not."""
    one, two = make("one"), make("two")
    one.store.add(
        job(1, status="running", server=two.server_id, lease=now() + 60),
        job(2, status="running", server="gone", lease=now() - 1),
        job(3, status="running"),  # of a version without leases
        job(4, status="running", server=one.server_id, lease=now() + 60),  # killed a moment ago
    )
    one._take_back_lost()
    status = {row.id[-1]: row.status for row in one.store.query(JobRow)}
    assert status == {"1": "running", "2": "queued", "3": "queued", "4": "queued"}

    def have_ended() -> bool:
        for worker in (one, two):
            worker._check_jobs()
        return all(row.finished for row in one.store.query(JobRow))

    until(have_ended)
    ran = [
        (worker.settings.state_dir / "jobs" / f"ftjob-{n}" / "runs").is_file()
        for n in range(1, 5)
        for worker in (one, two)
    ]
    assert sum(ran) == 4
    assert {row.status for row in one.store.query(JobRow)} == {"succeeded"}


def test_a_job_has_a_time_and_loses_its_place_where_it_is_taken(
    make: Callable[..., JobWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make(job_max_hours=1e-5)
    monkeypatch.setattr(module.subprocess, "Popen", lambda command, **o: _sleeper(o))
    worker.store.add(job(1))
    (row,) = until_ended(worker, "ftjob-1")
    assert row.status == "failed" and "longer than" in row.error["message"]
    lasting = make(job_max_hours=1.0)
    lasting.store.add(job(2))
    lasting._check_jobs()
    process = lasting._running["ftjob-2"].process
    lasting.store.transition("ftjob-2", ("running",), server="another")
    lasting._check_jobs()
    assert not lasting._running and process.poll() is not None


def _sleeper(options: dict[str, Any]) -> Any:
    options.pop("pass_fds", None)
    return POPEN([sys.executable, "-c", "import os; os.read(0, 1)"], **options)


POPEN = subprocess.Popen


@pytest.mark.parametrize(
    "values",
    [
        {"max_steps": 10**12},
        {"rank": 10**9},
        {"alpha": float("nan")},
        {"rank_pattern": {"q": 10**6}},
        {"target_modules": "(a+)+" * 2000},
        {"target_modules": ["a"] * 5000},
        {"grpo": {"num_generations": 10**6}},
    ],
)
def test_settings_of_jobs_have_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(APIError) as caught:
        check_job_limits(values)
    assert caught.value.status_code == 400 and str(caught.value.param).startswith("afina.")


def test_each_number_of_a_job_has_a_bound() -> None:
    """A new setting for jobs needs an upper bound: its own, or one of the table."""
    groups = [(TrainSettings, name) for name in job_settings(TrainSettings)]
    groups += [(kind, n) for _, kind in settings_groups.items() for n in job_settings(kind)]
    for kind, name in groups:
        field = kind.model_fields[name]
        is_number = any(word in str(field.annotation) for word in ("int", "float"))
        has_own = any(hasattr(bound, "le") or hasattr(bound, "lt") for bound in field.metadata)
        assert not is_number or has_own or name in JOB_LIMITS, name


def test_reading_takes_no_lock(make: Callable[..., JobWorker]) -> None:
    store = make().store
    store.add(job(1))
    with store.write() as session:  # another writer would wait for 30 s
        session.add(JobEvent(job="ftjob-1", level="info", message="x", data={}))
        session.flush()
        begin = time.monotonic()
        assert store.get(JobRow, "ftjob-1") is not None and store.num_unfinished("ann") == 1
        assert time.monotonic() - begin < 25
    assert store.stored_bytes("ann") == 0 and store.latest_starts() == {"ann": 0}


def test_a_change_and_its_event_are_one(make: Callable[..., JobWorker]) -> None:
    store = make().store
    store.add(job(1))
    wrong = JobEvent(job="nobody", level="info", message="x", data={})  # no such job
    with pytest.raises(Exception, match="FOREIGN KEY"):
        store.transition("ftjob-1", ("queued",), wrong, status="running")
    assert store.get(JobRow, "ftjob-1").status == "queued"
