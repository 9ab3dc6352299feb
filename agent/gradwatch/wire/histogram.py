"""Histograms over signed powers of two: one bucket an octave, so that they add up exactly.

Buckets from left to right: negative overflow, negative octaves from large to small, negative
underflow, zero, positive underflow, positive octaves from small to large, positive overflow; and
last the non-finite values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MIN_EXPONENT = -40  # |g| below 2**-40 (9e-13) is counted as underflow
MAX_EXPONENT = 16  # |g| of 2**16 (65,536) and above is counted as overflow
OCTAVES = MAX_EXPONENT - MIN_EXPONENT
SIDE = OCTAVES + 2  # underflow, octaves, overflow
BUCKETS = 2 * SIDE + 2  # both signs, zero, non-finite
ZERO = SIDE
NONFINITE = BUCKETS - 1


def bucket_of(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bucket of each value. values: float32[...]; returns int64[...] in 0..BUCKETS-1."""
    _, exponent = np.frexp(values)
    # frexp gives 0.5 <= |m| < 1, so 2**k <= |x| < 2**(k+1) has exponent k + 1.
    octave = np.clip(exponent.astype(np.int64) - 1 - MIN_EXPONENT, -1, OCTAVES) + 1
    bucket = np.where(values < 0, ZERO - 1 - octave, ZERO + 1 + octave)
    bucket = np.where(values == 0, ZERO, bucket)
    return np.where(np.isfinite(values), bucket, NONFINITE)


def histogram(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Counts of up to 65,535 values. values: float32[n]; returns uint16[BUCKETS]."""
    return np.bincount(bucket_of(values).ravel(), minlength=BUCKETS).astype(np.uint16)


def edges() -> NDArray[np.float64]:
    """Lower edge of each finite bucket, left to right, -inf first. float64[BUCKETS - 1]."""
    powers = 2.0 ** np.arange(MIN_EXPONENT, MAX_EXPONENT + 1, dtype=np.float64)
    return np.concatenate([[-np.inf], -powers[::-1], [0.0, 0.0], powers])
