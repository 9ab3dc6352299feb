"""The health score: one number from 0 to 100 for a run and for each layer, from its findings.

A score starts at 100. Each finding of the run, or that names the layer, takes its share of what is
left: score = 100 * product(1 - WEIGHTS[severity]). So a run without a warning has 90 or more, one
with a warning at most 65, one with a critical finding at most 25: the number never contradicts the
verdict, and the worst run, with everything wrong, goes towards 0.
"""

from __future__ import annotations

from collections.abc import Iterable

from gradwatch.health.finding import Finding, Severity

# What a finding takes. Information alone never brings a run below 90: see FLOOR.
WEIGHTS = {Severity.INFO: 0.05, Severity.WARNING: 0.35, Severity.CRITICAL: 0.75}
FLOOR = 90.0


def _defined(findings: str) -> str:
    shares = ", ".join(f"{weight:.0%} ({severity})" for severity, weight in WEIGHTS.items())
    return f"100, less {shares} of what is left for each {findings}; information leaves {FLOOR:g}"


DEFINITION = _defined("open finding")
LAYER_DEFINITION = _defined("open finding that names the layer")


def run_score(findings: Iterable[Finding]) -> float:
    """Health of a run with these findings. 0 to 100."""
    return score_of(finding.severity for finding in findings)


def layer_scores(
    told: Iterable[tuple[Severity, Iterable[str]]], layers: Iterable[str]
) -> dict[str, float]:
    """Health of each layer, from 0 to 100, of the findings that name it.

    What names no layer concerns the run alone: it says nothing of where to look. told: of each
    finding its severity and the layers that it names.
    """
    suffered: dict[str, list[Severity]] = {layer: [] for layer in layers}
    for severity, named in told:
        for layer in suffered.keys() & set(named):
            suffered[layer].append(severity)
    return {layer: score_of(severities) for layer, severities in suffered.items()}


def score_of(severities: Iterable[Severity]) -> float:
    """Health under findings of these severities. 0 to 100."""
    left, worst = 100.0, Severity.INFO
    for severity in severities:
        left *= 1 - WEIGHTS[severity]
        worst = max(worst, severity, key=lambda each: each.rank)
    return max(left, FLOOR) if worst is Severity.INFO else left
