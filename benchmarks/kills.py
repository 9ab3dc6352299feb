"""Kills the collector 50 times under load, and counts what was lost and what is double.

Four agents (two runs of one rank, one of two) send batches without pause, each until it is
acknowledged, while a worker folds what is stored. Collector and worker are killed with SIGKILL at
random, most often in the middle of commits, sometimes while they start. Then every frame that was
acknowledged is looked for in the database. The bar of each loss is 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from ingest import KINDS, MissingError
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))

from kill_load import Counts, kill_at_random

KILLS = 50
LOSSES = ("missing", "altered", "double", "unmerged", "misfolded")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--database", choices=list(KINDS), action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--kills", type=int, default=KILLS, help="of each; default %(default)s")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of when they come")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    kinds: list[str] = given.database or list(KINDS)
    found: dict[str, Counts] = {}
    with (
        tempfile.TemporaryDirectory(prefix="gradwatch-kills-") as name,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        for kind in kinds:
            task = progress.add_task(f"{kind}: killing", total=given.kills)
            folder = Path(tempfile.mkdtemp(dir=name))
            try:
                with KINDS[kind](folder) as database:
                    url, _ = database.new()
                    counts = kill_at_random(
                        url,
                        folder,
                        given.kills,
                        given.seed,
                        lambda task=task: progress.advance(task),
                    )
            except MissingError as error:
                sys.exit(f"{error}, or ask for --database sqlite alone")
            found[kind] = counts
            if not given.json:
                show(kind, counts)
    if given.json:
        print(json.dumps({kind: counts._asdict() for kind, counts in found.items()}))
    if any(getattr(counts, loss) for counts in found.values() for loss in LOSSES):
        sys.exit("frames were lost or are double")


def show(kind: str, counts: Counts) -> None:
    """The table for people."""
    print(kind)
    for name, count in counts._asdict().items():
        print(f"  {name:14}{count:>10,}{'   bar 0' if name in LOSSES else ''}", flush=True)


if __name__ == "__main__":
    main()
