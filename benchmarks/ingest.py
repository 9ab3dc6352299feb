"""How fast one collector process stores frames over HTTP, and how much room they take.

300 layers, 8 statistics. `every`: all of them at every step; `default`: the norm at every step and
the rest at each 20th, as the agent does unless told otherwise; histograms at each 20th step. Rates
are layer-steps a second, sizes are bytes a layer-step at rest. The limit is the plain write of the
same bytes with an fsync a batch. As a run grows: the rate of its first million layer-steps beside
that of the million before the ten millionth. MLflow and TensorBoard do the same work where they
are installed: pip install 'gradwatch[bench]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.transport import Transport, Verdict
from gradwatch.wire.codec import compress, encode_batch
from gradwatch.wire.frame import Frame, LayerInfo, Manifest, RunInfo
from gradwatch.wire.histogram import BUCKETS, bucket_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from collector_process import CollectorProcess, cpu_s
from postgres_server import MissingError, postgres_server

LAYERS = 300
STATISTICS = (
    "norm",
    "mean_abs",
    "absmax",
    "std",
    "zero_fraction",
    "nonfinite",
    "dead_fraction",
    "weight_norm",
)
NORMS = ("norm", "nonfinite")
DETAIL_EVERY = 20
# Ten million layer-steps of one run.
GROWTH_FRAMES = 34_000
BATCH_FRAMES = 50
SAMPLE = 1024
AGENTS = (1, 100)
RATE_BARS = {"sqlite": 1e6, "postgresql": 0.7e6}
MANY_AGENTS_SHARE = 0.7
MLFLOW_RATIO_BAR = 500


class Cadence(NamedTuple):
    """What agents send at which step."""

    name: str
    details_every: int
    histograms: bool
    bytes_bar: float


CADENCES = (
    Cadence("every step, histograms", 1, True, float("nan")),
    Cadence("every step", 1, False, 33.0),
    Cadence("default", DETAIL_EVERY, False, 8.0),
    Cadence("default, histograms", DETAIL_EVERY, True, 12.0),
)


class Rate(NamedTuple):
    """One measurement."""

    database: str
    cadence: str
    agents: int
    layer_steps_a_s: float
    collector_cpu_us: float  # a layer-step
    database_cpu_us: float  # a layer-step; SQLite's is the collector's
    bytes_a_layer_step: float


class Growth(NamedTuple):
    """How the rate of one agent holds as its run grows."""

    database: str
    layer_steps: int
    first_a_s: float  # of the first tenth
    last_a_s: float  # of the last tenth
    first_cpu_us: float  # of collector and database, a layer-step; says more on a busy machine
    last_cpu_us: float


class Course:
    """Gradients of a job that goes on: norms that wander, and what follows from them."""

    def __init__(self, seed: int) -> None:
        self._chance = np.random.default_rng(seed)
        self._level = self._chance.normal(-3, 1.5, LAYERS)
        self._weights = np.exp(self._chance.normal(2, 1, LAYERS))
        self._root = np.sqrt(self._chance.integers(64, 1_000_000, LAYERS))

    def frame(self, step: int, cadence: Cadence) -> Frame:
        """One step's frame."""
        self._level += self._chance.normal(0, 0.1, LAYERS)
        self._weights *= 1 + self._chance.normal(0, 1e-4, LAYERS)
        columns = STATISTICS if step % cadence.details_every == 0 else NORMS
        rows = self._rows()
        values = np.stack([rows[name] for name in columns]).astype("<f4")
        histograms = None
        if cadence.histograms and step % DETAIL_EVERY == 0:
            histograms = memoryview(compress(self._counts().tobytes()))
        return Frame(
            optimizer="AdamW",
            rank=0,
            step=step,
            time=1.7e9 + step * 0.1,
            manifest=1,
            columns=columns,
            values=memoryview(values.tobytes()),
            scalars={
                "loss": float(2.0 + self._level[0]),
                "lr": 3e-4,
                "total_norm": float(rows["norm"].max()),
            },
            histograms=histograms,
        )

    def _rows(self) -> dict[str, NDArray[np.float64]]:
        noise = self._chance.normal(0, 0.2, (4, LAYERS))
        norm = np.exp(self._level + noise[0])
        std = norm / self._root
        zeros = self._chance.binomial(SAMPLE, 0.01, LAYERS) / SAMPLE
        return {
            "norm": norm,
            "mean_abs": std * np.exp(0.1 * noise[1]),
            "absmax": std * np.exp(1.5 + noise[2]),
            "std": std * (1 - 0.01 * noise[3] ** 2),
            "zero_fraction": zeros,
            "nonfinite": np.zeros(LAYERS),
            "dead_fraction": np.round(zeros * 4) / 64,
            "weight_norm": self._weights,
        }

    def _counts(self) -> NDArray[np.uint16]:
        """Histograms of samples of every layer. uint16[LAYERS, BUCKETS]."""
        size = np.exp(self._level).astype(np.float32)[:, None]
        samples = size * self._chance.standard_normal((LAYERS, SAMPLE), dtype=np.float32)
        places = bucket_of(samples) + BUCKETS * np.arange(LAYERS)[:, None]
        counts = np.bincount(places.ravel(), minlength=LAYERS * BUCKETS)
        return counts.reshape(LAYERS, BUCKETS).astype("<u2")


