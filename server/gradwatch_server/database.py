"""Engines: SQLite in WAL mode by default, PostgreSQL in production, one set of migrations."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

# How long a writer waits for another process's transaction on SQLite.
BUSY_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5
# Any number will do, as long as every process of ours takes the same.
MIGRATION_LOCK = 7_263_541


def open_database(url: str) -> Engine:
    """An engine for `url`; makes the folder of an SQLite file."""
    parsed = make_url(url)
    if parsed.drivername == "postgresql":
        # SQLAlchemy 2.0 takes this for psycopg 2, which we do not bring.
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite":
        # A plan that was made for an empty table and kept would read all of a large one.
        arguments = {"connect_timeout": CONNECT_TIMEOUT_S, "prepare_threshold": None}
        engine = create_engine(parsed, pool_pre_ping=True, connect_args=arguments)
        if engine.dialect.driver == "psycopg":
            event.listen(engine, "before_cursor_execute", _ask_for_binary)
        return engine
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the tables up to date, or to a revision; safe to call at every start.

    A revision older than the tables' takes them back.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.execution_options(writes=True).connect() as connection:
        if connection.dialect.name == "sqlite":
            # A table that SQLite has to write anew would take along what refers to it. This is
            # obeyed outside of transactions alone.
            connection.connection.dbapi_connection.execute("PRAGMA foreign_keys=OFF")  # pyright: ignore
        try:
            with connection.begin():
                if connection.dialect.name == "postgresql":
                    # Of collectors that start together, one makes the tables, the others find them.
                    lock = text("SELECT pg_advisory_xact_lock(:key)")
                    connection.execute(lock, {"key": MIGRATION_LOCK})
                config.attributes["connection"] = connection
                known = MigrationContext.configure(connection).get_current_revision() or ""
                down = revision != "head" and (revision == "base" or known > revision)
                (command.downgrade if down else command.upgrade)(config, revision)
        finally:
            if connection.dialect.name == "sqlite":
                connection.connection.dbapi_connection.execute("PRAGMA foreign_keys=ON")  # pyright: ignore


def insert_new(session: Session, model: type[Any]) -> Any:
    """An INSERT into a model's table that leaves rows alone that are there already."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    return dialect.insert(model.__table__).on_conflict_do_nothing()


@contextmanager
def writing(engine: Engine) -> Generator[Session]:
    """A transaction that writes, committed at the end of the block."""
    options = engine.execution_options(writes=True, binary=True)
    with Session(options) as session, session.begin():
        yield session


@contextmanager
def reading(engine: Engine) -> Generator[Session]:
    """A transaction that sees one state of the database, however many queries it makes."""
    if engine.dialect.name == "postgresql":
        # SQLite's readers see one state by themselves.
        engine = engine.execution_options(isolation_level="REPEATABLE READ", binary=True)
    with Session(engine) as session:
        yield session


def finite(value: float | None) -> float | None:
    """A number for a column or for JSON: None stands for what is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _ask_for_binary(
    _connection: Any, cursor: Any, _statement: str, _values: Any, context: Any, _many: bool
) -> None:
    # Bodies of rows sent as text are twice as long, and take four times as long to read. Not for
    # all statements: SQLAlchemy reads the catalogue as text.
    cursor.format = int(context.execution_options.get("binary", False))  # pq.Format


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not begin transactions by itself: see _begin_sqlite.
    connection.isolation_level = None
    cursor = connection.cursor()
    # Obeyed by files without a table alone: what retention frees is given back in small pieces.
    cursor.execute("PRAGMA auto_vacuum=INCREMENTAL")
    _keep_a_log(cursor)
    # An acknowledged frame must survive a power cut: WAL alone syncs only at checkpoints.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _keep_a_log(cursor: Any) -> None:
    """Journal by a write-ahead log. Collectors that open a new file at once are in one another's
    way here, and SQLite's own waiting does not cover it."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Any) -> None:
    # Readers begin deferred and never block; a writer asks for the lock at once, since upgrading
    # a read transaction fails instead of waiting when another process wrote meanwhile.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
