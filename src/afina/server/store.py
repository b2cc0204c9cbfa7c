"""The database: files, jobs, their events and checkpoints, adapters. SQLite, or PostgreSQL by URL.

A response is sent after its changes are on the disk: each `write` is one transaction, committed at
the end of the block; reading takes no lock of writers. The tables are created and changed by the
migrations in `migrations/`.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    JSON,
    BigInteger,
    Engine,
    ForeignKey,
    Index,
    Integer,
    create_engine,
    event,
    func,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from afina.errors import SettingsError

MIGRATIONS = Path(__file__).parent / "migrations"


def now() -> int:
    """Return the current Unix time in seconds, as in OpenAI's API."""
    return int(time.time())


class BaseRow(DeclarativeBase):
    """The base class of all tables."""

    type_annotation_map = {dict[str, Any]: JSON, int: BigInteger}


class FileRow(BaseRow):
    """An uploaded file; its bytes are in the state directory, files/ID."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str | None] = mapped_column(index=True)
    name: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]
    created: Mapped[int] = mapped_column(default=now)


class JobRow(BaseRow):
    """A fine-tuning job. `status`: queued, running, paused, succeeded, failed or cancelled.

    Attributes:
        server: the server that runs it, until the Unix time `lease`, unless it is renewed.
        started: when the present attempt began.
        attempt: attempts to begin its process since one has succeeded.
        idempotency_key: of the request that created it; the same request again creates no other.
    """

    __tablename__ = "jobs"
    __table_args__ = (Index("job_of_key", "owner", "idempotency_key", unique=True),)
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str | None] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(default="queued", index=True)
    request: Mapped[dict[str, Any]] = mapped_column("asked")  # body, settings
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    seed: Mapped[int]
    model: Mapped[str]  # the name under which its adapter will be served
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    tokens: Mapped[int | None]
    created: Mapped[int] = mapped_column(default=now)
    finished: Mapped[int | None]
    server: Mapped[str | None]
    lease: Mapped[int | None]
    started: Mapped[int | None]
    attempt: Mapped[int] = mapped_column(default=0, server_default="0")
    idempotency_key: Mapped[str | None]


class JobEvent(BaseRow):
    """An event of a job; events are ordered by `number`."""

    __tablename__ = "events"
    number: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True
    )
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    level: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]
    created: Mapped[int] = mapped_column(default=now)
    __table_args__ = (Index("events_of_job", "job", "number"),)


class JobCheckpoint(BaseRow):
    """The best adapter of a job up to `step`, served under `model`."""

    __tablename__ = "checkpoints"
    model: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    step: Mapped[int]
    metrics: Mapped[dict[str, Any]]
    created: Mapped[int] = mapped_column(default=now)


class AdapterRow(BaseRow):
    """The name under which an adapter is served, and its folder."""

    __tablename__ = "adapters"
    name: Mapped[str] = mapped_column(primary_key=True)
    folder: Mapped[str]
    owner: Mapped[str | None]
    created: Mapped[int] = mapped_column(default=now)
    bytes: Mapped[int] = mapped_column(default=0, server_default="0")  # in the state directory


class BatchRow(BaseRow):
    """A batch of requests.

    `status`: validating, in_progress, cancelling, completed, failed or cancelled.

    Attributes:
        admin: rights of its requests.
        details: metadata of its sender.
        errors: of lines that are not valid.
        total: number of requests; `completed` and `failed` count them once the batch has ended.
    """

    __tablename__ = "batches"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str | None] = mapped_column(index=True)
    admin: Mapped[bool]
    status: Mapped[str] = mapped_column(index=True)
    endpoint: Mapped[str]
    input_file: Mapped[str]
    output_file: Mapped[str | None]
    error_file: Mapped[str | None]
    details: Mapped[dict[str, Any]]
    errors: Mapped[list[Any]] = mapped_column(JSON, default=list)
    total: Mapped[int] = mapped_column(default=0)
    completed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    created: Mapped[int] = mapped_column(default=now)
    started: Mapped[int | None]
    finished: Mapped[int | None]


Row = TypeVar("Row", bound=BaseRow)


class Store:
    """The tables of one database URL. Thread-safe."""

    def __init__(self, url: str) -> None:
        """Connect and migrate the tables; raise `SettingsError` if the database cannot be used."""
        try:
            self.engine: Engine = create_engine(
                url.replace("postgresql://", "postgresql+psycopg://", 1), pool_pre_ping=True
            )
            if self.engine.dialect.name == "sqlite":
                event.listen(self.engine, "connect", _durable)
                event.listen(self.engine, "begin", _begin)
            self._reader = self.engine.execution_options(read_only=True)
            migrate(self.engine)
        except (SQLAlchemyError, ImportError) as error:
            hint = (
                "--database-url sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/NAME "
                "(pip install 'afina[postgres]')"
            )
            raise SettingsError(
                "cannot open the database", why=str(error).splitlines()[0], hint=hint
            ) from None

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session that is committed at the end of the block, or rolled back on an error."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session that only reads."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    def add(self, *rows: BaseRow) -> None:
        """Insert rows."""
        with self.write() as session:
            for row in rows:  # in this order: an event refers to its job
                session.add(row)
                session.flush()

    def get(self, table: type[Row], key: Any) -> Row | None:
        """Return a row by its primary key, or None; PostgreSQL has no keys that contain NUL."""
        with self.read() as session:
            return None if "\0" in str(key) else session.get(table, key)

    def query(
        self, table: type[Row], *where: Any, order: Sequence[Any] = (), limit: int | None = None
    ) -> list[Row]:
        """Return the rows that satisfy `where`."""
        with self.read() as session:
            return list(session.scalars(select(table).where(*where).order_by(*order).limit(limit)))

    def transition(
        self,
        job: str,
        of: tuple[str, ...],
        *rows: BaseRow,
        where: Sequence[Any] = (),
        **values: Any,
    ) -> bool:
        """Update a job if its status is one of `of`; return whether it was.

        Args:
            rows: what the change stands for, such as its event: inserted with it, or not at all.
            where: further conditions of the change.
        """
        conditions = (JobRow.id == job, JobRow.status.in_(of), *where)
        with self.write() as session:
            changed = session.execute(update(JobRow).where(*conditions).values(**values))
            if not changed.rowcount:  # type: ignore[attr-defined]
                return False
            for row in rows:
                session.merge(row) if isinstance(row, AdapterRow) else session.add(row)
            return True

    def latest_starts(self) -> dict[str | None, int]:
        """Return when the last job of each key was started."""
        with self.read() as session:
            latest = func.max(JobRow.started)
            rows = session.execute(select(JobRow.owner, latest).group_by(JobRow.owner)).all()
            return {owner: int(started or 0) for owner, started in rows}

    def num_unfinished(self, owner: str | None) -> int:
        """Return how many jobs of a key have not ended."""
        with self.read() as session:
            is_open = JobRow.status.in_(("queued", "running", "paused"))
            found = session.scalar(select(func.count()).where(JobRow.owner == owner, is_open))
            return int(found or 0)

    def stored_bytes(self, owner: str | None) -> int:
        """Return the size of a key's files, and of the adapters of its jobs."""
        with self.read() as session:
            tables = (FileRow, AdapterRow)
            sums = [select(func.sum(t.bytes)).where(t.owner == owner) for t in tables]
            return sum(int(session.scalar(one) or 0) for one in sums)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _begin(connection: Any) -> None:
    """Begin a transaction of SQLite: a writing one takes the lock at once, a reading one none."""
    is_reading = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN DEFERRED" if is_reading else "BEGIN IMMEDIATE")


def _durable(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions, not the driver
    for setting in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=30000",
    ):
        connection.execute(f"PRAGMA {setting}")


def migrate(engine: Engine) -> None:
    """Migrate the tables to the newest version."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
