"""What judging costs: all detectors over one window, and a worker's look at 200 active runs.

An active run is what teams have by the hundred: a network of 50 to 300 named tensors (a small
convolutional network has 50, ResNet-50 161, BERT 199, a transformer of 24 blocks 300) whose job
takes 1 to 10 optimizer steps a second and sends norms at each and everything at every 20th, as the
agent does by default. Its window is full, so a look at it is as dear as it gets. Each has sent new
frames since the last look, so each is judged at every tick, GRADWATCH_JUDGE_EVERY_S apart. A worker
keeps up when it is through with all of them before the next tick; one that is not looks at each
less often, and always first at the one that has waited longest. What is measured is the processor
time of one process from the rows in SQLite to findings brought in line, as Celery's task does it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.judge import judge
from gradwatch.health.window import Window
from gradwatch.windows import WINDOW_FRAMES, Layout, window_of
from gradwatch.wire.codec import encode_batch
from gradwatch.wire.frame import Frame, LayerInfo, Manifest, RunInfo
from gradwatch_server.arrivals import Arrived, arrive
from gradwatch_server.database import migrate, open_database, writing
from gradwatch_server.frame_cache import FrameCache
from gradwatch_server.ingest import introduce, store
from gradwatch_server.judging import judge_due
from gradwatch_server.settings import Settings

LAYERS = 300
STEPS = 1000
WINDOW_BAR_MS = 50.0
ACTIVE_RUNS = 200
ACTIVE_LAYERS = (50, 100, 160, 300)
STEPS_PER_S = (1, 3, 10)
PASSES = 5
DETAIL_EVERY = 20
REPEATS = 15
DETAILS = (
    "mean_abs",
    "absmax",
    "std",
    "zero_fraction",
    "dead_fraction",
    "weight_norm",
    "update_ratio",
    "weight_spread",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    every_s = Settings().judge_every_s
    window_ms = window_cost_ms()
    cold_s, warm_s = pass_cost_s(every_s)
    figures = {
        "window_cpu_ms": window_ms,
        "first_pass_cpu_s": cold_s,
        "pass_cpu_s": warm_s,
        "run_cpu_ms": 1e3 * warm_s / ACTIVE_RUNS,
        "active_runs_a_core": ACTIVE_RUNS * every_s / warm_s,
    }
    if given.json:
        print(json.dumps(figures))
        return
    rows = (
        (f"{LAYERS} layers x {STEPS} steps, all detectors, CPU ms", window_ms, WINDOW_BAR_MS),
        (f"{ACTIVE_RUNS} active runs, a new worker's first look, CPU s", cold_s, None),
        (f"{ACTIVE_RUNS} active runs, each look after it, CPU s", warm_s, every_s),
        ("one active run, CPU ms", figures["run_cpu_ms"], None),
        (
            f"active runs a core, each every {every_s:g} s",
            figures["active_runs_a_core"],
            ACTIVE_RUNS,
        ),
    )
    print(f"{'figure':56}{'measured':>10}{'bar':>8}")
    for name, value, bar in rows:
        print(f"{name:56}{value:>10.1f}{'' if bar is None else f'{bar:>8.0f}'}")


def window_cost_ms() -> float:
    """CPU of judging one window that nobody has looked at yet; the median."""
    manifest, frames = healthy_run(LAYERS, STEPS)
    made = window_of(Layout([manifest]), frames)

    def judged() -> float:
        # What detectors share is kept with a window, so each repeat needs a new one.
        fresh = Window(
            made.steps, made.layers, made.statistics, made.scalars, made.reported, made.measured
        )
        started = time.process_time()
        judge(fresh)
        return time.process_time() - started

    return 1e3 * statistics.median(judged() for _ in range(REPEATS))


def pass_cost_s(every_s: float) -> tuple[float, float]:
    """CPU of a worker for one look at all active runs: the first, and the median after it."""
    longest = WINDOW_FRAMES + int(PASSES * every_s * max(STEPS_PER_S))
    sent = {size: arrived(size, longest) for size in ACTIVE_LAYERS}
    cache = FrameCache()
    with tempfile.TemporaryDirectory() as folder:
        engine = open_database(f"sqlite:///{Path(folder) / 'runs.db'}")
        migrate(engine)
        runs = [
            Active(uuid.uuid4().hex, sent[layers], rate)
            for layers, rate, _ in zip(
                itertools.cycle(ACTIVE_LAYERS),
                itertools.cycle(STEPS_PER_S),
                range(ACTIVE_RUNS),
                strict=False,
            )
        ]
        for run in runs:
            info = RunInfo(id=run.key, project="benchmark", name="a run", started_at=0.0)
            with writing(engine) as session:
                introduce(session, info)
                store(session, run.key, run.records[: 1 + WINDOW_FRAMES], ())

        def judged() -> float:
            started = time.process_time()
            judge_due(engine, (), cache=cache)
            return time.process_time() - started

        spent = [judged()]
        for number in range(PASSES):
            for run in runs:
                new = run.since_last_look(number, every_s)
                with writing(engine) as session:
                    store(session, run.key, new, ())
            spent.append(judged())
        engine.dispose()
    return spent[0], statistics.median(spent[1:])


class Active(NamedTuple):
    """A run that sends as it goes."""

    key: str
    records: Sequence[Arrived]  # its manifest, then a frame a step
    steps_per_s: int

    def since_last_look(self, look: int, every_s: float) -> Sequence[Arrived]:
        """What it has sent before the look of this number, since the one before."""
        steps = int(every_s * self.steps_per_s)
        start = 1 + WINDOW_FRAMES + look * steps
        return self.records[start : start + steps]


def arrived(layers: int, steps: int) -> Sequence[Arrived]:
    """A healthy run's records, as the collector has them."""
    manifest, frames = healthy_run(layers, steps)
    return arrive(encode_batch([manifest, *frames])).records


