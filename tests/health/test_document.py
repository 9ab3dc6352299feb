"""docs/findings says what the code does: a page for each kind, each threshold, each default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradwatch.health.judge import DETECTORS, Detector
from gradwatch.health.kinds import KINDS
from gradwatch.health.thresholds import thresholds_of

from .pages import FOLDER, INDEX, index_parts, page_of, parts_of, with_parts

SECTIONS = (
    "Symptom",
    "Mechanism",
    "Example",
    "How it is told",
    "What it is confused with",
    "What to do",
    "Thresholds",
    "Sources",
)


def test_there_is_a_page_for_each_kind_and_no_other() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == {*KINDS, INDEX.stem}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_all_its_sections_in_their_order(kind: str) -> None:
    parts = re.split(r"^## (.+)\n", page_of(kind).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert tuple(parts[1::2]) == SECTIONS
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        said = re.sub(r"<!--.*?-->", "", text)
        assert len(said.split()) > 3, f"{title} of {kind} is empty"


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_says_what_the_code_says(kind: str) -> None:
    page = page_of(kind).read_text(encoding="utf-8")
    assert page == with_parts(page, parts_of(kind)), "run python -m tests.health.pages"


def test_the_index_names_every_kind() -> None:
    page = INDEX.read_text(encoding="utf-8")
    assert page == with_parts(page, index_parts()), "run python -m tests.health.pages"


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.kind)
def test_a_page_has_every_threshold_as_the_code_has_it(detector: Detector) -> None:
    """Read back from the table, whatever wrote it."""
    documented = re.findall(
        r"^\| `(\w+)` \| (\S+) \| (.+?) \| (.+?) \|$",
        page_of(detector.kind).read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert [(name, float(default), unit, reason) for name, default, unit, reason in documented] == [
        tuple(each) for each in thresholds_of(detector.thresholds)
    ]


def test_every_threshold_has_a_unit_and_a_reason() -> None:
    for detector in DETECTORS:
        for row in thresholds_of(detector.thresholds):
            assert row.unit
            assert len(row.reason) > 10


def test_thresholds_that_a_page_speaks_of_exist() -> None:
    known = {row.name for each in DETECTORS for row in thresholds_of(each.thresholds)}
    assert "ratio" in known
    for kind in KINDS:
        page = page_of(kind).read_text(encoding="utf-8")
        (told,) = re.findall(r"^## How it is told\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)
        own = parts_of(kind)["thresholds"]
        for name in re.findall(r"`([a-z_]+)`", told):
            assert f"`{name}`" in own or name not in known, f"{kind} has no threshold {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_shows_a_picture_of_its_own_and_what_was_told_of_that_job(kind: str) -> None:
    page = page_of(kind).read_text(encoding="utf-8")
    ((words, target),) = re.findall(r"^!\[(.+)\]\((\S+)\)$", page, re.MULTILINE)
    assert len(words) > 40, "a picture says in words what it shows"
    picture = (FOLDER / target).read_bytes()
    assert target == f"{kind}.png"
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 60_000
    (told,) = re.findall(r"<!-- zoo: told -->\n(.*?)\n<!-- /zoo -->", page, re.DOTALL)
    assert f": {KINDS[kind].title}, since step" in told


DOCUMENTS = (*FOLDER.glob("*.md"), *FOLDER.parent.glob("*.md"), FOLDER.parents[1] / "README.md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_links_to_files_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
