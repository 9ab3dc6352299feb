"""What judging costs: all detectors over one window, and a run of the collector from its rows on.

A run of the collector is loaded from SQLite, judged, and its findings brought in line, as a worker
does it for each run that sent frames since it was judged last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.judge import judge
from gradwatch.health.window import Window
from gradwatch.windows import WINDOW_FRAMES, Layout, window_of
from gradwatch.wire.codec import encode_batch
from gradwatch.wire.frame import Frame, LayerInfo, Manifest, RunInfo
from gradwatch_server.arrivals import arrive
from gradwatch_server.database import migrate, open_database, writing
from gradwatch_server.ingest import introduce, store
from gradwatch_server.judging import judge_run
from gradwatch_server.settings import Settings

LAYERS = 300
STEPS = 1000
WINDOW_BAR_MS = 50.0
ACTIVE_RUNS_BAR = 200
ACTIVE_LAYERS = 60  # a transformer of a few blocks
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
    window_ms = window_cost_ms()
    run_ms = run_cost_ms()
    every_s = Settings().judge_every_s
    figures = {
        "window_cpu_ms": window_ms,
        "run_cpu_ms": run_ms,
        "active_runs_a_core": every_s / (run_ms / 1e3),
    }
    if given.json:
        print(json.dumps(figures))
        return
    rows = (
        (f"{LAYERS} layers x {STEPS} steps, all detectors, CPU ms", window_ms, WINDOW_BAR_MS),
        (f"one run of {ACTIVE_LAYERS} layers, rows to findings, CPU ms", run_ms, None),
        (
            f"active runs a core, each every {every_s:g} s",
            every_s / (run_ms / 1e3),
            ACTIVE_RUNS_BAR,
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


def run_cost_ms() -> float:
    """CPU of a worker for one active run with a full window, on SQLite; the median."""
    manifest, frames = healthy_run(ACTIVE_LAYERS, WINDOW_FRAMES)
    with tempfile.TemporaryDirectory() as folder:
        engine = open_database(f"sqlite:///{Path(folder) / 'runs.db'}")
        migrate(engine)
        run = RunInfo(id=uuid.uuid4().hex, project="benchmark", name="a run", started_at=0.0)
        with writing(engine) as session:
            introduce(session, run)
            store(session, run.id, arrive(encode_batch([manifest, *frames])).records, ())

        def judged() -> float:
            started = time.process_time()
            judge_run(engine, 1, ())
            return time.process_time() - started

        spent = [judged() for _ in range(REPEATS)]
        engine.dispose()
    return 1e3 * statistics.median(spent)


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
