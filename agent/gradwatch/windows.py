"""From frames to the arrays that detectors judge and pictures show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.window import Window
from gradwatch.wire.frame import Frame, LayerInfo, Manifest
from gradwatch.wire.statistics import BY_NAME

# What a judgement looks at: the run's beginning, which says where it came from, and the present:
# some minutes of a quick job, with dozens of detail frames.
BEGINNING_FRAMES = 32
WINDOW_FRAMES = 512


class Layout:
    """The layers of an optimizer through the versions of its manifest.

    Columns are those of the newest version; a frame of an older one is placed by layer name.
    """

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self.layers: list[LayerInfo] = manifests[-1].layers if manifests else []
        place = {layer.name: index for index, layer in enumerate(self.layers)}
        self._columns: dict[int, NDArray[np.int64]] = {}
        for manifest in manifests:
            columns = [place.get(layer.name, -1) for layer in manifest.layers]
            self._columns[manifest.version] = np.array(columns, dtype=np.int64)

    def spread(self, frame: Frame, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """One statistic of a frame over today's layers, NaN for those it did not know."""
        columns = self._columns[frame.manifest]
        known = columns >= 0
        spread = np.full(len(self.layers), np.nan, dtype=np.float32)
        spread[columns[known]] = row[known]
        return spread

    def column(self, version: int, place: int) -> int | None:
        """Where frames of a manifest's version have the layer at `place`, None for nowhere."""
        found = np.flatnonzero(self._columns[version] == place)
        return int(found[0]) if len(found) else None

    def by_depth(self) -> NDArray[np.int64]:
        """Places of the layers, the input's first."""
        return np.argsort([layer.depth for layer in self.layers], kind="stable")


def tells(frame: Frame) -> bool:
    """Whether detectors learn more from a frame than its loss."""
    return bool(frame.columns or frame.events)


def window_of(layout: Layout, frames: Iterable[Frame]) -> Window:
    """Frames in ascending order of step, as the arrays that detectors take."""
    listed = list(frames)
    statistics: dict[str, NDArray[np.float32]] = {}
    for name in BY_NAME:
        if any(name in frame.columns for frame in listed):
            statistics[name] = statistic_rows(layout, listed, name)
    names = sorted({name for frame in listed for name in frame.scalars})
    missing = float("nan")
    return Window(
        steps=np.array([frame.step for frame in listed], dtype=np.int64),
        layers=layout.layers,
        statistics=statistics,
        scalars={
            name: np.array([frame.scalars.get(name, missing) for frame in listed]) for name in names
        },
        reported={
            name: np.array([name in frame.scalars for frame in listed], dtype=np.bool_)
            for name in names
        },
        measured=np.array([bool(frame.columns) for frame in listed], dtype=np.bool_),
    )


def statistic_rows(layout: Layout, frames: Sequence[Frame], name: str) -> NDArray[np.float32]:
    """One statistic of many frames. float32[frames, layers], NaN where not measured."""
    rows = np.full((len(frames), len(layout.layers)), np.nan, dtype=np.float32)
    for index, frame in enumerate(frames):
        row = frame.row(name)
        if row is not None:
            rows[index] = layout.spread(frame, row)
    return rows
