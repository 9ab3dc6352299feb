"""The guide: every block of code runs, and prints what stands beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradwatch_reference import TABLE, Value, to_svg

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "backpropagation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture
def table_restored() -> Iterator[None]:
    """The guide adds a primitive to the table."""
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


@pytest.mark.usefixtures("table_restored")
def test_every_block_prints_what_stands_beside_it():
    assert len(BLOCKS) > 20
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(DOCS / "backpropagation.md"), "exec"), namespace)
        expected = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected, block


def test_every_exercise_has_an_answer():
    exercises = re.findall(r"^\*\*\d+\.\*\*", GUIDE, re.MULTILINE)
    assert len(exercises) == GUIDE.count("<details>") >= 6


def test_the_drawing_in_the_guide_is_what_the_engine_draws():
    x, w, b = Value(2.0), Value(3.0), Value(1.0)
    loss = (x * w + b) ** 2
    loss.backward()
    drawn = to_svg(loss, {"x": x, "w": w, "b": b, "L": loss})
    assert (DOCS / "reference" / "graph.svg").read_text(encoding="utf-8") == drawn + "\n"


def test_the_measurements_of_the_guide_can_be_taken_again():
    path = DOCS.parent / "examples" / "reference_costs.py"
    spec = importlib.util.spec_from_file_location("reference_costs", path)
    assert spec is not None
    assert spec.loader is not None
    costs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(costs)
    ((_, _, forward, reverse),) = costs.cost_of_modes((64,))
    assert forward > 5 * reverse  # 64 passes against one
    ((_, kept, checkpointed),) = costs.cost_of_memory((64,))
    assert checkpointed < kept / 2


def test_the_commands_named_in_the_guide_exist():
    for command in re.findall(r"`python ([\w/.]+)", GUIDE):
        assert (DOCS.parent / command).is_file()
    for module in set(re.findall(r"`(\w+\.py)`", GUIDE)):
        assert (DOCS.parent / "reference_engine" / "gradwatch_reference" / module).is_file()
