"""The migrations make what the models say, on both databases, and can be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.orm import Session
from synthetic_runs import OPTIMIZER, dense, healthy, manifest, new_run

from gradwatch.wire.codec import encode_batch, encode_record
from gradwatch.wire.frame import Frame, RunInfo
from gradwatch_server.arrivals import arrive
from gradwatch_server.database import migrate, open_database, writing
from gradwatch_server.ingest import store
from gradwatch_server.models import Base
from gradwatch_server.queries import Span, find_optimizer, heatmap


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
    migrate(engine)
    migrate(engine, "base")
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    migrate(engine)
    assert "frames" in inspect(engine).get_table_names()


def fill_first_tables(engine, run: RunInfo, frames: Sequence[Frame]) -> None:
    """A run as the tables of revision 0001 held it: frames as they were sent."""
    sent = manifest(dense(4))
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO runs (id, key, project, info, status, reason, created_at, dropped,"
                " loss_nonfinite, changed, judged, leased_until)"
                " VALUES (1, :key, 'tests', :info, 'running', '', 1.0, '{}', false, 1, 0, 0.0)"
            ),
            {"key": run.id, "info": msgspec.json.encode(run)},
        )
        connection.execute(
            text(
                "INSERT INTO optimizers (id, run_id, name, layers, frames, nonfinite_frames,"
                " first_step, last_step) VALUES (1, 1, :name, 4, :frames, 0, 0, :last)"
            ),
            {"name": OPTIMIZER, "frames": len(frames), "last": frames[-1].step},
        )
        connection.execute(
            text(
                "INSERT INTO manifests (optimizer_id, rank, version, layers, body)"
                " VALUES (1, 0, 1, 4, :body)"
            ),
            {"body": encode_record(sent)},
        )
        connection.execute(
            text(
                "INSERT INTO frames (optimizer_id, rank, step, holds, body)"
                " VALUES (1, 0, :step, 2, :body)"
            ),
            [{"step": item.step, "body": encode_record(item)} for item in frames],
        )


@pytest.mark.parametrize("ranks", [1, 2])
def test_from_the_first_release_with_data_they_lose_nothing_and_can_be_taken_back(engine, ranks):
    run, frames = new_run(world_size=ranks), healthy(range(1200))
    migrate(engine, "0001")
    fill_first_tables(engine, run, frames)
    migrate(engine)
    with Session(engine) as session:
        optimizer = find_optimizer(session, run.id, OPTIMIZER)
        shown = heatmap(session, optimizer, "norm", Span(None, None, 2000))
        assert shown.steps.tolist() == list(range(1200))
        expected = np.array([item.row("norm") for item in frames])
        assert np.array_equal(shown.high.T, expected)
    # What was stored before is known: the agent that sends it again is told so.
    with writing(engine) as session:
        again = arrive(encode_batch(frames[:10])).records
        receipt = store(session, run.id, again, []).receipt
        assert (receipt.stored, receipt.repeated) == (0, 10)

    migrate(engine, "0001")
    with engine.connect() as connection:
        bodies = connection.scalars(text("SELECT body FROM frames ORDER BY step")).all()
    assert [bytes(body) for body in bodies] == [encode_record(item) for item in frames]


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
