import pytest

from gradwatch.health.finding import Severity
from gradwatch_dashboard.verdicts import SEVERITIES, STATES, STATUSES, VERDICTS, look

TABLES = [VERDICTS, STATUSES, STATES]


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2 of a #rrggbb colour."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("table", TABLES)
def test_words_and_signs_tell_looks_apart_without_colour(table: dict[str, object]) -> None:
    for part in ("word", "sign"):
        assert len({getattr(shown, part) for shown in table.values()}) == len(table)


def test_white_text_is_readable_on_every_colour() -> None:
    for table in TABLES:
        for shown in table.values():
            assert 1.05 / (luminance(shown.colour) + 0.05) >= 4.5, shown


def test_every_severity_of_a_detector_has_a_look_in_rising_order() -> None:
    assert list(SEVERITIES) == [severity.value for severity in Severity]


def test_a_verdict_of_a_newer_collector_is_shown_by_its_word() -> None:
    assert look(VERDICTS, "doubtful").word == "Doubtful"
