"""docs/findings.md says what the code does: each kind, each threshold, each default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradwatch.health.judge import DETECTORS, Detector
from gradwatch.health.kinds import KINDS
from gradwatch.health.thresholds import thresholds_of

DOCUMENT = (Path(__file__).parents[2] / "docs" / "findings.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL))


def test_there_is_a_section_for_each_kind_and_no_other() -> None:
    assert list(SECTIONS) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_has_all_its_parts(kind: str) -> None:
    for part in ("Symptom", "Mechanism", "How it is told", "Confused with", "What to do"):
        assert f"**{part}.**" in SECTIONS[kind]


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.kind)
def test_thresholds_and_their_defaults_are_those_of_the_code(detector: Detector) -> None:
    documented = re.findall(
        r"^\| `(\w+)` \| (\S+) \| (.+?) \| (.+?) \|$", SECTIONS[detector.kind], re.MULTILINE
    )
    assert [(name, float(default), unit, reason) for name, default, unit, reason in documented] == [
        tuple(row) for row in thresholds_of(detector.thresholds)
    ]


def test_every_threshold_has_a_unit_and_a_reason() -> None:
    for detector in DETECTORS:
        for row in thresholds_of(detector.thresholds):
            assert row.unit
            assert len(row.reason) > 10
