"""`make zoo`: train every job with several seeds, judge them as they go, and print the score."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .fixtures import SEEDS, ZOO, in_parallel, judged, train_missing
from .pictures import PICTURES, draw_all
from .scoring import Score
from .table import confusion_table, kinds_table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of each job ({SEEDS})")
    parser.add_argument(
        "--jobs", default="*", metavar="PATTERN", help="only those of such a name, as 'F16*'"
    )
    parser.add_argument("--processes", type=int, default=2, help="in parallel (2)")
    parser.add_argument("--train", action="store_true", help="train again what is kept already")
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="instead, draw the pictures of docs/findings and write there what is told of them",
    )
    parser.add_argument("--kinds", nargs="+", choices=PICTURES, default=list(PICTURES), help="all")
    given = parser.parse_args()
    if given.pictures is not None:
        draw_all(given.pictures, given.kinds, given.processes)
        return
    keys = train_missing(given.seeds, given.processes, given.train, given.jobs)
    if not keys:
        parser.error(f"no job is called {given.jobs!r}")
    started = time.perf_counter()
    score = Score()
    for key, told in sorted(in_parallel(judged, keys, "Judging", given.processes)):
        score.add(f"{key.name}, seed {key.seed}", ZOO[key.name], told.first)
    took_s = time.perf_counter() - started
    print(kinds_table(score))
    print(f"\n{score.false_alarms} of {score.healthy} healthy jobs had a false alarm.")
    print(f"{len(keys)} jobs were judged again and again in {took_s:.0f} s.\n")
    print(confusion_table(score))
    if score.problems:
        print("\nWhat did not hold:", *sorted(score.problems), sep="\n  ")


if __name__ == "__main__":
    main()
