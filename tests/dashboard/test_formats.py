import math

import pytest

from gradwatch_dashboard.formats import age, code, count, elide, literal, number, power_of_ten


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (0, "0"),
        (0.0, "0"),
        (math.nan, "NaN"),
        (math.inf, "Inf"),
        (-math.inf, "-Inf"),
        (12345, "12,345"),
        (3.0, "3"),
        (0.23144, "0.231"),
        (0.12, "0.12"),
        (17360.4, "17,360"),
        (99.96, "100"),
        (-0.5, "-0.5"),
        (8.6e-9, "8.6 \N{MULTIPLICATION SIGN} 10⁻⁹"),
        (1.2345e12, "1.23 \N{MULTIPLICATION SIGN} 10¹²"),
        (5e-324, "4.94 \N{MULTIPLICATION SIGN} 10⁻³²⁴"),
    ],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "now"),
        (2, "now"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (7200, "2 h ago"),
        (3 * 86400, "3 days ago"),
    ],
)
def test_ages_are_told_in_their_largest_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_long_names_lose_their_middle_and_keep_their_end() -> None:
    name = "model.encoder.layers.11.attention.output.dense.weight"
    short = elide(name, 30)
    assert len(short) == 30
    start, end = short.split("…")
    assert name.startswith(start)
    assert name.endswith(end)
    assert len(end) > len(start)
    assert elide("short", 5) == "short"


def test_exponents_are_superscripts() -> None:
    assert power_of_ten(-12) == "10⁻¹²"


def test_one_is_singular() -> None:
    assert (count(1, "run"), count(0, "run"), count(1200, "run")) == (
        "1 run",
        "0 runs",
        "1,200 runs",
    )


def test_a_name_cannot_bring_markup_of_its_own() -> None:
    assert literal(":red[x] **b** $y$") == r"\:red\[x\] \*\*b\*\* \$y\$"
    assert code("a`b") == "`` a'b ``"
