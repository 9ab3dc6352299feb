from __future__ import annotations

import gc
import re
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradwatch.health import chain, exploding, learning_rate_too_high
from gradwatch.health.course import Movement
from gradwatch.health.finding import Finding, Severity
from gradwatch.health.judge import DETECTORS, Settings, Verdict, judge, settings_of, verdict
from gradwatch.health.kinds import KINDS
from gradwatch.health.window import Layer, Layers, Window
from gradwatch.wire.statistics import BY_NAME

from .windows import mlp, rows, window, with_loss, with_statistic

FLAT = np.full(8, 1e-2)


def finding(severity: Severity) -> Finding:
    return Finding("vanishing", severity, ("a",), 1, 2, "summary")


def test_every_detector_has_a_kind_a_setting_and_an_explanation() -> None:
    kinds = [detector.kind for detector in DETECTORS]
    assert kinds == list(KINDS)
    for detector in DETECTORS:
        assert isinstance(Settings()[detector.kind], detector.thresholds)


def test_thresholds_of_no_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="'exploded' is no kind of finding; known are vanishing"):
        Settings(exploded=exploding.Thresholds())


def test_health_stands_alone() -> None:
    folder = Path(exploding.__file__).parent
    for module in folder.glob("*.py"):
        for imported in re.findall(r"^\s*(?:from|import) (\S+)", module.read_text(), re.MULTILINE):
            if imported.startswith("gradwatch"):
                assert imported.startswith("gradwatch.health"), module
            assert imported.split(".")[0] not in {"torch", "time", "random"}, module


def test_a_healthy_window_has_no_finding() -> None:
    assert judge(window(mlp(4), FLAT)) == []


def test_the_gravest_comes_first_and_of_equals_the_earliest() -> None:
    counts = np.zeros((50, 8))
    counts[40:] = 64
    sizes = np.array(
        [np.full(8, np.nan) if row >= 40 else FLAT * (1e7 if row > 30 else 1) for row in range(50)]
    )
    story = judge(with_statistic(window(mlp(4), sizes), "nonfinite", counts))
    assert [(f.kind, f.first_step) for f in story] == [("exploding", 32), ("non_finite", 41)]


def test_settings_reach_their_detector() -> None:
    grown = window(mlp(4), np.repeat([1.0, 5e3], [30, 20])[:, None] * FLAT)
    assert [f.kind for f in judge(grown)] == ["exploding"]
    deaf = Settings(exploding=exploding.Thresholds(growth=1e9, creeping_growth=1e9, absurd=1e9))
    assert judge(grown, deaf) == []


def thrown_about() -> Window:
    """Each step changes a fifth of the weights, and the loss swings about its start."""
    uneven = 1e-2 + 1e-3 * np.cos(np.arange(120))[:, None] * np.ones(6)
    base = window(mlp(3), uneven, steps=120, update_ratio=0.2)
    return with_loss(base, 2.3 + 0.4 * np.sin(1.9 * np.arange(120)))


def test_thresholds_reach_the_other_kinds_that_reason_with_them() -> None:
    assert [f.kind for f in judge(thrown_about())] == ["oscillation"]
    deaf = settings_of({"learning_rate_too_high": {"ratio": 0.3, "extreme": 0.9}})
    assert "oscillation" not in [f.kind for f in judge(thrown_about(), deaf)]


def test_updates_are_judged_once_for_all_the_kinds_that_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Movement] = []
    made = learning_rate_too_high.too_large

    def counted(moved: Movement, settings: learning_rate_too_high.Thresholds) -> NDArray[np.bool_]:
        asked.append(moved)
        return made(moved, settings)

    monkeypatch.setattr(learning_rate_too_high, "too_large", counted)
    judge(thrown_about())
    assert len(asked) == 1


def test_what_follows_from_layers_is_found_once_for_all_windows_that_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []
    made = chain.is_link

    def counted(layer: Layer) -> bool:
        asked.append(layer)
        return made(layer)

    monkeypatch.setattr(chain, "is_link", counted)
    layers = Layers(mlp(4))
    looks = [replace(window(mlp(4), FLAT * scale), layers=layers) for scale in (1.0, 2.0)]
    for look in looks:
        chain.links(look)
        chain.links(look.until(10))
    assert asked == list(layers)


