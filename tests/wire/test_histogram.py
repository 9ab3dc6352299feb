"""Histograms over signed powers of two: exact at every edge, and they add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from gradwatch.wire.histogram import (
    BUCKETS,
    MAX_EXPONENT,
    MIN_EXPONENT,
    NONFINITE,
    SIDE,
    ZERO,
    bucket_of,
    edges,
    histogram,
)

UNDERFLOW = ZERO + 1
OVERFLOW = ZERO + SIDE
samples = hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(width=32))


def bucket(value: float) -> int:
    return int(bucket_of(np.array([value], dtype=np.float32))[0])


@given(samples)
def test_every_value_is_counted_exactly_once(values: NDArray[np.float32]) -> None:
    assert histogram(values).sum() == values.size


@given(samples, samples)
def test_histograms_of_two_parts_add_up_to_the_histogram_of_the_whole(
    left: NDArray[np.float32], right: NDArray[np.float32]
) -> None:
    whole = histogram(np.concatenate([left, right]))
    assert np.array_equal(histogram(left) + histogram(right), whole)


@given(samples)
def test_a_mirrored_sample_has_the_mirrored_histogram(values: NDArray[np.float32]) -> None:
    counts = histogram(values)
    assert np.array_equal(histogram(-values)[: 2 * SIDE + 1], counts[: 2 * SIDE + 1][::-1])


@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda v: v > 0))
def test_a_finite_value_lies_between_its_buckets_edges(value: float) -> None:
    lower = edges()
    place = bucket(value)
    assert lower[place] <= value
    assert place + 1 == len(lower) or value < lower[place + 1]


@pytest.mark.parametrize("exponent", range(MIN_EXPONENT, MAX_EXPONENT))
def test_a_power_of_two_opens_its_octave_and_the_value_below_it_closes_the_one_before(
    exponent: int,
) -> None:
    power = np.float32(2.0**exponent)
    here = bucket(float(power))
    assert here == ZERO + 2 + exponent - MIN_EXPONENT
    assert bucket(float(np.nextafter(power, np.float32(0)))) == here - 1
    assert bucket(float(-power)) == 2 * ZERO - here


def test_zero_of_either_sign_has_a_bucket_of_its_own() -> None:
    assert bucket(0.0) == bucket(-0.0) == ZERO


def test_denormals_are_underflow_not_zero() -> None:
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    assert bucket(smallest) == UNDERFLOW
    assert bucket(-smallest) == ZERO - 1


def test_what_is_too_large_is_overflow_up_to_the_largest_float() -> None:
    assert bucket(2.0**MAX_EXPONENT) == OVERFLOW
    assert bucket(float(np.finfo(np.float32).max)) == OVERFLOW
    assert bucket(-float(np.finfo(np.float32).max)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_counted_apart(value: float) -> None:
    assert bucket(value) == NONFINITE == BUCKETS - 1


def test_there_is_one_edge_a_finite_bucket_in_rising_order() -> None:
    assert len(edges()) == BUCKETS - 1
    assert np.all(np.diff(edges()) >= 0)
