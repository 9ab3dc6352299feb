"""Metrics as libraries hand them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float | Tensor]:
    """The metrics that are one number each; texts, tables and empty ones are left out."""
    return {
        name: value
        for name, value in metrics.items()
        if (isinstance(value, int | float) and not isinstance(value, bool))
        or (isinstance(value, Tensor) and value.numel() == 1)
    }
