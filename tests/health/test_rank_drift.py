"""Replicas that drift are told; layers that merely share a name, or are averaged, are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import ArrayLike

from gradwatch.health import rank_drift
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.judge import judge
from gradwatch.health.window import Window

from .windows import LayerFacts, mlp, window

REPLICATED = "(Replicate(),)"
SAME, NEVER = 0.0, np.nan
STEPS = list(range(1, 11)) + list(range(20, 101, 20))


def compared(
    distance: ArrayLike, spread: ArrayLike = 0.3, sharding: str = REPLICATED, **ranks: ArrayLike
) -> Window:
    """Four layers, compared at each step. distance: [steps] of the first two, the others equal."""
    layers: list[LayerFacts] = [replace(layer, sharding=sharding) for layer in mlp(2)]
    table = np.zeros((len(STEPS), len(layers)))
    table[:, :2] = np.asarray(distance, dtype=np.float64)[:, None]
    made = window(layers, np.full(4, 1e-2), STEPS, weight_drift=table, norm_spread=spread)
    scalars = {
        name: np.broadcast_to(np.asarray(values, dtype=np.float64), len(STEPS))
        for name, values in ranks.items()
    }
    return replace(made, scalars={**made.scalars, **scalars})


def since(row: int, distance: float) -> list[float]:
    return [SAME] * row + [distance] * (len(STEPS) - row)


def told(made: Window) -> Finding:
    finding = rank_drift.detect(made)
    assert finding is not None
    return finding


def test_layers_that_differ_are_named_from_the_first_comparison_that_shows_it():
    finding = told(compared(since(11, 0.02)))
    assert (finding.severity, finding.layers) == (Severity.CRITICAL, ("0.weight", "0.bias"))
    assert (finding.first_step, finding.last_step) == (40, 100)
    assert finding.evidence["equal last at step"] == 20
    assert finding.evidence["layers that differ"] == "2 of 4"
    assert "0.020 of their norm" in finding.summary


def test_a_large_distance_is_told_at_once_and_a_small_one_when_it_lasts():
    assert told(compared(since(14, 0.02))).first_step == 100
    assert rank_drift.detect(compared(since(14, 5e-5))) is None
    assert told(compared(since(13, 5e-5))).severity is Severity.WARNING
    assert rank_drift.detect(compared(since(1, 1e-6))) is None


def test_the_rank_is_named_where_comparisons_agree_on_it():
    finding = told(compared(since(5, 0.1), rank_apart=2, rank_moving=2))
    assert finding.evidence["rank that stands apart"] == 2
    assert "rank 2 alone updates some of them" in finding.summary
    still = told(compared(since(5, 0.1), rank_still=1))
    assert "rank 1 does not update some of them" in still.summary
    mixed = told(compared(since(5, 0.1), rank_apart=np.arange(len(STEPS)) % 3))
    assert "rank" not in mixed.summary.removeprefix("0.weight").split("since")[1]


def test_layers_that_never_were_equal_are_no_replicas():
    assert rank_drift.detect(compared(since(0, 1.3))) is None


def test_layers_of_one_name_and_start_with_gradients_of_their_own_are_no_replicas():
    """As stages of a pipeline, or an expert on each rank."""
    drifting = since(1, 0.1)
    assert rank_drift.detect(compared(drifting, spread=0.3, sharding="")) is None
    assert told(compared(drifting, spread=1e-6, sharding="")).first_step == 2
    # One rank without any gradient is the fault itself.
    assert told(compared(drifting, spread=1.0, sharding="")).first_step == 2


def test_what_is_averaged_again_and_again_is_information():
    """Local SGD means its ranks to drift for some steps."""
    returning = [SAME, 0.01, 0.02, SAME, 0.01, 0.02, SAME, *[0.01] * 8]
    assert told(compared(returning)).severity is Severity.INFO
    assert rank_drift.detect(compared([0.0, 0.01, 0.02, *[SAME] * 12])) is None


def test_ranks_that_were_never_compared_say_nothing():
    assert rank_drift.detect(compared([NEVER] * len(STEPS))) is None
    assert rank_drift.detect(window(mlp(2), np.full(4, 1e-2))) is None


@pytest.mark.parametrize("kind", ["rank_drift"])
def test_it_is_told_beside_nothing_else(kind: str):
    assert [finding.kind for finding in judge(compared(since(5, 0.1)))] == [kind]
