"""Engines: SQLite in WAL mode by default, PostgreSQL in production, one set of migrations."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

# How long a writer waits for another process's transaction on SQLite.
BUSY_TIMEOUT_S = 30


def open_database(url: str) -> Engine:
    """An engine for `url`; makes the folder of an SQLite file."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def migrate(engine: Engine) -> None:
    """Bring the tables up to date; safe to call at every start."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def insert_new(session: Session, model: type[Any]) -> Any:
    """An INSERT into a model's table that leaves rows alone that are there already."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    return dialect.insert(model.__table__).on_conflict_do_nothing()


@contextmanager
def writing(engine: Engine) -> Generator[Session]:
    """A transaction that writes, committed at the end of the block."""
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        yield session


def finite(value: float | None) -> float | None:
    """A number for a column or for JSON: None stands for what is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not begin transactions by itself: see _begin_sqlite.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # An acknowledged frame must survive a power cut: WAL alone syncs only at checkpoints.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    # Readers begin deferred and never block; a writer asks for the lock at once, since upgrading
    # a read transaction fails instead of waiting when another process wrote meanwhile.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
