"""The health score: one number from 0 to 100 for a run and for each layer, from its findings.

A score starts at 100. Each finding that concerns the run, or the layer, takes its share of what is
left: score = 100 * product(1 - WEIGHTS[severity]). So a run without a warning has 90 or more, one
with a warning at most 65, one with a critical finding at most 25: the number never contradicts the
verdict, and the worst run, with everything wrong, goes towards 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gradwatch.health.finding import Finding, Severity

# What a finding takes. Information alone never brings a run below 90: see FLOOR.
WEIGHTS = {Severity.INFO: 0.05, Severity.WARNING: 0.35, Severity.CRITICAL: 0.75}
FLOOR = 90.0
DEFINITION = "100, less {} of what is left for each open finding; information leaves {:g}".format(
    ", ".join(f"{weight:.0%} ({severity})" for severity, weight in WEIGHTS.items()), FLOOR
)


def run_score(findings: Iterable[Finding]) -> float:
    """Health of a run with these findings. 0 to 100."""
    return score_of(finding.severity for finding in findings)


def layer_scores(findings: Sequence[Finding], layers: Iterable[str]) -> dict[str, float]:
    """Health of each layer: of the findings that name it, and of those that name no layer."""
    return {
        layer: run_score(each for each in findings if not each.layers or layer in each.layers)
        for layer in layers
    }


def score_of(severities: Iterable[Severity]) -> float:
    """Health under findings of these severities. 0 to 100."""
    left, worst = 100.0, Severity.INFO
    for severity in severities:
        left *= 1 - WEIGHTS[severity]
        worst = max(worst, severity, key=lambda each: each.rank)
    return max(left, FLOOR) if worst is Severity.INFO else left
