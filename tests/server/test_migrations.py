"""The migrations make what the models say, on both databases, and can be taken back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

import gradwatch_server
from gradwatch_server.database import migrate, open_database
from gradwatch_server.models import Base


@pytest.fixture
def engine(database_url):
    found = open_database(database_url)
    yield found
    found.dispose()


def test_from_an_empty_database_they_make_what_the_models_say(engine):
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    assert set(inspect(engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_running_them_again_changes_nothing(engine):
    migrate(engine)
    migrate(engine)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM alembic_version")) == 1


def test_they_go_down_to_nothing_and_up_again(engine):
    config = Config()
    folder = Path(gradwatch_server.__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder))
    migrate(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    migrate(engine)
    assert "frames" in inspect(engine).get_table_names()


def test_collectors_that_start_together_make_the_tables_once(database_url):
    engines = [open_database(database_url) for _ in range(4)]
    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(migrate, engines))
    assert "frames" in inspect(engines[0]).get_table_names()
    for engine in engines:
        engine.dispose()


def test_a_plain_postgresql_url_takes_the_driver_that_we_bring():
    engine = open_database("postgresql://user@127.0.0.1:9/none")
    assert engine.dialect.driver == "psycopg"
