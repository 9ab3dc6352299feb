"""Arrays that a graph uses but does not own.

What a graph saves must not change before the backward sweep reads it. Copying every argument would
be safe and, for the weights of a network, a fifth of the time of a step. So small arrays are
copied, large ones are borrowed: their bits are summed in blocks when they come in, and again when
they are read, which costs a twentieth of a copy into fresh memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_COPIED_BYTES = 1 << 15  # up to here a copy costs less than keeping watch
_BLOCKS = 64


def frozen(array: Array) -> Array:
    """`array` if nothing can write to it, else a read-only copy."""
    owner: Any = array if array.base is None else array.base
    if array.flags.writeable or not isinstance(owner, np.ndarray) or owner.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def borrow(array: Array) -> tuple[Array, bytes | None]:
    """A read-only array equal to `array`, and its fingerprint if others can still write to it."""
    contiguous = array.flags.c_contiguous or array.flags.f_contiguous
    if array.nbytes <= _COPIED_BYTES or not contiguous or array.itemsize not in (4, 8):
        return frozen(array), None
    view = array.view()
    view.flags.writeable = False
    return view, fingerprint(view)


def fingerprint(array: Array) -> bytes:
    """Sums of the bits of 64 blocks: any one change, and almost any other, changes them."""
    bits = array.reshape(-1, order="A").view(f"u{array.itemsize}")
    rest = bits.size % _BLOCKS
    sums = bits[rest:].reshape(_BLOCKS, -1).sum(axis=1, dtype=np.uint64)
    return sums.tobytes() + bits[:rest].tobytes()