def manifest() -> Manifest:
    layers = [
        LayerInfo(
            name=f"transformer.h.{number // 12}.part_{number % 12}.weight",
            shape=(768, 768),
            dtype="float32",
            module="Linear",
            role="weight",
            depth=number,
        )
        for number in range(LAYERS)
    ]
    return Manifest(optimizer="AdamW", version=1, layers=layers)


class Agent(threading.Thread):
    """Sends batches that are encoded already, one after the other, as the agent's thread does."""

    def __init__(
        self, url: str, number: int, bodies: Sequence[bytes], start: threading.Event
    ) -> None:
        super().__init__()
        self._transport = Transport(url)
        self._run = RunInfo(id=f"{number:032x}", project="bench", name="bench", started_at=0.0)
        self._bodies = bodies
        self._start_signal = start
        self.refused = 0
        self.acknowledged_at: list[float] = []
        self._until_stored(lambda: self._transport.introduce(self._run))
        self._until_stored(lambda: self._send(encode_batch([manifest()])))

    def run(self) -> None:
        self._start_signal.wait()
        for body in self._bodies:
            self._until_stored(lambda body=body: self._send(body))
            self.acknowledged_at.append(time.perf_counter())

    def _send(self, body: bytes) -> Any:
        return self._transport.deliver(self._run.id, body)

    def _until_stored(self, send: Callable[[], Any]) -> None:
        while (outcome := send()).verdict is not Verdict.STORED:
            if outcome.verdict is not Verdict.RETRY:
                raise RuntimeError(outcome.reason)
            time.sleep(outcome.retry_after_s or 0.05)
        self.refused += outcome.rejected


def batches(seed: int, frames: int, cadence: Cadence) -> list[bytes]:
    """The bodies of one agent's requests."""
    course = Course(seed)
    return [
        encode_batch([course.frame(step, cadence) for step in range(first, first + BATCH_FRAMES)])
        for first in range(0, frames, BATCH_FRAMES)
    ]


def measure(
    database: str,
    url: str,
    size: Callable[[], int],
    database_pid: int,
    cadence: Cadence,
    agents: int,
    frames: int,
    folder: Path,
) -> Rate:
    """Store `frames` frames of every agent; how fast, and how large the database has grown."""
    bodies = batches(agents, frames, cadence)
    go = threading.Event()
    with CollectorProcess(url, folder) as collector:
        collector.wait_ready()
        empty = size()
        # Runs differ by their names alone: the numbers need not, as nothing looks across runs.
        threads = [Agent(collector.url, number, bodies, go) for number in range(agents)]
        for thread in threads:
            thread.start()
        collector_cpu, database_cpu = cpu_s(collector.pid), _cpu(database_pid)
        began = time.perf_counter()
        go.set()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
        collector_cpu = cpu_s(collector.pid) - collector_cpu
        database_cpu = _cpu(database_pid) - database_cpu
        if any(thread.refused for thread in threads):
            raise RuntimeError("the collector refused frames")
    layer_steps = agents * frames * LAYERS
    return Rate(
        database,
        cadence.name,
        agents,
        layer_steps / took,
        collector_cpu / layer_steps * 1e6,
        database_cpu / layer_steps * 1e6,
        (size() - empty) / layer_steps,
    )


def grow(database: str, url: str, database_pid: int, frames: int, folder: Path) -> Growth:
    """Store one long run; how fast its first tenth and its last tenth went."""
    bodies = batches(1, frames, CADENCES[2])
    go = threading.Event()
    with CollectorProcess(url, folder) as collector:
        collector.wait_ready()
        agent = Agent(collector.url, 0, bodies, go)
        agent.start()
        began = time.perf_counter()
        go.set()
        done: list[int] = []
        used: list[float] = []
        while agent.is_alive():
            done.append(len(agent.acknowledged_at))
            used.append(cpu_s(collector.pid) + _cpu(database_pid))
            agent.join(0.05)
    at = [began, *agent.acknowledged_at]
    tenth = len(bodies) // 10
    layer_steps = tenth * BATCH_FRAMES * LAYERS
    return Growth(
        database,
        frames * LAYERS,
        layer_steps / (at[tenth] - at[0]),
        layer_steps / (at[-1] - at[-1 - tenth]),
        *(
            float(np.diff(np.interp(ends, done, used))[0]) / layer_steps * 1e6
            for ends in ((0, tenth), (len(bodies) - tenth, len(bodies)))
        ),
    )


