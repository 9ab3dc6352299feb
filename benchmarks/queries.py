"""How quickly a long run is answered for, and how much room its tiers take.

A run of 300 layers and a million steps at the default cadence: norms at every step, 8 statistics
and histograms at each 20th. Its tiers are made by the same functions that workers fold with, from
numbers generated 256 steps at a time. Frames of single steps are stored for the newest stretches
alone, as a collector keeps them that is told to drop the older ones: all of them would be 2 GB, and
no answer here reads more of them. Answers are timed at the client, over HTTP on loopback, from one
collector process: the first one cold, then the median. Of the ranges that are just too short for a
tier, whose answers read the most, the slowest is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
from ingest import (
    DETAIL_EVERY,
    KINDS,
    LAYERS,
    NORMS,
    STATISTICS,
    CollectorProcess,
    Course,
    MissingError,
    cpu_s,
    manifest,
)
from rich.console import Console
from rich.progress import Progress
from sqlalchemy import Engine, func, insert, select
from sqlalchemy.orm import Session

from gradwatch.client import Client, StepSpan
from gradwatch.wire.codec import encode_record
from gradwatch.wire.frame import Frame, RunInfo
from gradwatch.wire.histogram import BUCKETS
from gradwatch_server import tiers
from gradwatch_server.arrivals import arrived
from gradwatch_server.database import migrate, open_database, writing
from gradwatch_server.ingest import introduce
from gradwatch_server.marks import mark_stretches
from gradwatch_server.models import GONE, WHOLE, FrameRow, ManifestRow, Optimizer, Run, Stretch
from gradwatch_server.packing import pack_histograms
from gradwatch_server.tiered import ENOUGH_SUMS

STEPS = 1_000_000
COLUMNS = 2000
BAR_S = 1.0
# As many as a range can be long that is answered from frames, and some.
KEPT_FRAMES = (ENOUGH_SUMS + 2) * tiers.stretch_steps(1)
REPEATS = 5
OPTIMIZER = "AdamW"
RUN = "0" * 32
SPAN = tiers.stretch_steps(1)
NAMES = {1: [layer.name for layer in manifest().layers]}
DETAILS = tuple(name for name in STATISTICS if name not in NORMS)
WROTE_TOGETHER = 64


def ask_heatmap(client: Client, **span: Unpack[StepSpan]) -> object:
    return client.heatmap(RUN, OPTIMIZER, **span)


def ask_course(client: Client, **span: Unpack[StepSpan]) -> object:
    return client.heatmap(RUN, OPTIMIZER, layers=NAMES[1][7], **span)


def ask_scalars(client: Client, **span: Unpack[StepSpan]) -> object:
    return client.scalars(RUN, OPTIMIZER, **span)


def ask_histograms(client: Client, **span: Unpack[StepSpan]) -> object:
    return client.histograms(RUN, OPTIMIZER, NAMES[1][7], **span)


QUESTIONS: dict[str, Callable[..., object]] = {
    "heatmap, all layers": ask_heatmap,
    "one layer's course": ask_course,
    "scalars": ask_scalars,
    "one layer's histograms": ask_histograms,
}


def just_too_short(steps: int) -> list[int]:
    """Lengths of ranges that no tier may have quite enough columns for: COLUMNS of them, a half, a
    quarter or an eighth, but for the stretches that the ends cut."""
    lengths = {
        COLUMNS * tiers.column_steps(tier) // part - 2 * tiers.stretch_steps(tier)
        for tier in range(1, tiers.TOP)
        for part in (1, 2, 4, 8)
    }
    sums = ENOUGH_SUMS * tiers.stretch_steps(1) - 2 * tiers.stretch_steps(1)
    return sorted(length for length in lengths | {sums} if 0 < length < steps)


class Size(NamedTuple):
    """What one tier takes."""

    tier: int
    rows: int
    bytes_a_layer_step: float
    histogram_bytes_a_layer_step: float


class Took(NamedTuple):
    """How long one question takes: the first time, then in the median."""

    cold_s: float
    median_s: float
    collector_cpu_s: float


class Measured(NamedTuple):
    """One database."""

    database: str
    steps: int
    took: dict[str, Took]
    sizes: list[Size]
    whole_bytes: int


class _Generator:
    """The numbers of 256 steps at a time."""

    def __init__(self) -> None:
        self._course = Course(1)
        self._chance = np.random.default_rng(1)
        self._level = self._chance.normal(-3, 1.5, LAYERS)
        self._counts = [self._course._counts() for _ in range(64)]  # pyright: ignore

    def norms(self, steps: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        noise = self._chance.normal(0, 0.2, (steps, LAYERS))
        # A walk that does not wander off, however long the run.
        self._level = 0.99 * self._level - 0.03 + self._chance.normal(0, 0.2, LAYERS)
        return np.exp(self._level + noise).astype(np.float32)

    def details(self, rows: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Statistics of detail frames. Each float32[rows, LAYERS]."""
        told = [self._course._rows() for _ in range(rows)]  # pyright: ignore
        return {name: np.array([row[name] for row in told], dtype=np.float32) for name in DETAILS}

    def histogram(self) -> np.ndarray[Any, np.dtype[np.uint16]]:
        return self._counts[int(self._chance.integers(len(self._counts)))]


