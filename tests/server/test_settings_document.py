"""docs/settings.md names every setting with its default, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gradwatch import settings as agent
from gradwatch_server import settings as server

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"
ROW = re.compile(r"^\| `(GRADWATCH_\w+)` \| (?:`(.*?)`)? ?\| (.+) \|$", re.MULTILINE)


def documented(part: str) -> dict[str, str]:
    """Variables of one section of the document, and their defaults as text."""
    (section,) = (
        text
        for text in DOCUMENT.read_text().split("\n## ")
        if text.lower().startswith(f"the {part}:")
    )
    return {name: default for name, default, _ in ROW.findall(section)}


def as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(
    ("part", "settings", "prefix"),
    [
        ("agent", agent.Settings, agent.PREFIX),
        ("service", server.Settings, server.PREFIX),
    ],
)
def test_each_setting_stands_there_with_its_default(part, settings, prefix):
    assert documented(part) == {
        prefix + field.name.upper(): as_text(field.default) for field in fields(settings)
    }


def test_each_setting_of_the_service_can_be_read_from_its_documented_default():
    environ = documented("service")
    assert server.Settings.load(environ) == server.Settings()


def test_a_variable_set_to_nothing_is_not_set():
    assert server.Settings.load({"GRADWATCH_JUDGE_EVERY_S": " "}) == server.Settings()


@pytest.mark.parametrize("text", ["soon", "nan", "0", "-1", "inf"])
def test_what_cannot_be_used_is_refused_by_the_name_of_its_variable(text):
    with pytest.raises(ValueError, match="GRADWATCH_JUDGE_EVERY_S"):
        server.Settings.load({"GRADWATCH_JUDGE_EVERY_S": text})
