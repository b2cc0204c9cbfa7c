"""The database: files, jobs, their events and checkpoints, adapters. SQLite, or PostgreSQL by URL.

A response is sent after its changes are on the disk: each `write` is one transaction, committed at
the end of the block. The tables are created and changed by the migrations in `migrations/`.
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
    """A fine-tuning job. `status`: queued, running, paused, succeeded, failed or cancelled."""

    __tablename__ = "jobs"
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


Row = TypeVar("Row", bound=BaseRow)


class Store:
    """The tables of one database URL. Thread-safe."""

    def __init__(self, url: str) -> None:
        """Connect and migrate the tables; raise `SettingsError` where the database cannot be used."""
        try:
            self.engine: Engine = create_engine(
                url.replace("postgresql://", "postgresql+psycopg://", 1), pool_pre_ping=True
            )
            if self.engine.dialect.name == "sqlite":
                event.listen(self.engine, "connect", _durable)
                event.listen(
                    self.engine,
                    "begin",
                    lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"),
                )
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
        """Yield a session that is committed at the end of the block, and rolled back on an error."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def add(self, *rows: BaseRow) -> None:
        """Insert rows."""
        with self.write() as session:
            session.add_all(rows)

    def get(self, table: type[Row], key: Any) -> Row | None:
        """Return a row by its primary key, or None; PostgreSQL has no keys that contain NUL."""
        with self.write() as session:
            return None if "\0" in str(key) else session.get(table, key)

    def query(
        self, table: type[Row], *where: Any, order: Sequence[Any] = (), limit: int | None = None
    ) -> list[Row]:
        """Return the rows that satisfy `where`."""
        with self.write() as session:
            return list(session.scalars(select(table).where(*where).order_by(*order).limit(limit)))

    def transition(self, job: str, of: tuple[str, ...], **values: Any) -> bool:
        """Update a job if its status is one of `of`; return whether it was."""
        with self.write() as session:
            changed = session.execute(
                update(JobRow).where(JobRow.id == job, JobRow.status.in_(of)).values(**values)
            )
            return bool(changed.rowcount)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


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
