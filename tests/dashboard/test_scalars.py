import numpy as np
from fake_runs import finding, scalars_of

from gradwatch_dashboard.scalars import panels, scalars_figure

STEPS = np.arange(1, 101, dtype=np.int64)


def test_panels_are_losses_then_norms_then_the_learning_rate_then_others() -> None:
    names = ["total_norm", "step_time", "lr", "val_loss", "loss", "clipped_norm"]
    assert panels(names) == [
        ("loss", ["loss", "val_loss"]),
        ("gradient norm", ["clipped_norm", "total_norm"]),
        ("lr", ["lr"]),
        ("step_time", ["step_time"]),
    ]


def test_what_ranks_are_compared_by_comes_after_what_the_script_logs() -> None:
    names = ["rank_disagreement", "rank_others_s", "rank_slowest_s", "step_time_s", "val_accuracy"]
    assert panels(names) == [
        ("val_accuracy", ["val_accuracy"]),
        ("seconds a step", ["rank_others_s", "rank_slowest_s", "step_time_s"]),
        ("rank_disagreement", ["rank_disagreement"]),
    ]


def test_a_curve_leaves_out_steps_without_a_value() -> None:
    loss = np.linspace(2, 1, 100)
    loss[10:20] = np.nan
    (curve,) = scalars_figure(scalars_of(STEPS, loss=loss)).data
    assert curve.x.size == curve.y.size == 90
    assert curve.y.dtype == np.float32


def test_values_that_are_not_finite_are_crosses() -> None:
    loss = np.linspace(2, 1, 100)
    loss[50:] = np.inf
    curve, crosses = scalars_figure(scalars_of(STEPS, loss=loss)).data
    assert curve.x.max() == 50
    assert list(crosses.x) == list(range(51, 101))
    assert np.isfinite(crosses.y).all()


def test_values_over_many_decades_have_a_log_axis_and_others_start_at_0() -> None:
    figure = scalars_figure(
        scalars_of(STEPS, loss=np.linspace(2, 1, 100), total_norm=np.logspace(-3, 3, 100))
    )
    assert figure.layout.yaxis.rangemode == "tozero"
    assert figure.layout.yaxis.type is None
    assert figure.layout.yaxis2.type == "log"


def test_all_panels_share_their_steps_and_show_where_findings_begin() -> None:
    scalars = scalars_of(STEPS, loss=np.ones(100), lr=np.ones(100))
    figure = scalars_figure(scalars, [finding("exploding", "r", first_step=40)])
    assert figure.layout.xaxis2.matches == "x"
    assert [shape.x0 for shape in figure.layout.shapes] == [40, 40]


def test_a_run_without_any_value_still_draws() -> None:
    nothing = np.full(100, np.nan)
    assert len(scalars_figure(scalars_of(STEPS, loss=nothing)).data) == 1
    empty = np.array([], dtype=np.int64)
    assert scalars_figure(scalars_of(empty)).data == ()
    assert len(scalars_figure(scalars_of(empty, loss=np.array([]))).data) == 1


def test_no_range_is_fixed_so_that_a_zoom_outlives_new_steps() -> None:
    run = scalars_of(STEPS, loss=np.linspace(2, 1, 100), total_norm=np.logspace(-3, 3, 100))
    layout = scalars_figure(run).layout
    assert [axis.range for axis in (layout.xaxis, layout.yaxis, layout.yaxis2)] == [None] * 3
