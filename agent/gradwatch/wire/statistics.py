"""The table of statistics: what is measured of a layer, and how measurements of it merge.

Whatever shows, stores or merges a statistic is driven by this table, so a new statistic is one
row here and one formula in the agent.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Merge(Enum):
    """How the parts of one layer that different ranks hold become the value of the whole layer."""

    ROOT_SUM_SQUARES = "root of the sum of squares"
    MAX = "largest"
    SUM = "sum"
    MEAN = "mean weighted by the number of elements"
    COMPARE = "not at all: the ranks' values are compared, and their distance is a statistic"
    DEVIATION = "standard deviation of all elements, from the norm and deviation of each part"


class Statistic(NamedTuple):
    """One measurement of one layer's gradient (or weight) at one step."""

    name: str
    label: str
    unit: str
    merge: Merge
    help: str


STATISTICS: tuple[Statistic, ...] = (
    Statistic("norm", "gradient norm", "", Merge.ROOT_SUM_SQUARES, "L2 norm of the gradient"),
    Statistic("mean_abs", "mean |g|", "", Merge.MEAN, "L1 norm divided by the element count"),
    Statistic("absmax", "max |g|", "", Merge.MAX, "largest absolute element"),
    Statistic("std", "std of g", "", Merge.DEVIATION, "standard deviation of the elements"),
    Statistic(
        "zero_fraction", "zeros", "1", Merge.MEAN, "share of sampled elements that are exactly 0"
    ),
    Statistic("nonfinite", "NaN or Inf", "elements", Merge.SUM, "count of NaN and Inf elements"),
    Statistic(
        "dead_fraction",
        "dead units",
        "1",
        Merge.MEAN,
        "share of output units whose gradient was exactly 0 on each of the last detail frames",
    ),
    Statistic("weight_norm", "weight norm", "", Merge.ROOT_SUM_SQUARES, "L2 norm of the weights"),
    Statistic(
        "update_ratio",
        "update / weight",
        "1",
        Merge.MEAN,
        "change of sampled weights since the last detail frame, a step, relative to their norm",
    ),
    Statistic(
        "weight_spread",
        "weight spread",
        "1",
        Merge.MEAN,
        "standard deviation of sampled weights / their root mean square; 0 when all are equal",
    ),
    Statistic(
        "saturated_fraction",
        "saturated outputs",
        "1",
        Merge.MEAN,
        "share of sampled outputs at its flat ends, of the activation that the weight feeds",
    ),
    Statistic(
        "weight_probe",
        "weights as compared",
        "",
        Merge.COMPARE,
        "of one rank: a number of its sampled weights that replicas share",
    ),
    Statistic(
        "weight_drift",
        "distance between ranks",
        "1",
        Merge.MAX,
        "of all ranks: largest distance of sampled weights between two that hold the whole layer / "
        "their norm",
    ),
    Statistic(
        "norm_spread",
        "disagreement of ranks",
        "1",
        Merge.MAX,
        "of all ranks: difference of gradient norms between those that hold the whole layer / the "
        "largest",
    ),
)

BY_NAME: dict[str, Statistic] = {statistic.name: statistic for statistic in STATISTICS}
