"""What is printed of a zoo that was judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .scoring import Score


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be: the first one to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def kinds_table(score: Score) -> str:
    """Precision, recall and delay of each kind that gradwatch tells."""
    rows = [["kind", "jobs", "recall", "precision", "median delay", "worst delay"]]
    for kind in score.kinds():
        delay = score.delay(kind)
        rows.append(
            [
                kind,
                str(score.hit[kind] + score.missed[kind]),
                _share(score.recall(kind)),
                _share(score.precision(kind)),
                f"{delay[0]:g}" if delay else "-",
                str(delay[1]) if delay else "-",
            ]
        )
    recall, precision = score.macro()
    rows.append(["mean over kinds", "", _share(recall), _share(precision), "", ""])
    return table(rows)


def peers_table(scores: Mapping[str, Score]) -> str:
    """Recall / precision of each set of rules, by kind, and its false alarms on healthy jobs."""
    kinds = sorted({kind for score in scores.values() for kind in score.hit + score.missed})
    rows = [["recall / precision", *scores]]
    for kind in kinds:
        rows.append(
            [
                kind,
                *(
                    f"{_share(s.recall(kind))} / {_share(s.precision(kind))}"
                    for s in scores.values()
                ),
            ]
        )
    rows.append(
        ["mean over kinds", *(" / ".join(map(_share, score.macro())) for score in scores.values())]
    )
    rows.append(
        ["false alarms", *(f"{s.false_alarms} of {s.healthy} healthy" for s in scores.values())]
    )
    return table(rows)


def confusion_table(score: Score) -> str:
    """What was told (columns) of each fault (rows), in jobs."""
    told = sorted({kind for _, kind in score.confusion})
    faults = sorted({fault for fault, _ in score.confusion})
    rows = [["fault \\ told as", *(str(place + 1) for place in range(len(told)))]]
    for fault in faults:
        counts = [score.confusion[fault, kind] for kind in told]
        rows.append([fault, *(str(count) if count else "." for count in counts)])
    names = "\n".join(f"  {place + 1}: {kind}" for place, kind in enumerate(told))
    return f"{table(rows)}\n{names}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
