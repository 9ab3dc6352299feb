import numpy as np
from fake_runs import FakeRun, typical_runs

from gradwatch.wire.api import Flow
from gradwatch_dashboard.flow import flow_figure


def bars(figure: object) -> dict[str, object]:
    return {trace.name: trace for trace in figure.data if trace.type == "bar"}  # type: ignore[attr-defined]


def words(figure: object) -> dict[str, str]:
    """Layer -> the word beside its row."""
    return {
        layer: text.strip()
        for trace in figure.data  # type: ignore[attr-defined]
        if trace.type == "scatter"
        for layer, text in zip(trace.y, trace.text, strict=True)
    }


def test_mean_std_and_max_have_bars_in_depth_order_on_a_log_axis() -> None:
    run = FakeRun("sigmoid", decay=0.1)
    figure = flow_figure(run.flow())
    assert list(bars(figure)) == ["max |g|", "std of g", "mean |g|"]
    for bar in bars(figure).values():
        assert list(bar.y) == run.layers
        assert bar.x.dtype == np.float32
    assert figure.layout.xaxis.type == "log"
    bottom, top = figure.layout.yaxis.range
    assert bottom > top  # the input's layer at the top


def test_the_axis_holds_every_bar() -> None:
    figure = flow_figure(FakeRun("sigmoid", decay=0.1).flow())
    values = np.concatenate([bar.x for bar in bars(figure).values()])
    low, high = figure.layout.xaxis.range
    assert low < np.log10(values.min())
    assert np.log10(values.max()) <= high


def test_a_layer_without_gradient_says_so_instead_of_a_bar() -> None:
    figure = flow_figure(FakeRun("dead", dead=(2,)).flow())
    assert words(figure) == {"layers.1.weight": "exactly 0"}
    assert np.isnan(bars(figure)["max |g|"].x[2])


def test_a_layer_with_non_finite_values_says_how_many() -> None:
    figure = flow_figure(FakeRun("nan", nan_from=400).flow())
    assert words(figure) == {
        "layers.4.weight": "✕ 64 NaN or Inf elements",
        "layers.4.bias": "✕ 64 NaN or Inf elements",
    }


def test_a_frame_that_measured_nothing_still_draws() -> None:
    flow = Flow(step=1, layers=["a"], roles=["weight"], statistics={"norm": [None]})
    assert np.isnan(bars(flow_figure(flow))["std of g"].x).all()


def test_hundreds_of_layers_are_bars_without_gaps() -> None:
    figure = flow_figure(typical_runs()[-1].flow())
    assert {bar.width for bar in bars(figure).values()} == {1.0}
    assert len(figure.layout.yaxis.ticktext) < 100
