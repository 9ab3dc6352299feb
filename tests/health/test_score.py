from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.health.finding import Finding, Severity
from gradwatch.health.judge import Verdict, verdict
from gradwatch.health.score import layer_scores, run_score


def finding(severity: Severity, *layers: str) -> Finding:
    return Finding("vanishing", severity, layers, 1, 2, "summary")


several = st.lists(st.sampled_from(Severity).map(finding), max_size=12)


@given(several)
def test_the_score_never_contradicts_the_verdict(findings: list[Finding]) -> None:
    score = run_score(findings)
    least, most = {
        Verdict.HEALTHY: (90, 100),
        Verdict.WARNING: (0, 65),
        Verdict.CRITICAL: (0, 25),
    }[verdict(findings)]
    assert least <= score <= most


@given(several, st.sampled_from(Severity))
def test_one_more_finding_never_raises_it_and_order_does_not_matter(
    findings: list[Finding], severity: Severity
) -> None:
    more = [finding(severity), *findings]
    assert run_score(more) <= run_score(findings)
    assert run_score(more[::-1]) == pytest.approx(run_score(more))


def test_a_layer_suffers_from_what_names_it_and_from_nothing_else() -> None:
    told = [
        (Severity.CRITICAL, ["a", "a"]),
        (Severity.WARNING, ["b", "a", "gone"]),
        (Severity.WARNING, []),
    ]
    assert layer_scores(told, ["a", "b", "c"]) == {
        "a": pytest.approx(16.25),
        "b": pytest.approx(65.0),
        "c": 100.0,
    }
    assert run_score([]) == 100.0
