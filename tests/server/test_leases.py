"""One holder at a time, and no tick twice, whatever the processes believe of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, update

from gradwatch_server.database import migrate, open_database, writing
from gradwatch_server.leases import claim_tick, give_back, holder_of, take
from gradwatch_server.models import Lease, Tick


@pytest.fixture
def engine(database_url: str) -> Generator[Engine]:
    made = open_database(database_url)
    migrate(made)
    yield made
    made.dispose()


@pytest.fixture
def pass_time(engine: Engine) -> Callable[[float], None]:
    """Moves all that is kept into the past."""

    def run(seconds: float) -> None:
        with writing(engine) as session:
            session.execute(update(Lease).values(until=Lease.until - seconds))
            session.execute(update(Tick).values(at=Tick.at - seconds))

    return run


def test_a_lease_has_one_holder_who_may_renew_it(engine):
    assert take(engine, "beat", "a", 10)
    assert not take(engine, "beat", "b", 10)
    assert take(engine, "beat", "a", 10)
    assert take(engine, "another", "b", 10)
    assert holder_of(engine, "beat") == "a"


def test_a_lease_that_is_not_renewed_goes_to_the_next(engine, pass_time):
    take(engine, "beat", "a", 10)
    pass_time(9)
    assert not take(engine, "beat", "b", 10)
    pass_time(2)
    assert holder_of(engine, "beat") is None
    assert take(engine, "beat", "b", 10)
    assert not take(engine, "beat", "a", 10)


def test_a_lease_given_back_is_free_and_nobody_gives_back_anothers(engine):
    take(engine, "beat", "a", 10)
    give_back(engine, "beat", "b")
    assert holder_of(engine, "beat") == "a"
    give_back(engine, "beat", "a")
    assert take(engine, "beat", "b", 10)


def test_of_many_that_come_at_once_one_gets_it(engine):
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda name: take(engine, "beat", str(name), 10), range(8)))
    assert sum(got) == 1


def test_ticks_are_numbered_and_each_task_counts_its_own(engine, pass_time):
    take(engine, "beat", "a", 1000)
    numbers: list[Any] = []
    for _ in range(3):
        numbers.append(claim_tick(engine, "beat", "a", "judge", 2))
        pass_time(2)
    assert numbers == [1, 2, 3]
    assert claim_tick(engine, "beat", "a", "deliver", 2) == 1


def test_a_tick_too_soon_after_the_last_is_no_tick(engine, pass_time):
    take(engine, "beat", "a", 1000)
    assert claim_tick(engine, "beat", "a", "judge", 60) == 1
    pass_time(20)
    assert claim_tick(engine, "beat", "a", "judge", 60) is None
    pass_time(20)
    assert claim_tick(engine, "beat", "a", "judge", 60) == 2


def test_who_lost_the_lease_or_never_had_it_claims_nothing(engine, pass_time):
    assert claim_tick(engine, "beat", "a", "judge", 2) is None
    take(engine, "beat", "a", 10)
    pass_time(11)
    assert claim_tick(engine, "beat", "a", "judge", 2) is None
    take(engine, "beat", "b", 10)
    assert claim_tick(engine, "beat", "a", "judge", 2) is None
    assert claim_tick(engine, "beat", "b", "judge", 2) == 1


def test_a_clock_that_was_set_back_does_not_stop_the_ticks(engine, pass_time):
    take(engine, "beat", "a", 1000)
    claim_tick(engine, "beat", "a", "judge", 2)
    pass_time(-100)
    assert claim_tick(engine, "beat", "a", "judge", 2) == 2


def test_of_many_claims_at_once_each_number_is_given_once(engine):
    take(engine, "beat", "a", 1000)
    with ThreadPoolExecutor(8) as pool:
        claims = pool.map(lambda _: claim_tick(engine, "beat", "a", "judge", 0.0), range(40))
    given = Counter(number for number in claims if number is not None)
    assert given == Counter(range(1, 41))
