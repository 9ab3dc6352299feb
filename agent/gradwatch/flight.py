"""The flight recorder: the last steps of one optimizer, sent when a NaN appears.

A detail frame reads all of the gradients and the weights, so there is one at every twentieth step
or so. The recorder looks at a bounded sample of each gradient instead, a few microseconds a layer
whatever its size, at every step that its share of the budget allows. What is sampled stays
as it is, in memory, and becomes statistics only for the one time that it is asked for. The norms
and scalars beside it are those of the frames, which cost nothing more.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.measure import gradients_of
from gradwatch.pacer import Pacer
from gradwatch.reading import Ints
from gradwatch.sampling import sampled
from gradwatch.transfer import copied_event, to_host
from gradwatch.wire.frame import Flight, Frame

STEPS = 50
# The agent's thread comes to it a little later; by then newer steps must not have pushed them out.
KEPT = STEPS + 14
# Of 8 elements, of each layer; fewer when there are more layers than this.
RUNS = 8
FULLY_SAMPLED_LAYERS = 512
# As one record: with very many layers fewer steps are sent.
MAX_BYTES = 8 << 20
# Of the agent's budget; norms and details have the rest.
SHARE = 0.05
FRAME_COLUMNS = ("norm", "nonfinite")
SAMPLE_COLUMNS = ("mean_abs", "absmax", "std", "zero_fraction")
COLUMNS = FRAME_COLUMNS + SAMPLE_COLUMNS


class Sample(NamedTuple):
    """One step: elements of its gradients one after the other, perhaps still on their way."""

    manifest: int
    present: list[int]
    sizes: Ints
    elements: Tensor
    copied: torch.Event | None


class FlightRecorder:
    """Samples gradients in the training thread; makes a Flight of them in the agent's.

    budget: share of the training time that the agent may take, 0 for no limit.
    """

    def __init__(self, budget: float) -> None:
        self.pacer = Pacer(1, budget * SHARE)
        self._kept: collections.deque[tuple[int, Sample]] = collections.deque(maxlen=KEPT)

    def sample(
        self, step: int, manifest: int, parameters: Sequence[Tensor], scale: Tensor | None = None
    ) -> None:
        """Look at the gradients of one step. scale: what they are to be divided by."""
        present, gradients = gradients_of(parameters)
        if not present:
            return
        runs = min(RUNS, max(1, RUNS * FULLY_SAMPLED_LAYERS // len(parameters)))
        places, sizes, elements = sampled(gradients, runs)
        device = elements.device
        elements = to_host(elements if scale is None else elements / scale.to(device))
        layers = [present[place] for place in places]
        self._kept.append((step, Sample(manifest, layers, sizes, elements, copied_event(device))))

    def flight(
        self, optimizer: str, rank: int, layers: int, step: int, frames: Iterable[Frame]
    ) -> Flight | None:
        """The steps before `step`, with the norms and scalars of their frames; None without any.

        layers: of the newest manifest; steps that speak of another are left out.
        """
        samples = {at: item for at, item in list(self._kept) if at < step}
        if not samples:
            return None
        manifest = samples[max(samples)].manifest
        samples = {at: item for at, item in samples.items() if item.manifest == manifest}
        known = {
            frame.step: frame
            for frame in frames
            if frame.manifest == manifest and frame.step < step
        }
        room = max(1, MAX_BYTES // (4 * len(COLUMNS) * layers))
        steps = sorted(samples.keys() | known.keys())[-min(STEPS, room) :]
        tables = [_statistics(samples.get(at), known.get(at), layers) for at in steps]
        return Flight(
            optimizer=optimizer,
            rank=rank,
            manifest=manifest,
            step=step,
            steps=tuple(steps),
            columns=COLUMNS,
            values=memoryview(np.stack(tables).astype("<f4").tobytes()),
            scalars=_courses([known[at].scalars if at in known else {} for at in steps]),
        )


def _courses(scalars: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Each scalar's values, one a step, NaN where it was not told."""
    names = sorted({name for told in scalars for name in told})
    return {name: tuple(told.get(name, float("nan")) for told in scalars) for name in names}


def _statistics(sample: Sample | None, frame: Frame | None, layers: int) -> NDArray[np.float32]:
    """float32[len(COLUMNS), layers] of one step, NaN where nothing was measured."""
    found = np.full((len(COLUMNS), layers), np.nan, dtype=np.float32)
    for place, name in enumerate(FRAME_COLUMNS):
        row = frame.row(name) if frame is not None else None
        if row is not None:
            found[place] = row
    if sample is not None:
        found[len(FRAME_COLUMNS) :, sample.present] = _of_sample(sample)
    return found


def _of_sample(sample: Sample) -> NDArray[np.float64]:
    """float64[len(SAMPLE_COLUMNS), layers with a gradient]."""
    if sample.copied is not None:
        sample.copied.synchronize()
    values = sample.elements.numpy().astype(np.float64)
    starts = np.cumsum(sample.sizes) - sample.sizes
    magnitudes = np.abs(values)

    def mean(of: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.add.reduceat(of, starts) / sample.sizes

    with np.errstate(all="ignore"):
        variance = mean(values**2) - mean(values) ** 2
        return np.stack(
            [
                mean(magnitudes),
                np.maximum.reduceat(magnitudes, starts),
                np.sqrt(np.maximum(variance, 0.0)),
                mean((magnitudes == 0).astype(np.float64)),
            ]
        )