def healthy_run(layers: int, steps: int) -> tuple[Manifest, list[Frame]]:
    """A dense network that learns: every statistic on detail frames, norms on the others."""
    chance = np.random.default_rng(0)
    infos = [layer(place) for place in range(layers)]
    manifest = Manifest(optimizer="AdamW", version=1, layers=infos)
    falling = 2.3 * np.exp(-np.arange(steps) / 300) + 0.1 * np.abs(chance.normal(size=steps))
    frames = [frame(step, float(falling[step - 1]), layers, chance) for step in range(1, steps + 1)]
    return manifest, frames


def layer(place: int) -> LayerInfo:
    depth, is_bias = divmod(place, 2)
    return LayerInfo(
        name=f"blocks.{depth}.{'bias' if is_bias else 'weight'}",
        shape=(256,) if is_bias else (256, 256),
        dtype="float32",
        module="Linear",
        role="bias" if is_bias else "weight",
        depth=depth,
    )


def frame(step: int, loss: float, layers: int, chance: np.random.Generator) -> Frame:
    def wandering(level: float) -> NDArray[np.float64]:
        return np.exp(chance.normal(np.log(level), 0.3, layers))

    rows = {"norm": wandering(0.05), "nonfinite": np.zeros(layers)}
    if step <= 10 or step % DETAIL_EVERY == 0:
        usual = (1e-4, 1e-3, 1e-4, 0.01, 0.03, 10.0, 1e-3, 1.0)
        rows |= {name: wandering(level) for name, level in zip(DETAILS, usual, strict=True)}
    return Frame(
        optimizer="AdamW",
        rank=0,
        step=step,
        time=1e9 + step,
        manifest=1,
        columns=tuple(rows),
        values=memoryview(np.stack(list(rows.values())).astype("<f4").tobytes()),
        scalars={"loss": loss, "lr": 1e-3},
    )


if __name__ == "__main__":
    main()
