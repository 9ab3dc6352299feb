"""Old runs judged again: recordings read from local disk, and `gradwatch replay`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradwatch.health.window import Window
from gradwatch.spool import SUFFIX
from gradwatch.windows import Layout, tells, window_of
from gradwatch.wire.codec import decode_batch
from gradwatch.wire.frame import Frame, Manifest, Record


@dataclass(frozen=True)
class Recording:
    """What one rank of a run sent, by optimizer. Frames that tell something, by step."""

    manifests: dict[str, list[Manifest]]
    frames: dict[str, list[Frame]]

    @property
    def optimizers(self) -> list[str]:
        return sorted(self.frames)

    def window(
        self,
        optimizer: str,
        until: int | None = None,
        keep: Callable[[Sequence[Frame]], Sequence[Frame]] = lambda frames: frames,
    ) -> Window:
        """The frames up to and with step `until`, of those that are kept, as detectors see them."""
        frames = [frame for frame in self.frames[optimizer] if until is None or frame.step <= until]
        kept = keep(frames)
        # What the layers were then: a manifest of later says what has been unfrozen since.
        newest = max((frame.manifest for frame in kept), default=1)
        known = [each for each in self.manifests[optimizer] if each.version <= newest]
        return window_of(Layout(known), kept)


def read_spool(folder: Path) -> Recording:
    """A run that was kept on local disk. Raises OSError, or BatchError for what is no batch."""
    return recording(
        item.record
        for segment in sorted(folder.glob(f"*{SUFFIX}"))
        for item in decode_batch(segment.read_bytes())[0]
    )


def recording(records: Iterable[Record]) -> Recording:
    """What one rank sent, in any order and however often."""
    manifests: dict[str, dict[int, Manifest]] = {}
    frames: dict[str, dict[int, Frame]] = {}
    for record in records:
        if isinstance(record, Manifest):
            manifests.setdefault(record.optimizer, {})[record.version] = record
        elif isinstance(record, Frame) and tells(record):
            frames.setdefault(record.optimizer, {})[record.step] = record
    return Recording(
        {name: [found[key] for key in sorted(found)] for name, found in manifests.items()},
        {name: [found[key] for key in sorted(found)] for name, found in frames.items()},
    )
