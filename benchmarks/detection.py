"""Faults told and healthy jobs left in peace: gradwatch and the rules that peers publish.

All judge the same frames: those of the zoo's jobs (`make zoo`), which are trained first where they
are missing. Peers are scored on the kinds that they claim to tell.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.zoo.fixtures import ZOO, Key, in_parallel, load, train_missing
from tests.zoo.peers import PEERS
from tests.zoo.scenario import Scenario
from tests.zoo.scoring import Score, Told, follow, told_kinds
from tests.zoo.table import kinds_table, peers_table

from gradwatch.health.window import Window

RULES: dict[str, Callable[[Window], Iterable[str]]] = {
    "gradwatch": told_kinds,
    **{peer.name: peer.judge for peer in PEERS},
}
CLAIMS = {peer.name: peer.kinds for peer in PEERS}
RECALL_BAR = PRECISION_BAR = 0.98


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="of each job (1)")
    parser.add_argument("--processes", type=int, default=2, help="in parallel (2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    keys = train_missing(given.seeds, given.processes)
    scores = {name: Score() for name in RULES}
    for key, told in sorted(in_parallel(judged, keys, "Judging", given.processes)):
        for name, score in scores.items():
            scenario = claimed(ZOO[key.name], CLAIMS.get(name))
            score.add(f"{key.name}, seed {key.seed}", scenario, told[name].first)
    if given.json:
        print(json.dumps({name: figures(score) for name, score in scores.items()}))
        return
    print(
        f"{len(keys)} jobs; bars: recall {RECALL_BAR}, precision {PRECISION_BAR}, no false alarm\n"
    )
    print(kinds_table(scores["gradwatch"]))
    print(f"\n{peers_table(scores)}")


def judged(key: Key) -> dict[str, Told]:
    """What each set of rules told of one job, and when first."""
    at = [each.onset for each in ZOO[key.name].expected]
    recording = load(key)
    return {name: follow(recording, rules, at=at) for name, rules in RULES.items()}


def claimed(scenario: Scenario, kinds: frozenset[str] | None) -> Scenario:
    """A scenario as those rules are asked for it: by the kinds that they claim to tell."""
    if kinds is None:
        return scenario
    asked = [slot for slot in scenario.expected if kinds & set(slot.kinds)]
    # Whatever else ails the job, to tell of it is no false alarm, but is asked of nobody.
    others = {kind for slot in scenario.expected if slot not in asked for kind in slot.kinds}
    return scenario._replace(expected=tuple(asked), allowed=scenario.allowed | others)


def figures(score: Score) -> dict[str, float]:
    recall, precision = score.macro()
    return {
        "recall": recall,
        "precision": precision,
        "false_alarms": score.false_alarms,
        "healthy_jobs": score.healthy,
    }


if __name__ == "__main__":
    main()