def _cpu(pid: int) -> float:
    return cpu_s(pid) if pid else 0.0


class Database(NamedTuple):
    """Makes empty databases of one kind: URL, and what measures the size of one."""

    pid: int
    new: Callable[[], tuple[str, Callable[[], int]]]


@contextmanager
def sqlite(folder: Path) -> Generator[Database]:
    import sqlite3

    def new() -> tuple[str, Callable[[], int]]:
        path = Path(tempfile.mkdtemp(dir=folder)) / "gradwatch.db"

        def size() -> int:
            with sqlite3.connect(path) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return path.stat().st_size

        return f"sqlite:///{path}", size

    yield Database(0, new)


@contextmanager
def postgresql(folder: Path) -> Generator[Database]:
    import psycopg

    with postgres_server(safe=True) as server:

        def new() -> tuple[str, Callable[[], int]]:
            url = server.new_database()

            def size() -> int:
                with psycopg.connect(url) as connection:
                    row = connection.execute(
                        "SELECT pg_database_size(current_database())"
                    ).fetchone()
                assert row is not None
                return int(row[0])

            return url, size

        yield Database(server.pid, new)


KINDS = {"sqlite": sqlite, "postgresql": postgresql}


def limit(folder: Path, frames: int) -> tuple[float, float]:
    """Plain write of the uncompressed batches with an fsync each. Layer-steps/s, bytes of one."""
    course = Course(0)
    blobs = [
        b"".join(bytes(course.frame(step, CADENCES[1]).values) for step in range(BATCH_FRAMES))
        for _ in range(frames // BATCH_FRAMES)
    ]
    began = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        for blob in blobs:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
    took = time.perf_counter() - began
    return frames * LAYERS / took, sum(map(len, blobs)) / (frames * LAYERS)


def tensorboard(folder: Path, frames: int) -> tuple[float, float]:
    """add_scalar for each statistic of each layer."""
    from torch.utils.tensorboard.writer import SummaryWriter

    course = Course(0)
    rows = [course.frame(step, CADENCES[1]).matrix() for step in range(frames)]
    began = time.perf_counter()
    writer = SummaryWriter(str(folder / "tensorboard"))
    for step, matrix in enumerate(rows):
        for name, values in zip(STATISTICS, matrix, strict=True):
            for layer, value in enumerate(values):
                writer.add_scalar(f"{name}/layer_{layer}", float(value), step)
    writer.close()
    took = time.perf_counter() - began
    size = sum(path.stat().st_size for path in (folder / "tensorboard").iterdir())
    return frames * LAYERS / took, size / (frames * LAYERS)


def mlflow(folder: Path, frames: int) -> tuple[float, float]:
    """log_batch of 1,000 metrics at a time, into SQLite."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
    from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

    path = folder / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}")
    run = client.create_run(client.create_experiment("bench")).info.run_id
    before = path.stat().st_size
    course = Course(0)
    began = time.perf_counter()
    for step in range(frames):
        matrix = course.frame(step, CADENCES[1]).matrix()
        metrics = [
            Metric(f"{name}/layer_{layer}", float(value), 0, step)
            for name, values in zip(STATISTICS, matrix, strict=True)
            for layer, value in enumerate(values)
        ]
        for first in range(0, len(metrics), 1000):
            client.log_batch(run, metrics[first : first + 1000])
    took = time.perf_counter() - began
    return frames * LAYERS / took, (path.stat().st_size - before) / (frames * LAYERS)


class Peer(NamedTuple):
    """Somebody else's writer doing the same work, on fewer frames: it would take too long."""

    work: Callable[[Path, int], tuple[float, float]]
    frames: int
    package: str


PEERS = {
    "plain write, fsync": Peer(limit, 10_000, "numpy"),
    "TensorBoard add_scalar": Peer(tensorboard, 20, "tensorboard"),
    "MLflow log_batch": Peer(mlflow, 10, "mlflow"),
}


class Sizes(NamedTuple):
    """How much is sent: a quick look is a tenth of it."""

    frames: int  # of one agent alone
    frames_of_many: int  # of each of many

    def of(self, agents: int) -> int:
        return self.frames if agents == 1 else self.frames_of_many


def rates(
    kinds: Sequence[str], sizes: Sizes, folder: Path, say: Callable[[str], None]
) -> list[Rate]:
    """Every measurement of the collector."""
    found: list[Rate] = []
    for kind in kinds:
        with KINDS[kind](folder) as database:
            for cadence, agents in (
                *((CADENCES[0], agents) for agents in AGENTS),
                *((cadence, 1) for cadence in CADENCES[1:]),
            ):
                say(f"{kind}, {cadence.name}, {agents} agents")
                url, size = database.new()
                place = Path(tempfile.mkdtemp(dir=folder))
                frames = sizes.of(agents)
                found.append(measure(kind, url, size, database.pid, cadence, agents, frames, place))
    return found


def growths(
    kinds: Sequence[str], frames: int, folder: Path, say: Callable[[str], None]
) -> list[Growth]:
    found: list[Growth] = []
    for kind in kinds:
        with KINDS[kind](folder) as database:
            say(f"{kind}, a run that grows")
            place = Path(tempfile.mkdtemp(dir=folder))
            found.append(grow(kind, database.new()[0], database.pid, frames, place))
    return found


def peers(folder: Path, say: Callable[[str], None]) -> dict[str, tuple[float, float] | None]:
    """Layer-steps/s and bytes a layer-step of each; None for one that is not installed."""
    found: dict[str, tuple[float, float] | None] = {}
    for name, peer in PEERS.items():
        say(name)
        installed = importlib.util.find_spec(peer.package) is not None
        found[name] = peer.work(folder, peer.frames) if installed else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--database", choices=list(KINDS), action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the frames")
    parser.add_argument("--no-peers", action="store_true", help="gradwatch alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    sizes = Sizes(1_000, 50) if given.quick else Sizes(10_000, 200)

    def say(what: str) -> None:
        if not given.json:
            print(f"\r\033[K{what} ...", end="", file=sys.stderr, flush=True)

    kinds: list[str] = given.database or list(KINDS)
    with tempfile.TemporaryDirectory(prefix="gradwatch-ingest-") as name:
        folder = Path(name)
        try:
            measured = rates(kinds, sizes, folder, say)
            grown = growths(kinds, GROWTH_FRAMES // (10 if given.quick else 1), folder, say)
        except MissingError as error:
            sys.exit(f"{error}, or ask for --database sqlite alone")
        others = {} if given.no_peers else peers(folder, say)
    if given.json:
        print(json.dumps(figures(measured, grown, others)))
    else:
        print(file=sys.stderr)
        show(measured, grown, others)


def figures(
    measured: Sequence[Rate],
    grown: Sequence[Growth],
    others: dict[str, tuple[float, float] | None],
) -> dict[str, object]:
    """The same as the table, for programs."""
    return {
        "collector": [rate._asdict() for rate in measured],
        "growth": [growth._asdict() for growth in grown],
        "peers": {
            name: found and {"layer_steps_a_s": found[0], "bytes_a_layer_step": found[1]}
            for name, found in others.items()
        },
    }


def show(
    measured: Sequence[Rate],
    grown: Sequence[Growth],
    others: dict[str, tuple[float, float] | None],
) -> None:
    """The table for people."""
    print(
        f"{'database':12}{'cadence':25}{'agents':>7}{'layer-steps/s':>15}{'bar':>12}"
        f"{'collector':>12}{'database':>11}{'bytes':>8}{'bar':>6}"
    )
    size_bars = {cadence.name: cadence.bytes_bar for cadence in CADENCES}
    for rate in measured:
        bar = RATE_BARS[rate.database] * (1 if rate.agents == 1 else MANY_AGENTS_SHARE)
        shown_bar = f"{bar:>12,.0f}" if rate.cadence == CADENCES[0].name else f"{'':12}"
        size_bar = size_bars[rate.cadence]
        print(
            f"{rate.database:12}{rate.cadence:25}{rate.agents:>7}{rate.layer_steps_a_s:>15,.0f}"
            f"{shown_bar}{rate.collector_cpu_us:>9.3f} us{rate.database_cpu_us:>8.3f} us"
            f"{rate.bytes_a_layer_step:>8.2f}{'' if np.isnan(size_bar) else f'{size_bar:>6.0f}'}"
        )
    for growth in grown:
        named = f"one run of {growth.layer_steps / 1e6:.0f} M layer-steps"
        print(
            f"{growth.database:12}{named:32}{growth.first_a_s:>15,.0f} at first,"
            f"{growth.last_a_s:>12,.0f} at last; "
            f"{growth.first_cpu_us:.2f} us and {growth.last_cpu_us:.2f} us of processor"
        )
    for name, found in others.items():
        if found is None:
            print(f"{name:44}not installed: pip install 'gradwatch[bench]'")
        else:
            print(f"{name:44}{found[0]:>15,.0f}{'':35}{found[1]:>8.2f}")


if __name__ == "__main__":
    main()
