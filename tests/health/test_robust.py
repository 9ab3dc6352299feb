from __future__ import annotations

import warnings

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from gradwatch.health.robust import held, largest, median, middle, onset, root_sum_squares

tables = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8),
    elements=st.one_of(st.just(np.nan), st.floats(-1e6, 1e6)),
)

floats = st.floats(allow_nan=False, allow_infinity=True)
numbers = st.one_of(st.just(np.nan), st.floats(width=32))


@given(tables)
def test_median_and_largest_leave_nan_out(values: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's own warn of empty slices
        np.testing.assert_allclose(median(values), np.nanmedian(values, axis=0))
        np.testing.assert_allclose(largest(values), np.nanmax(values, axis=1))


@given(arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 4)), elements=numbers))
def test_a_median_of_small_floats_is_that_of_large_ones(values: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        wide = median(values.astype(np.float64))
        np.testing.assert_array_equal(median(values), wide)
    assert median(values).dtype == np.float64


@given(arrays(np.float64, st.integers(0, 9), elements=st.one_of(st.just(np.nan), floats)))
def test_a_row_has_the_median_that_numpy_tells(values: np.ndarray) -> None:
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(middle(values), float(np.median(values)))


def test_nothing_has_neither_median_nor_largest() -> None:
    assert np.isnan(median(np.zeros((0, 3)))).all()
    assert np.isnan(largest(np.zeros((3, 0)))).all()


def test_held_values_last_until_the_next_one_and_reach_back_to_the_start() -> None:
    column = np.array([[np.nan, 5], [1, np.nan], [np.nan] * 2, [2, np.nan], [np.nan] * 2])
    known = held(column.astype(np.float32))
    assert known.values[known.row].tolist() == [[1, 5], [1, 5], [1, 5], [2, 5], [2, 5]]
    nothing = held(np.full((3, 1), np.nan, dtype=np.float32))
    assert np.isnan(nothing.values[nothing.row]).all()


@given(tables)
def test_a_norm_leaves_nan_out(values: np.ndarray) -> None:
    expected = np.sqrt(np.nansum(values**2, axis=1))
    np.testing.assert_allclose(root_sum_squares(values), expected)


def test_onset_is_where_most_of_the_rest_is_set() -> None:
    assert onset(np.array([0, 1, 0, 0, 1, 1], dtype=bool), 1.0) == 4
    assert onset(np.array([1, 0, 1, 1, 1, 1], dtype=bool), 0.8) == 0
    assert onset(np.array([1, 1, 0], dtype=bool), 1.0) is None
    assert onset(np.zeros(0, dtype=bool), 0.5) is None
