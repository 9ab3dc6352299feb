"""A step's frame between the optimizer's step and its sending."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from gradwatch.activations import Outputs
from gradwatch.reading import NoGradient, Reading
from gradwatch.wire.codec import compress
from gradwatch.wire.frame import Frame


class PendingFrame:
    """A step's frame while the training loop may still log a loss to it.

    overflow: says whether a loss scaler skips this step, by more than 0; None without a scaler.
    outputs: what was sampled of the activations, for a frame that reads gradients.
    """

    def __init__(
        self,
        optimizer: str,
        step: int,
        manifest: int,
        reading: Reading | NoGradient | None,
        lr: float,
        overflow: Callable[[], float] | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.step = step
        self.hurry = False  # whether it is worth waking the agent's thread
        self.opened_at = time.monotonic()
        self.scalars: dict[str, Callable[[], float]] = {}
        self._time = time.time()
        self._tickets = [None]
        self._manifest = manifest
        self._reading = reading
        self._overflow = overflow
        # The last frame of an optimizer stays when its model is gone.
        self._outputs = None if outputs is None else outputs.without_layers()
        self._measured: dict[str, Callable[[], float]] = {}
        if not math.isnan(lr):
            self.measured("lr", lambda: lr)

    @property
    def empty(self) -> bool:
        """Nothing measured and nothing logged: not worth a frame."""
        return self._reading is None and not self.scalars and self._overflow is None

    @property
    def open(self) -> bool:
        """Whether what is logged now can still travel with it."""
        return bool(self._tickets)

    def claim(self) -> bool:
        """True for the first caller alone, who is to send it; popping a list is one instruction."""
        try:
            self._tickets.pop()
        except IndexError:
            return False
        return True

    def measured(self, name: str, value: Callable[[], float]) -> None:
        """Add a number of the agent's own."""
        self._measured[name] = value

    def frame(self, rank: int) -> Frame | None:
        """The frame, once all of its numbers have arrived from the device; None without any."""
        scalars = {name: value() for name, value in (self._measured | self.scalars).items()}
        columns: tuple[str, ...] = ()
        values, histograms, events = b"", None, list[str]()
        if self._overflow is not None and self._overflow() > 0:
            # Its gradients are not applied, and that they overflow is how a scale is found.
            events.append("amp_skipped")
            scalars["amp_skipped"] = 1.0
        elif self._reading is not None:
            found = self._reading.resolve()
            columns, values = found.columns, found.values.astype("<f4").tobytes()
            if self._outputs is not None:
                columns = (*columns, "saturated_fraction")
                values += self._outputs.saturated().astype("<f4").tobytes()
            norms = found.values[columns.index("norm")].astype(np.float64)
            counts = found.values[columns.index("nonfinite")]
            scalars["total_norm"] = float(np.sqrt(np.nansum(norms**2)))
            if np.any(counts > 0):
                events.append("non_finite")
                scalars["total_norm"] = float("nan")
            if found.histograms is not None:
                histograms = memoryview(compress(found.histograms.astype("<u2").tobytes()))
        if not math.isfinite(scalars.get("loss", 0.0)) and "non_finite" not in events:
            events.append("non_finite")
        if not (columns or events or self.scalars):
            return None
        return Frame(
            optimizer=self.optimizer,
            rank=rank,
            step=self.step,
            time=self._time,
            manifest=self._manifest,
            columns=columns,
            values=memoryview(values),
            scalars=scalars,
            events=tuple(events),
            histograms=histograms,
        )
