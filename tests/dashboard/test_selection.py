from fake_runs import FakeRun

from gradwatch_dashboard.selection import flow_rows, heatmap_rows, some_layers

RUN = FakeRun("r")


def test_every_word_must_be_in_a_layers_name() -> None:
    assert some_layers(["enc.0.Weight", "enc.0.bias", "dec.0.weight"], "weight ENC") == [0]
    assert some_layers(["a", "b"], " ") == [0, 1]


def test_a_heatmap_keeps_the_rows_of_the_layers_selected() -> None:
    whole = RUN.heatmap("norm")
    part = heatmap_rows(whole, "bias")
    assert part.layers == whole.layers[1::2]
    assert (part.high == whole.high[1::2]).all()
    assert (part.low == whole.low[1::2]).all()
    assert (part.nonfinite == whole.nonfinite[1::2]).all()
    assert heatmap_rows(whole, "") is whole


def test_a_flow_keeps_the_values_of_the_layers_selected() -> None:
    whole = RUN.flow()
    part = flow_rows(whole, "layers.3")
    assert part.layers == ["layers.3.weight", "layers.3.bias"]
    assert part.roles == ["weight", "bias"]
    assert part.statistics["norm"] == whole.statistics["norm"][6:8]
    assert flow_rows(whole, "") is whole


def test_no_layer_may_be_left() -> None:
    assert heatmap_rows(RUN.heatmap("norm"), "nothing").layers == []
    assert flow_rows(RUN.flow(), "nothing").layers == []
