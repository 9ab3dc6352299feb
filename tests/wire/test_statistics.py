import pytest

from gradwatch.wire.statistics import COLUMN, STATISTICS, Statistic


def test_names_are_unique_and_the_column_index_finds_each() -> None:
    assert len(COLUMN) == len(STATISTICS)
    for name, index in COLUMN.items():
        assert STATISTICS[index].name == name


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda statistic: statistic.name)
def test_every_statistic_says_what_it_is(statistic: Statistic) -> None:
    assert statistic.label
    assert statistic.help
