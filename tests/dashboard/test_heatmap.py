import time

import numpy as np
from fake_runs import FakeRun, finding, heatmap_of, typical_runs

from gradwatch_dashboard.axes import MAX_ROWS_PX, NAME_WIDTH
from gradwatch_dashboard.heatmap import (
    MAX_CROSSES,
    NONFINITE,
    ZERO,
    cells_of,
    crosses,
    heatmap_figure,
)

STEPS = np.arange(1, 5)
LAYERS = ["a.weight", "b.weight"]


def test_ordinary_values_are_coloured_by_their_log10() -> None:
    high = np.array([[1e-6, 1e-5, 1e-4, 1e-3], [1, 10, 100, 1000]], dtype=np.float32)
    cells = cells_of(heatmap_of(LAYERS, STEPS, high))
    np.testing.assert_allclose(cells.colour, np.log10(high), rtol=1e-5)
    assert (cells.scale.bottom, cells.scale.top) == (-6, 3)


def test_exact_zero_has_a_colour_of_its_own_apart_from_the_tiniest_value() -> None:
    high = np.array([[0, 1e-38, 1, 1], [1, 1, 1, 1]], dtype=np.float32)
    cells = cells_of(heatmap_of(LAYERS, STEPS, high))
    assert cells.scale.zero
    assert cells.colour[0, 0] < cells.scale.low <= cells.colour[0, 1]
    assert cells.scale.colours()[0] == (0.0, ZERO)
    assert ZERO not in [colour for place, colour in cells.scale.colours() if place > 0.06]
    assert cells.value[0, 0] == 0


def test_a_non_finite_gradient_outranks_the_finite_value_of_its_column() -> None:
    high = np.ones((2, 4), dtype=np.float32)
    nonfinite = np.zeros((2, 4), dtype=np.bool_)
    nonfinite[1, 2:] = True
    cells = cells_of(heatmap_of(LAYERS, STEPS, high, nonfinite))
    assert (cells.colour[1, 2:] > cells.scale.high).all()
    assert (cells.colour[0] <= cells.scale.high).all()
    assert np.isnan(cells.value[1, 2:]).all()
    assert cells.scale.colours()[-1] == (1.0, NONFINITE)


def test_what_was_not_measured_has_no_colour_and_no_legend_tells_of_what_is_absent() -> None:
    high = np.array([[np.nan, 1, 1, 1], [1, 1, 1, 1]], dtype=np.float32)
    figure = heatmap_figure(heatmap_of(LAYERS, STEPS, high))
    assert np.isnan(figure.data[0].z[0, 0])
    assert [trace.name for trace in figure.data[1:]] == ["not measured"]


def test_a_map_without_one_measured_value_still_draws() -> None:
    high = np.full((2, 4), np.nan, dtype=np.float32)
    figure = heatmap_figure(heatmap_of(LAYERS, STEPS, high))
    assert figure.data[0].zmin < figure.data[0].zmax


def test_a_map_without_columns_still_draws() -> None:
    empty = heatmap_of(LAYERS, np.array([], dtype=np.int64), np.empty((2, 0), dtype=np.float32))
    assert heatmap_figure(empty, [finding("vanishing", "r")]).data[0].z.shape == (2, 0)


def test_the_input_layer_stands_at_the_top() -> None:
    figure = heatmap_figure(heatmap_of(LAYERS, STEPS, np.ones((2, 4), dtype=np.float32)))
    bottom, top = figure.layout.yaxis.range
    assert bottom > top
    assert list(figure.data[0].y) == LAYERS


def test_shares_have_a_linear_scale_from_0_to_1() -> None:
    high = np.array([[0, 0.25, 0.5, 1], [0, 0, 0, 0]], dtype=np.float32)
    cells = cells_of(heatmap_of(LAYERS, STEPS, high, statistic="dead_fraction"))
    np.testing.assert_array_equal(cells.colour, high)
    assert (cells.scale.bottom, cells.scale.top) == (0, 1)


def test_a_map_of_counts_shows_the_counts_and_leaves_zero_uncoloured() -> None:
    high = np.array([[0, 0, 100, 1000], [0, 0, 0, 0]], dtype=np.float32)
    cells = cells_of(heatmap_of(LAYERS, STEPS, high, high > 0, statistic="nonfinite"))
    np.testing.assert_allclose(cells.colour[0, 2:], [2, 3], rtol=1e-6)
    assert np.isnan(cells.colour[1]).all()
    assert not cells.scale.zero


def test_each_finding_has_a_line_at_its_first_step() -> None:
    heatmap = heatmap_of(LAYERS, STEPS, np.ones((2, 4), dtype=np.float32))
    found = [finding("vanishing", "r", first_step=2), finding("exploding", "r", first_step=4)]
    figure = heatmap_figure(heatmap, found)
    assert {shape.x0 for shape in figure.layout.shapes} == {2, 4}
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert texts == ["▼ Vanishing gradients, step 2", "Exploding gradients, step 4 ▼"]


def test_numbers_travel_as_float32_bytes_and_not_as_lists() -> None:
    run = typical_runs()[-1]
    figure = heatmap_figure(run.heatmap("norm"))
    assert figure.data[0].z.dtype == np.float32
    assert figure.data[0].customdata.dtype == np.float32
    assert len(figure.to_json()) < 2_000_000


def test_300_layers_by_400_columns_are_ready_in_a_second_and_no_taller_than_a_page() -> None:
    heatmap = FakeRun("deep", depth=300, steps_n=400, nan_from=200).heatmap("norm")
    start = time.perf_counter()
    figure = heatmap_figure(heatmap)
    figure.to_json()
    assert time.perf_counter() - start < 2
    assert figure.layout.height < MAX_ROWS_PX + 200


def test_long_names_are_elided_beside_the_rows_and_whole_when_hovered() -> None:
    name = "encoder." * 20 + "weight"
    figure = heatmap_figure(heatmap_of([name, "b"], STEPS, np.ones((2, 4), dtype=np.float32)))
    label = figure.layout.yaxis.ticktext[0]
    assert len(label) == NAME_WIDTH
    assert label.startswith("encoder")
    assert label.endswith("weight")
    assert figure.data[0].y[0] == name


def test_crosses_mark_the_first_non_finite_cell_of_a_layer_and_stay_few() -> None:
    nonfinite = np.zeros((300, 400), dtype=np.bool_)
    nonfinite[:, 37:] = True
    rows, columns = crosses(nonfinite)
    assert 0 < rows.size <= MAX_CROSSES
    assert columns[rows == rows[0]].min() == 37
    single = np.zeros((10, 400), dtype=np.bool_)
    single[3, 250] = True
    assert [index.tolist() for index in crosses(single)] == [[3], [250]]
