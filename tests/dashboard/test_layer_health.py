import numpy as np
from fake_runs import heatmap_of

from gradwatch.wire.api import LayersView, LayerView
from gradwatch_dashboard.heatmap import heatmap_figure
from gradwatch_dashboard.layer_health import edges, rows, scores, summary
from gradwatch_dashboard.verdicts import SEVERITIES

RED, AMBER, BLUE = (SEVERITIES[name].colour for name in ("critical", "warning", "info"))


def told(**given: float | None) -> LayersView:
    return LayersView(
        definition="as it is",
        step=4,
        layers=[
            LayerView(name=name, role="weight", score=score, findings=[], norm=1.0)
            for name, score in given.items()
        ],
    )


def test_neighbours_of_one_colour_share_an_edge_and_layers_that_are_well_have_none() -> None:
    ill = {"b": 25.0, "c": 6.25, "d": 65.0, "f": 95.0}
    shapes = edges("abcdef", ill)
    assert [(shape["y0"], shape["y1"], shape["fillcolor"]) for shape in shapes] == [
        (0.5, 2.5, RED),
        (2.5, 3.5, AMBER),
        (4.5, 5.5, BLUE),
    ]
    assert edges("abc", {}) == []


def test_only_a_picture_with_edges_makes_room_for_them() -> None:
    heatmap = heatmap_of(["a", "b"], np.arange(1, 5), np.ones((2, 4), dtype=np.float32))
    plain, edged = heatmap_figure(heatmap), heatmap_figure(heatmap, (), {"b": 65.0})
    assert not plain.layout.shapes
    assert plain.layout.yaxis.ticklabelstandoff == 0
    (shape,) = edged.layout.shapes
    # Between the names and the map, on neither.
    assert -edged.layout.yaxis.ticklabelstandoff < shape.x0 < shape.x1 < 0
    assert (shape.y0, shape.y1) == (0.5, 1.5)


def test_layers_that_do_worst_come_first_and_equals_keep_their_order() -> None:
    view = told(a=100.0, b=65.0, c=25.0, d=65.0)
    assert rows(view)["layer"] == ["c", "b", "d", "a"]
    assert scores(view) == {"b": 65.0, "c": 25.0, "d": 65.0}
    assert summary(view) == "Health of each layer: 3 of 4 layers below 100"
    assert summary(told(a=100.0)) == "Health of each layer: 1 layer at 100"


def test_before_the_first_judgement_no_layer_is_called_well() -> None:
    view = told(a=None, b=None)
    assert scores(view) == {}
    assert summary(view).endswith("nothing was judged yet")
    assert rows(view)["health"] == [None, None]


def test_a_kind_that_a_newer_collector_sends_is_shown_as_it_is() -> None:
    view = LayersView(
        definition="",
        step=None,
        layers=[LayerView(name="a", role="bias", score=65.0, findings=["new_kind"], norm=None)],
    )
    assert rows(view)["findings"] == ["new_kind"]
