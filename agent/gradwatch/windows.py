"""From frames to the arrays that detectors judge and pictures show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.window import Layers, Window
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
        # Of all its windows, which share what is found out of it.
        self.judged = Layers(self.layers)
        place = {layer.name: index for index, layer in enumerate(self.layers)}
        self._columns: dict[int, NDArray[np.int64]] = {}
        for manifest in manifests:
            columns = [place.get(layer.name, -1) for layer in manifest.layers]
            self._columns[manifest.version] = np.array(columns, dtype=np.int64)

    def spread(self, version: int, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows of a manifest's layers over today's layers, NaN for those it did not know.

        rows: float32[..., layers of the manifest]; returns float32[..., layers].
        """
        columns = self._columns[version]
        if len(columns) == len(self.layers) and bool((columns == np.arange(len(columns))).all()):
            return rows
        known = columns >= 0
        spread = np.full((*rows.shape[:-1], len(self.layers)), np.nan, dtype=np.float32)
        spread[..., columns[known]] = rows[..., known]
        return spread

    def by_depth(self) -> NDArray[np.int64]:
        """Places of the layers, the input's first."""
        return np.argsort([layer.depth for layer in self.layers], kind="stable")


def tells(frame: Frame) -> bool:
    """Whether detectors learn more from a frame than its loss."""
    return bool(frame.columns or frame.events)


def window_of(layout: Layout, frames: Iterable[Frame]) -> Window:
    """Frames in ascending order of step, as the arrays that detectors take."""
    listed = list(frames)
    scalars = [frame.scalars for frame in listed]
    names = sorted({name for names in {tuple(each) for each in scalars} for name in names})
    missing = float("nan")
    return Window(
        steps=np.array([frame.step for frame in listed], dtype=np.int64),
        layers=layout.judged,
        statistics=_tables(layout, listed, tuple(BY_NAME)),
        scalars={name: np.array([each.get(name, missing) for each in scalars]) for name in names},
        reported={
            name: np.array([name in each for each in scalars], dtype=np.bool_) for name in names
        },
        measured=np.array([bool(frame.columns) for frame in listed], dtype=np.bool_),
    )


def statistic_rows(layout: Layout, frames: Sequence[Frame], name: str) -> NDArray[np.float32]:
    """One statistic of many frames. float32[frames, layers], NaN where not measured."""
    found = _tables(layout, frames, (name,)).get(name)
    if found is None:
        return np.full((len(frames), len(layout.layers)), np.nan, dtype=np.float32)
    return found


def _tables(
    layout: Layout, frames: Sequence[Frame], names: tuple[str, ...]
) -> dict[str, NDArray[np.float32]]:
    """Those statistics that any frame measured. float32[frames, layers], NaN where not measured.

    Frames of the same columns and layers are read as one array: rows one by one take ten times as
    long.
    """
    alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for row, frame in enumerate(frames):
        if frame.columns:
            alike.setdefault((frame.manifest, frame.columns), []).append(row)
    measured = {name for _, columns in alike for name in columns}
    found = [name for name in names if name in measured]
    # One piece of memory: what is as large and taken again and again is not given back to the
    # system each time, which would cost more than to fill it.
    shape = (len(found), len(frames), len(layout.layers))
    tables = dict(zip(found, np.full(shape, np.nan, dtype=np.float32), strict=True))
    for (version, columns), rows in alike.items():
        joined = b"".join([frames[row].values for row in rows])
        values = np.frombuffer(joined, dtype="<f4").reshape(len(rows), len(columns), -1)
        for name in tables.keys() & set(columns):
            tables[name][rows] = layout.spread(version, values[:, columns.index(name)])
    return tables


def as_judged(frames: Sequence[Frame]) -> Sequence[Frame]:
    """The frames that a judgement looks at, of those in ascending order of step."""
    if len(frames) <= WINDOW_FRAMES:
        return frames
    return [*frames[:BEGINNING_FRAMES], *frames[BEGINNING_FRAMES - WINDOW_FRAMES :]]
