"""`gradwatch export`: a run's frames as one table, for notebooks and other tools.

One row a layer and step. Statistics are columns; so are scalars, as `scalar_loss`, the same in all
rows of a step. What was not measured, or was not finite, is empty; `nonfinite` counts the latter.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

from gradwatch.client import Client, CollectorError
from gradwatch.remote_runs import collector, find_run
from gradwatch.wire.api import FrameView, ManifestView, OptimizerView, RunView
from gradwatch.wire.statistics import BY_NAME

KEYS = ("optimizer", "rank", "step", "time", "layer")
SCALAR = "scalar_"
# A Parquet row group: large enough to compress, small enough for a laptop's memory.
GROUP_ROWS = 200_000

Columns = dict[str, list[Any]]
Write = Callable[[Columns], None]


class Part(NamedTuple):
    """What is exported of one optimizer of a run."""

    run: RunView
    optimizer: OptimizerView
    rank: int | None
    first: int | None
    last: int | None


@click.command()
@click.argument("run")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write, .parquet or .csv.",
)
@click.option("--optimizer", help="Only this one [all].")
@click.option("--rank", type=int, help="A single rank's frames [all ranks together].")
@click.option("--first", type=click.IntRange(0), help="First step [the run's first].")
@click.option("--last", type=click.IntRange(0), help="Last step [the run's last].")
@click.option("--url", help="The collector, as http://127.0.0.1:8470 [GRADWATCH_URL].")
@click.option("--token", help="Its token, with scope read [GRADWATCH_TOKEN].")
def export(
    run: str,
    target: Path,
    optimizer: str | None,
    rank: int | None,
    first: int | None,
    last: int | None,
    url: str | None,
    token: str | None,
) -> None:
    """Write a run's frames to a Parquet or CSV file.

    RUN is its id, or the beginning of it. One row a layer and step, one column a statistic;
    scalars are columns too, as scalar_loss. Nothing is overwritten.

    \b
    gradwatch export 3f2a9c1b --to run.parquet
    gradwatch export 3f2a9c1b --to steps.csv --first 1000 --last 2000
    """
    writer = WRITERS.get(target.suffix.lower())
    if writer is None:
        raise click.UsageError(f"--to must end with {' or '.join(WRITERS)}, not {target.name!r}")
    if target.exists():
        raise click.ClickException(f"{target} is there already; name another file, or remove it")
    client = collector(url, token)
    try:
        found = find_run(client, run)
        chosen = [item for item in found.optimizers if optimizer in (None, item.name)]
        if not chosen:
            known = ", ".join(item.name for item in found.optimizers) or "none"
            raise click.ClickException(f"the run has no such optimizer; it has {known}")
        scalars = _scalar_names(client, found, chosen)
        with _whole(target) as partial, writer(partial, scalars) as write:
            rows = sum(
                _export(client, Part(found, item, rank, first, last), scalars, write)
                for item in chosen
            )
    except CollectorError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{rows} rows in {target}")


def _scalar_names(client: Client, run: RunView, chosen: Sequence[OptimizerView]) -> list[str]:
    named = [client.scalars(run.info.id, item.name, columns=1).series_bytes for item in chosen]
    return sorted({name for names in named for name in names})


def _export(client: Client, part: Part, scalars: Sequence[str], write: Write) -> int:
    """Write one optimizer's frames; returns how many rows they made."""
    run, name = part.run.info.id, part.optimizer.name
    layers = _layer_names(client.manifests(run, name))
    first = max(part.first or 0, part.optimizer.first_step)
    last = min(
        part.optimizer.last_step if part.last is None else part.last, part.optimizer.last_step
    )
    rows = 0
    with click.progressbar(length=max(0, last - first + 1), label=name) as bar:
        done = first
        for frame in client.all_frames(run, name, rank=part.rank, first=part.first, last=part.last):
            columns = _columns(frame, layers[frame.rank, frame.manifest], scalars)
            write(columns)
            rows += len(columns["layer"])
            bar.update(frame.step + 1 - done)
            done = frame.step + 1
    return rows


def _layer_names(manifests: Sequence[ManifestView]) -> dict[tuple[int, int], list[str]]:
    return {(item.rank, item.version): [layer.name for layer in item.layers] for item in manifests}


def _columns(frame: FrameView, layers: Sequence[str], scalars: Sequence[str]) -> Columns:
    """One frame as columns of equal length; a frame without statistics is one row, of no layer."""
    names: Sequence[str | None] = layers if frame.statistics else [None]
    count = len(names)
    same = (frame.optimizer, frame.rank, frame.step, frame.time)
    return {
        **{key: [value] * count for key, value in zip(KEYS, same, strict=False)},
        "layer": list(names),
        **{name: frame.statistics.get(name, [None] * count) for name in BY_NAME},
        **{SCALAR + name: [frame.scalars.get(name)] * count for name in scalars},
    }


@contextmanager
def _whole(target: Path) -> Generator[Path]:
    """A file beside the target that takes its name once it is whole, and else goes away."""
    partial = target.with_name(target.name + ".part")
    try:
        yield partial
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _names(scalars: Sequence[str]) -> list[str]:
    return [*KEYS, *BY_NAME, *(SCALAR + name for name in scalars)]


@contextmanager
def _csv(path: Path, scalars: Sequence[str]) -> Generator[Write]:
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(_names(scalars))
        yield lambda columns: lines.writerows(zip(*columns.values(), strict=True))


@contextmanager
def _parquet(path: Path, scalars: Sequence[str]) -> Generator[Write]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise click.ClickException(
            "Parquet needs pyarrow: pip install 'gradwatch[arrow]', or write to a .csv file"
        ) from None
    kinds = dict(
        zip(KEYS, (pa.string(), pa.int32(), pa.int64(), pa.float64(), pa.string()), strict=True)
    )
    kinds |= dict.fromkeys(BY_NAME, pa.float32())
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in _names(scalars)])
    waiting: Columns = {name: [] for name in schema.names}
    with parquet.ParquetWriter(path, schema) as file:

        def flush() -> None:
            file.write_table(pa.table(waiting, schema=schema))
            for column in waiting.values():
                column.clear()

        def write(columns: Columns) -> None:
            for name, values in columns.items():
                waiting[name] += values
            if len(waiting["layer"]) >= GROUP_ROWS:
                flush()

        yield write
        flush()


WRITERS = {".parquet": _parquet, ".csv": _csv}
