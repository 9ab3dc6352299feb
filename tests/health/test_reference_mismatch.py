"""Gradients beside a reference: how far they may be, and what a finding says of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradwatch.checkup import derivatives
from gradwatch.health import reference_mismatch
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.judge import judge
from gradwatch.health.reference_mismatch import Thresholds, difference, is_right, tolerance_of
from gradwatch.health.window import Compared
from gradwatch_reference import checking

from .windows import mlp, window

BASE = window(mlp(2), np.full(4, 1e-2), steps=20)


def compared(step: int, error: float, layer: str = "0.weight", **given: Any) -> Compared:
    facts: dict[str, Any] = {"rank": 0, "method": "reference", "dtype": "float32"}
    return Compared(layer=layer, step=step, error=error, **(facts | given))


def detect(*audits: Compared) -> Finding | None:
    return reference_mismatch.detect(replace(BASE, audits=audits))


def gradient(size: int = 1000) -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(size=size)


@pytest.mark.parametrize("scale", [1e-300, 1e-3, 1.0, 1e30, 1e300])
def test_the_error_of_a_wrong_factor_is_as_the_page_says_whatever_the_size(scale: float) -> None:
    right = gradient() * scale
    floor_tells = scale < 1e-8
    for factor in (2.0, 0.5, 1.1):
        expected = 0.0 if floor_tells else abs(1 - factor) / (1 + factor)
        assert difference(factor * right, right).relative_error == pytest.approx(expected, abs=1e-6)
    assert difference(-right, right).relative_error == pytest.approx(
        float(not floor_tells), abs=1e-6
    )


def test_a_right_gradient_in_a_shorter_type_is_far_below_its_tolerance() -> None:
    right = gradient()
    for name in ("float32", "float16"):
        error = difference(right.astype(name), right).relative_error
        assert 0 < error < tolerance_of("reference", name) / 50


def test_an_element_whose_terms_cancel_does_not_decide() -> None:
    right = gradient()
    right[0] = 1e-9
    off = right.copy()
    off[0] = -1e-9
    assert difference(off, right).relative_error < 1e-9


def test_elements_that_are_not_finite_are_counted_and_left_out() -> None:
    right = gradient(8)
    broken = right.copy()
    broken[:2] = [math.nan, math.inf]
    found = difference(broken, right)
    assert (found.relative_error, found.nonfinite, found.reference_nonfinite) == (0.0, 2, 0)
    assert difference(broken, broken) == (0.0, 2, 2)
    nothing = np.full(3, np.nan)
    assert difference(nothing, nothing).relative_error == 0.0
    assert difference(np.zeros(3), np.zeros(3)).relative_error == 0.0
    assert difference(np.array([1j]), np.array([-1j])).relative_error == pytest.approx(1)


def test_shapes_must_be_the_same() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\), a reference of \(3,\)"):
        difference(np.zeros(2), np.zeros(3))


def test_tolerances_are_one_table_for_audits_the_doctor_and_the_engine() -> None:
    for dtype, tolerance in checking.TOLERANCE.items():
        assert tolerance_of("reference", dtype.name) == tolerance
    assert tolerance_of("finite_difference", "float16") == derivatives.TOLERANCE
    assert tolerance_of("reference", "complex64") == tolerance_of("reference", "float32")
    assert tolerance_of("reference", "float8_e5m2") == tolerance_of("reference", "float16")


@pytest.mark.parametrize(
    ("error", "given", "right"),
    [
        (1e-2, {}, True),
        (1.01e-2, {}, False),
        (math.nan, {}, False),
        (math.inf, {}, False),
        (0.0, {"nonfinite": 1}, False),
        (0.0, {"reference_nonfinite": 1}, False),
        (0.0, {"nonfinite": 2, "reference_nonfinite": 2}, True),
        (1e-3, {"tolerance": 1e-4}, False),
        (0.0, {"tolerance": 0.0}, True),
        (5e-2, {"dtype": "bfloat16"}, True),
        (5e-3, {"method": "finite_difference"}, False),
    ],
)
def test_what_is_right(error: float, given: dict[str, Any], right: bool) -> None:
    assert is_right(compared(1, error, **given)) == right
    assert (detect(compared(1, error, **given)) is None) == right


def test_a_finding_names_the_layers_the_step_and_errors_beside_tolerances() -> None:
    finding = detect(
        compared(10, 1.0, "a"),
        compared(20, 0.5, "a"),
        compared(5, 0.25, "b", method="finite_difference", rank=2),
        compared(20, 1e-7, "c"),
    )
    assert finding is not None
    assert (finding.severity, finding.layers) == (Severity.CRITICAL, ("b", "a"))
    assert (finding.first_step, finding.last_step) == (5, 20)
    assert finding.summary == (
        "The gradient of b and 1 more layer is not what the reference engine in float64 says: "
        "relative error 0.50, 0.01 is allowed, at step 20, since step 5."
    )
    assert finding.evidence == {
        "first step": 5,
        "compared with": "the reference engine in float64",
        "worst relative error": 0.5,
        "its tolerance": 0.01,
        "b": "relative error 0.25, 0.001 is allowed, at step 5 on rank 2",
        "a": "relative error 0.50, 0.01 is allowed, at step 20",
    }


def test_it_begins_after_the_last_comparison_that_passed() -> None:
    steps = [(1, 1.0), (2, 0.0), (3, 1.0), (4, 1.0)]
    finding = detect(*(compared(step, error) for step, error in steps))
    assert finding is not None
    assert (finding.first_step, finding.last_step) == (3, 4)
    assert detect(*(compared(step, error) for step, error in steps[:2])) is None


def test_a_pass_is_that_of_the_same_rank_and_method_alone() -> None:
    failed = compared(1, 1.0, rank=1)
    assert detect(failed, compared(2, 0.0)) is not None
    assert detect(failed, compared(2, 0.0, rank=1, method="finite_difference")) is not None
    assert detect(failed, compared(2, 0.0, rank=1)) is None


def test_the_order_in_which_audits_come_changes_nothing() -> None:
    audits = [
        compared(1, 1.0, "a"),
        compared(2, 0.0, "a"),
        compared(3, 1.0, "b"),
        compared(3, 1.0, "c", rank=1),
        compared(3, 1.0, "c"),
        compared(4, math.nan, "d"),
    ]
    first = detect(*audits)
    assert first is not None
    assert all(detect(*order) == first for order in itertools.permutations(audits))


def test_many_layers_are_named_and_some_shown() -> None:
    finding = detect(*(compared(1, 0.9, f"{place:02}") for place in range(20)))
    assert finding is not None
    assert len(finding.layers) == 20
    assert "00 and 19 more layers" in finding.summary
    assert len(finding.evidence) == 4 + reference_mismatch.MAX_SHOWN


def test_thresholds_other_than_the_defaults_hold_where_no_tolerance_was_given() -> None:
    audits = (compared(1, 1e-3),)
    strict = Thresholds(float32=1e-4)
    assert reference_mismatch.detect(replace(BASE, audits=audits)) is None
    assert reference_mismatch.detect(replace(BASE, audits=audits), strict) is not None


def test_frames_alone_never_tell_it() -> None:
    assert reference_mismatch.KIND not in [finding.kind for finding in judge(BASE)]