def test_a_window_is_freed_as_soon_as_it_was_judged() -> None:
    gc.disable()
    try:
        judged = thrown_about()
        assert judge(judged)
        left = weakref.ref(judged.statistics["norm"])
        del judged
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("severities", "expected"),
    [
        ([], Verdict.HEALTHY),
        ([Severity.INFO], Verdict.HEALTHY),
        ([Severity.WARNING, Severity.INFO], Verdict.WARNING),
        ([Severity.WARNING, Severity.CRITICAL], Verdict.CRITICAL),
    ],
)
def test_a_run_is_as_ill_as_its_gravest_finding(
    severities: list[Severity], expected: Verdict
) -> None:
    assert verdict([finding(severity) for severity in severities]) is expected


def test_nothing_recorded_is_no_finding() -> None:
    base = window(mlp(4), FLAT)
    assert judge(rows(base, slice(0, 0))) == []
    assert judge(rows(base, slice(0, 1))) == []
    assert judge(window([], np.zeros((50, 0)))) == []
    assert judge(Window(steps=np.arange(50), layers=mlp(4), statistics={}, scalars={})) == []


def test_after_nan_the_other_detectors_keep_silent() -> None:
    counts = np.zeros((50, 8))
    counts[20:] = 64
    norm = np.where(counts > 0, np.inf, 0.64)
    ruined = window(mlp(4), FLAT, zero_fraction=np.where(counts > 0, 1.0, 0.0))
    ruined = with_statistic(with_statistic(ruined, "nonfinite", counts), "norm", norm)
    ruined = with_statistic(ruined, "dead_fraction", np.where(counts > 0, 1.0, 0.0))
    assert [f.kind for f in judge(ruined)] == ["non_finite"]


STATISTICS = tuple(BY_NAME)
SCALARS = ("loss", "lr", "grad_scale", "amp_skipped", "total_norm_before_clip")
sizes = st.one_of(
    st.just(0.0), st.just(np.nan), st.just(np.inf), st.floats(1e-30, 1e30, allow_nan=False)
)


@st.composite
def any_windows(draw: st.DrawFn) -> Window:
    """Numbers of any size in every statistic and scalar, NaN and infinity among them."""
    layers = mlp(draw(st.integers(0, 5)))
    steps = sorted(draw(st.sets(st.integers(0, 2000), max_size=90)))
    # A few values, scattered by a seed: whole tables drawn one by one would be slow.
    pool = np.array(draw(st.lists(sizes, min_size=1, max_size=6)))
    chance = np.random.default_rng(draw(st.integers(0, 1 << 32)))

    def table() -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            return chance.choice(pool, (len(steps), len(layers))).astype(np.float32)

    def column() -> NDArray[np.float64]:
        return chance.choice(np.append(pool, -pool), len(steps))

    return Window(
        steps=np.array(steps, dtype=np.int64),
        layers=layers,
        statistics={name: table() for name in STATISTICS if draw(st.booleans())},
        scalars={name: column() for name in SCALARS if draw(st.booleans())},
        reported={"loss": np.ones(len(steps), dtype=np.bool_)},
    )


@settings(max_examples=300, deadline=None)
@given(any_windows())
def test_any_numbers_are_judged_without_error_or_warning(made: Window) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        findings = judge(made)
    for found in findings:
        assert found.kind in KINDS
        assert found.first_step <= found.last_step
        assert found.first_step in made.steps
        assert set(found.layers) <= {layer.name for layer in made.layers}
        numbers = [value for value in found.evidence.values() if isinstance(value, float)]
        assert np.isfinite(numbers).all()


@settings(deadline=None)
@given(st.permutations(range(14)))
def test_the_order_of_registration_does_not_matter(order: list[int]) -> None:
    layers, chain = mlp(7), np.repeat(10.0 ** -np.arange(9, 2, -1), 2)
    chain[:2] = 0.0
    here = judge(window([layers[place] for place in order], chain[order], dead_fraction=0.0))
    assert here == judge(window(layers, chain, dead_fraction=0.0))
