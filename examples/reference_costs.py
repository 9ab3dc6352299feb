"""What a gradient costs: forward against reverse mode, and checkpoints against keeping everything.

    python examples/reference_costs.py

The first table measures the gradient of one function of n numbers by n passes of forward mode and
by one of reverse mode. The second measures, for a chain of n steps, the most arrays that are alive
at a time.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads would only add noise

import numpy as np

import gradwatch_reference as gw

Function = Callable[[Any], Any]


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The median time of a run."""
    taken: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def forward_gradient(fn: Function, x: np.ndarray) -> np.ndarray:
    """The gradient by n passes, one for each input."""
    return np.array([gw.jvp(fn, x, direction)[1] for direction in np.eye(x.size)])


def cost_of_modes(sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)) -> list[tuple[int, ...]]:
    """Rows of (inputs, microseconds of one evaluation, of forward mode, of reverse mode)."""
    weights = np.random.default_rng(0).normal(size=(64, max(sizes)))
    rows: list[tuple[int, ...]] = []
    for n in sizes:
        matrix, x = weights[:, :n].copy(), np.linspace(-1.0, 1.0, n)

        def fn(x: Any, matrix: np.ndarray = matrix) -> Any:
            return (gw.tanh(gw.matmul(matrix, x)) ** 2).sum()

        times = (
            seconds(lambda fn=fn, x=x: fn(x)),
            seconds(lambda fn=fn, x=x: forward_gradient(fn, x), 3),
            seconds(lambda fn=fn, x=x: gw.grad(fn)(x)),
        )
        rows.append((n, *(round(1e6 * t) for t in times)))
    return rows


def chain(x: Any, steps: int) -> Any:
    for _ in range(steps):
        x = gw.sin(x)
    return x


def checkpointed_chain(x: Any, steps: int) -> Any:
    """The same chain, in sqrt(steps) pieces of which only the ends are kept."""
    pieces = round(steps**0.5)

    def steps_of_one(x: Any) -> Any:
        return chain(x, steps // pieces)

    piece = gw.checkpoint(steps_of_one)
    for _ in range(pieces):
        x = piece(x)
    return x


def live_arrays(fn: Function, size: int = 20_000) -> float:
    """The most memory that the gradient of `fn` holds at a time, in units of one array."""

    def total(x: Any) -> Any:
        return fn(x).sum()

    x, gradient = np.linspace(0.1, 1.0, size), gw.grad(total)
    gradient(x)
    tracemalloc.start()
    gradient(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / x.nbytes


def cost_of_memory(
    lengths: tuple[int, ...] = (16, 64, 256, 1024),
) -> list[tuple[int, float, float]]:
    """Rows of (steps, arrays alive when everything is kept, with sqrt(steps) checkpoints)."""
    return [
        (
            n,
            live_arrays(lambda x, n=n: chain(x, n)),
            live_arrays(lambda x, n=n: checkpointed_chain(x, n)),
        )
        for n in lengths
    ]


def main() -> None:
    print("| inputs n | one evaluation | forward: n passes | reverse: 1 pass | forward / reverse |")
    print("|---:|---:|---:|---:|---:|")
    for n, once, forward, reverse in cost_of_modes():
        ratio = forward / reverse
        print(f"| {n} | {once:,} us | {forward:,} us | {reverse:,} us | {ratio:.1f} |")
    print()
    print("| steps n | arrays alive, all kept | with sqrt(n) checkpoints | sqrt(n) |")
    print("|---:|---:|---:|---:|")
    for n, kept, checkpointed in cost_of_memory():
        print(f"| {n} | {kept:.0f} | {checkpointed:.0f} | {n**0.5:.0f} |")


if __name__ == "__main__":
    main()