def stretch(source: _Generator, start: int) -> tuple[tiers.Columns, Any]:
    """Columns of tier 1 for 256 steps, and the sum of their histograms."""
    steps = np.arange(start, start + SPAN)
    starts = np.arange(0, SPAN, tiers.column_steps(1))
    norms = source.norms(SPAN)
    folds = {
        "norm": tiers.join(tiers.lift(norms, squares=True), starts),
        "nonfinite": tiers.join(tiers.lift(np.zeros_like(norms)), starts),
    }
    at = np.flatnonzero(steps % DETAIL_EVERY == 0)
    for name, rows in source.details(len(at)).items():
        # No column has more than one of them, so that each is its own fold.
        values = np.full((len(starts), LAYERS), np.nan, dtype=np.float32)
        values[at // tiers.column_steps(1)] = rows
        folds[name] = tiers.lift(values, tiers.by_squares(name))
    told = {"loss": norms[:, 0], "lr": np.full(SPAN, 3e-4), "total_norm": norms.max(axis=1)}
    scalars: dict[str, tiers.Course] = {}
    ends = starts + tiers.column_steps(1) - 1
    for name, logged in told.items():
        values = logged.astype(np.float64)
        count = np.full(len(starts), tiers.column_steps(1))
        scalars[name] = tiers.Course(tiers.join(tiers.lift(values), starts), values[ends], count)
    counts = np.zeros((LAYERS, BUCKETS), dtype=np.uint64)
    for _ in at:
        counts += source.histogram()
    return tiers.Columns(steps[starts], steps[ends], folds, scalars), counts


def frames(source: _Generator, first: int, last: int) -> Iterator[Frame]:
    """The newest frames, as an agent sends them."""
    for step in range(first, last):
        rows = {"norm": source.norms(1)[0], "nonfinite": np.zeros(LAYERS)}
        detailed = step % DETAIL_EVERY == 0
        if detailed:
            rows |= {name: values[0] for name, values in source.details(1).items()}
        columns = STATISTICS if detailed else NORMS
        values = np.stack([rows[name] for name in columns]).astype("<f4")
        yield Frame(
            optimizer=OPTIMIZER,
            rank=0,
            step=step,
            time=1.7e9 + step * 0.1,
            manifest=1,
            columns=columns,
            values=memoryview(values.tobytes()),
            scalars={"loss": float(rows["norm"][0]), "lr": 3e-4},
            histograms=pack_histograms(source.histogram().astype(np.uint32)) if detailed else None,
        )


def build(engine: Engine, steps: int, advance: Callable[[int], None]) -> None:
    """Store the run."""
    migrate(engine)
    source = _Generator()
    kept_from = max(0, (steps - KEPT_FRAMES) // SPAN * SPAN)
    over = (steps - 1) // SPAN * SPAN
    with writing(engine) as session:
        introduce(session, RunInfo(id=RUN, project="bench", name="bench", started_at=0.0))
        session.flush()
        run_id = session.scalars(select(Run.id)).one()
        optimizer = Optimizer(
            run_id=run_id, name=OPTIMIZER, layers=LAYERS, frames=steps, nonfinite_frames=0,
            first_step=0, last_step=steps - 1, speaker=0, kept_from=0,
        )  # fmt: skip
        session.add(optimizer)
        session.flush()
        optimizer_id = optimizer.id
        body = encode_record(manifest())
        session.add(
            ManifestRow(optimizer_id=optimizer_id, rank=0, version=1, layers=LAYERS, body=body)
        )
        for frame in frames(source, kept_from, steps):
            raw = encode_record(frame)
            made = arrived(0, frame, raw)
            session.add(
                FrameRow(
                    optimizer_id=optimizer_id, rank=0, step=frame.step,
                    holds=made.holds, digest=made.digest, body=made.body,
                )
            )  # fmt: skip
        mark_stretches(session, optimizer_id, [steps - 1])
    # Of each tier the children of the stretch that is not whole yet.
    waiting: dict[int, list[tuple[tiers.Columns, Any]]] = {t: [] for t in range(2, tiers.TOP + 1)}
    rows: list[dict[str, Any]] = []

    def add(tier: int, start: int, columns: tiers.Columns, counts: Any) -> None:
        rows.append(
            {
                "optimizer_id": optimizer_id,
                "tier": tier,
                "start": start,
                "columns": len(columns.first),
                "manifest": 1,
                "folded_at": time.time(),
                "present": b"\xff" * (SPAN // 8) if tier == 1 else b"",
                "frames": GONE if tier == 1 and start < kept_from else WHOLE,
                "body": tiers.pack_columns(columns),
                "histograms": tiers.pack_counts(counts),
            }
        )
        if tier == tiers.TOP:
            return
        column = tiers.fold_columns([(columns, 1)], NAMES, 1, tier + 1)
        waiting[tier + 1].append((column, counts))
        if len(waiting[tier + 1]) == tiers.FACTOR:
            children, waiting[tier + 1] = waiting[tier + 1], []
            above = tiers.stretch_steps(tier + 1)
            whole = tiers.fold_columns([(item, 1) for item, _ in children], NAMES, 1, tier + 1)
            add(tier + 1, start // above * above, whole, sum(told for _, told in children))

    for number, start in enumerate(range(0, over, SPAN), start=1):
        add(1, start, *stretch(source, start))
        if number % WROTE_TOGETHER == 0 or start + SPAN >= over:
            with writing(engine) as session:
                session.execute(insert(Stretch), rows)
            rows.clear()
        advance(SPAN)
    with writing(engine) as session:
        for tier, children in waiting.items():
            if children:
                mark_stretches(session, optimizer_id, [int(children[0][0].first[0])], tier)


def sizes(engine: Engine, steps: int) -> list[Size]:
    """Bytes of each tier for each layer and step that it covers."""
    with Session(engine) as session:
        count, size = session.execute(
            select(func.count(), func.sum(func.length(FrameRow.body))).select_from(FrameRow)
        ).one()
        found = [Size(0, count, size / (count * LAYERS), 0.0)]
        for tier, rows, body, counts in session.execute(
            select(
                Stretch.tier,
                func.count(),
                func.sum(func.length(Stretch.body)),
                func.sum(func.length(Stretch.histograms)),
            )
            .group_by(Stretch.tier)
            .order_by(Stretch.tier)
        ):
            covered = rows * tiers.stretch_steps(tier) * LAYERS
            found.append(Size(tier, rows, body / covered, counts / covered))
    return found


def measure(kind: str, steps: int, folder: Path, progress: Progress) -> Measured:
    with KINDS[kind](folder) as database:
        url, whole = database.new()
        task = progress.add_task(f"{kind}: folding {steps:,} steps", total=steps)
        engine = open_database(url)
        build(engine, steps, lambda count: progress.advance(task, count))
        found = sizes(engine, steps)
        if kind == "postgresql":
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("ANALYZE")  # as autovacuum does within a minute
        engine.dispose()
        lengths = just_too_short(steps)
        asked = len(QUESTIONS) * (1 + len(lengths))
        task = progress.add_task(f"{kind}: asking", total=asked)
        took: dict[str, Took] = {}
        for name, ask in QUESTIONS.items():
            # A new process for each: nothing in memory, though the system's cache has it.
            with CollectorProcess(url, folder) as collector:
                collector.wait_ready()
                of: dict[int, Took] = {}
                for length in (steps, *lengths):
                    first = steps - length
                    span: StepSpan = {"first": first, "last": steps - 1, "columns": COLUMNS}
                    of[length] = time_of(collector, ask, span)
                    progress.advance(task)
            took[f"{name}, whole run"] = of.pop(steps)
            slowest = max(of, key=lambda length: of[length].median_s)
            took[f"{name}, slowest range: {slowest:,} steps"] = of[slowest]
        return Measured(kind, steps, took, found, whole())


def time_of(collector: CollectorProcess, ask: Callable[..., object], span: StepSpan) -> Took:
    """One question asked again and again."""
    client = Client(collector.url, timeout_s=60.0)
    seconds: list[float] = []
    used = [cpu_s(collector.pid)]
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        ask(client, **span)
        seconds.append(time.perf_counter() - began)
        used.append(cpu_s(collector.pid))
    return Took(seconds[0], statistics.median(seconds[1:]), (used[-1] - used[1]) / REPEATS)


def show(result: Measured) -> None:
    """The table for people."""
    print(f"{result.database}, {LAYERS} layers x {result.steps:,} steps")
    asked = f"asked at {COLUMNS} columns"
    print(f"  {asked:52}{'first':>10}{'median':>10}{'bar':>8}{'collector':>13}")
    for name, took in result.took.items():
        print(
            f"  {name:52}{took.cold_s:>8.3f} s{took.median_s:>8.3f} s{BAR_S:>6.1f} s"
            f"{took.collector_cpu_s:>11.2f} s"
        )
    print(f"  {'bytes a layer-step it covers':52}{'rows':>10}{'numbers':>10}{'histograms':>12}")
    for size in result.sizes:
        counts = "in them" if size.tier == 0 else f"{size.histogram_bytes_a_layer_step:.3f}"
        numbers = f"{size.bytes_a_layer_step:.3f}"
        print(f"  tier {size.tier:<47}{size.rows:>10,}{numbers:>10}{counts:>12}")
    print(f"  whole database: {result.whole_bytes / 1e6:,.0f} MB\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--database", choices=list(KINDS), action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of the run; default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    if given.steps < 4 * SPAN:
        parser.error(f"--steps: at least {4 * SPAN}")
    kinds: list[str] = given.database or list(KINDS)
    measured: list[Measured] = []
    with (
        tempfile.TemporaryDirectory(prefix="gradwatch-queries-") as name,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        try:
            for kind in kinds:
                measured.append(measure(kind, given.steps, Path(name), progress))
                if not given.json:
                    show(measured[-1])
        except MissingError as error:
            sys.exit(f"{error}, or ask for --database sqlite alone")
    if given.json:
        found = [
            result._asdict()
            | {
                "took": {name: took._asdict() for name, took in result.took.items()},
                "sizes": [size._asdict() for size in result.sizes],
            }
            for result in measured
        ]
        print(json.dumps({"queries": found}))


if __name__ == "__main__":
    main()
