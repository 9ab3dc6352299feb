"""What the ranks of a job kept on disk, put together as a collector does."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.replay import Recording
from gradwatch.wire.frame import Frame, LayerInfo, Manifest
from gradwatch_server.merge import Part, merge_frames, merge_layers


def together(ranks: Sequence[Recording]) -> Recording:
    """One recording of all ranks: of each step, the frames of those that told of it, merged."""
    merged = Recording({}, {})
    for name in sorted({name for each in ranks for name in each.frames}):
        layers = {
            (manifest.rank, manifest.version): manifest.layers
            for each in ranks
            for manifest in each.manifests.get(name, ())
        }
        steps: dict[int, list[Frame]] = {}
        for each in ranks:
            for frame in each.frames.get(name, ()):
                steps.setdefault(frame.step, []).append(frame)
        versions: list[list[LayerInfo]] = []
        frames: list[Frame] = []
        for step in sorted(steps):
            parts = [
                Part(frame, layers[frame.rank, frame.manifest])
                for frame in sorted(steps[step], key=lambda frame: frame.rank)
            ]
            whole = merge_layers([part.layers for part in parts])
            if whole not in versions:
                versions.append(whole)
            frames.append(merge_frames(parts, whole, 1 + versions.index(whole)))
        merged.frames[name] = frames
        merged.manifests[name] = [
            Manifest(optimizer=name, version=number, layers=known)
            for number, known in enumerate(versions, 1)
        ]
    return merged
