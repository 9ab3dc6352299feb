import pytest

from gradwatch.wire.statistics import BY_NAME, STATISTICS, Statistic


def test_names_are_unique_and_the_index_finds_each() -> None:
    assert len(BY_NAME) == len(STATISTICS)
    for name, statistic in BY_NAME.items():
        assert statistic.name == name


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda statistic: statistic.name)
def test_every_statistic_says_what_it_is(statistic: Statistic) -> None:
    assert statistic.label
    assert statistic.help
