"""The pictures of docs/findings: one for each kind, drawn from a job that is told that kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from gradwatch.health.kinds import KINDS

from .fixtures import ZOO, train
from .pictures import PICTURES, publish


def test_every_kind_has_a_picture_of_jobs_of_the_zoo() -> None:
    assert set(PICTURES) == set(KINDS)
    for kind, picture in PICTURES.items():
        for key in (picture.job, *picture.beside):
            assert key.name in ZOO
        scenario = ZOO[picture.job.name]
        expected = {kind for each in scenario.expected for kind in each.kinds}
        # What no frame shows is in no list of what is told of frames.
        assert picture.silent or picture.audited or kind in expected | scenario.allowed


@pytest.mark.parametrize("kind", ["non_finite", "disconnected", "never_updated"])
def test_a_picture_is_drawn_and_its_page_says_what_was_told(kind: str, tmp_path: Path) -> None:
    job = PICTURES[kind].job
    train(job, tmp_path / "kept")
    page = tmp_path / f"{kind}.md"
    page.write_text("before\n<!-- zoo: told -->\nold\n<!-- /zoo -->\nafter\n", encoding="utf-8")
    publish(kind, tmp_path / "kept", tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n<!-- zoo: told -->\nWhat gradwatch says of {job.name}")
    assert f"critical: {KINDS[kind].title}" in text or f"warning: {KINDS[kind].title}" in text
    assert "old" not in text.splitlines()
    with Image.open(tmp_path / f"{kind}.png") as picture:
        width, height = picture.size
        colours = picture.convert("RGB").getcolors(maxcolors=256)
    assert width > 2 * height > 800
    assert colours is not None
    assert len(colours) > 10, "more than an empty frame"
