"""Every statistic equals the one computed by hand, in float64, from the full gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwatch import gather, measure, reduce
from gradwatch.gather import SAMPLE_SIZE
from gradwatch.layers import Layer, named_layers
from gradwatch.measure import Meter, read_scalar
from gradwatch.reading import DETAIL_COLUMNS, NORM_COLUMNS, Statistics
from gradwatch.sampling import RUN
from gradwatch.units import DEAD_AFTER_FRAMES
from gradwatch.wire.histogram import ZERO, histogram


@pytest.fixture(
    autouse=True, params=["copied whole", "reduced in place", "reduced in small pieces"]
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model is copied, a large one is not: what is measured must be the same."""
    if request.param != "copied whole":
        monkeypatch.setattr(measure, "SMALL_MODEL", 0)
        monkeypatch.setattr(gather, "WHOLE_SIZE", 0)
    if request.param == "reduced in small pieces":
        monkeypatch.setattr(reduce, "PIECE", 64)


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def parameter(gradient: Tensor | None, weight: Tensor | None = None) -> nn.Parameter:
    if weight is None:
        weight = torch.ones(3) if gradient is None else torch.ones_like(gradient)
    held = nn.Parameter(weight)
    held.grad = gradient
    return held


def layers(*parameters: Tensor) -> list[Layer]:
    return [Layer(f"{place}.weight", tensor, None) for place, tensor in enumerate(parameters)]


def details(*parameters: Tensor, scale: Tensor | None = None) -> Statistics:
    reading = Meter(layers(*parameters)).details(parameters, scale)
    assert reading is not None
    return reading.resolve()


def norms(*parameters: Tensor, scale: Tensor | None = None) -> Statistics:
    reading = Meter(layers(*parameters)).norms(parameters, scale)
    assert reading is not None
    return reading.resolve()


def value(found: Statistics, statistic: str, layer: int = 0) -> float:
    return float(found.values[found.columns.index(statistic), layer])


def by_hand(gradient: Tensor) -> dict[str, float]:
    """The definitions, in float64. Complex numbers count by their modulus."""
    full = gradient.to_dense()
    exact = (full.abs() if full.is_complex() else full).double().numpy()
    return {
        "norm": float(np.sqrt(np.sum(exact**2))),
        "mean_abs": float(np.abs(exact).mean()),
        "absmax": float(np.abs(exact).max()),
        "std": float(exact.std()),
        "zero_fraction": float((exact == 0).mean()),
        "nonfinite": float(np.count_nonzero(~np.isfinite(exact))),
    }


def near(expected: float, gradient: Tensor) -> object:
    """Five digits; what comes of a difference of squares may be off by as much of the size."""
    size = by_hand(gradient)["absmax"]
    return pytest.approx(expected, rel=2e-5, abs=2e-5 * size if math.isfinite(size) else 0)


def with_zeros() -> Tensor:
    gradient = seeded(20, 30)
    gradient[:, :7] = 0
    return gradient


GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: seeded(20, 30).float(),
    "float64": lambda: seeded(20, 30),
    "float16": lambda: seeded(20, 30).half(),
    "bfloat16": lambda: seeded(20, 30).bfloat16(),
    "complex64": lambda: torch.complex(seeded(9, 9), seeded(9, 9) ** 2).to(torch.complex64),
    "complex128": lambda: torch.complex(seeded(9, 9), seeded(9, 9) ** 2),
    "transposed": lambda: seeded(20, 30).float().t(),
    "every other column": lambda: seeded(20, 30).float()[:, ::2],
    "channels last": lambda: seeded(4, 3, 8, 8).float().to(memory_format=torch.channels_last),
    "one number": lambda: seeded(1).float(),
    "zero-dimensional": lambda: seeded(1).float().reshape(()),
    "a share of zeros": lambda: with_zeros().float(),
    "all zeros": lambda: torch.zeros(5, 5),
    "of 1e30": lambda: (seeded(20, 30) * 1e30).float(),
    "of 1e-30": lambda: (seeded(20, 30) * 1e-30).float(),
    "of 1e-21": lambda: (seeded(20, 30) * 1e-21).float(),
    "of 1e-22": lambda: (seeded(20, 30) * 1e-22).float(),
    "denormal": lambda: (seeded(20, 30) * 1e-40).float(),
    "near the largest float16": lambda: (seeded(20, 30).clamp(-1, 1) * 60_000).half(),
    "far from its own mean": lambda: (100 + seeded(20, 30)).float(),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_every_statistic_is_the_one_computed_by_hand(kind: str) -> None:
    gradient = GRADIENTS[kind]()
    found = details(parameter(gradient))
    assert found.columns == DETAIL_COLUMNS
    for statistic, expected in by_hand(gradient).items():
        assert value(found, statistic) == near(expected, gradient), statistic


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_norm_frame_has_the_same_norms_as_a_detail_frame(kind: str) -> None:
    gradient = GRADIENTS[kind]()
    found = norms(parameter(gradient))
    assert found.columns == NORM_COLUMNS
    assert found.histograms is None
    assert value(found, "norm") == pytest.approx(
        value(details(parameter(gradient)), "norm"), rel=1e-6
    )


def test_layers_of_all_kinds_are_measured_together_each_by_itself() -> None:
    made = [make() for make in GRADIENTS.values()]
    found = details(*(parameter(gradient) for gradient in made))
    for place, gradient in enumerate(made):
        for statistic, expected in by_hand(gradient).items():
            assert value(found, statistic, place) == near(expected, gradient)


@pytest.mark.parametrize("size", [10, reduce.LARGE + 1])
@pytest.mark.parametrize("small_model", [0, measure.SMALL_MODEL])
def test_new_tensors_of_the_script_may_lie_on_another_device_by_default(
    size: int, small_model: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "SMALL_MODEL", small_model)
    made = [seeded(size).float(), seeded(60, 50).float()]
    held = [parameter(each) for each in made]
    torch.set_default_device("meta")  # as scripts do with "cuda"
    try:
        detailed, normed = details(*held), norms(*held)
    finally:
        torch.set_default_device(None)
    for place, gradient in enumerate(made):
        for statistic, expected in by_hand(gradient).items():
            if statistic != "zero_fraction":  # of a sample
                assert value(detailed, statistic, place) == near(expected, gradient), statistic
        assert value(normed, "norm", place) == near(by_hand(gradient)["norm"], gradient)


def test_a_sparse_gradient_is_measured_by_the_rows_it_has() -> None:
    embedding = nn.Embedding(50, 4, sparse=True)
    embedding(torch.tensor([3, 7, 3])).pow(2).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    found = details(embedding.weight)
    rows = gradient.coalesce().values()
    assert value(found, "norm") == pytest.approx(by_hand(gradient)["norm"], rel=1e-6)
    assert value(found, "mean_abs") == pytest.approx(by_hand(rows)["mean_abs"], rel=1e-6)
    assert value(found, "zero_fraction") == 0
    assert embedding.weight.grad is gradient


def test_a_gradient_without_elements_or_none_at_all_is_not_measured() -> None:
    found = details(parameter(None), parameter(torch.zeros(0, 4)), parameter(torch.full((2,), 3.0)))
    assert np.isnan(found.values[:, :2]).all()
    assert value(found, "norm", 2) == pytest.approx(math.sqrt(18))


def test_there_is_no_reading_when_no_layer_has_a_gradient() -> None:
    held = [parameter(None), parameter(torch.zeros(0))]
    assert Meter(layers(*held)).details(held) is None
    assert Meter(layers(*held)).norms(held) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_non_finite_elements_are_counted_exactly(dtype: torch.dtype) -> None:
    gradient = seeded(50, 40).to(dtype)
    gradient[3, :] = math.nan
    gradient[7, 5] = math.inf
    gradient[8, 5] = -math.inf
    healthy = seeded(5).to(dtype)
    for found in (
        norms(parameter(gradient), parameter(healthy)),
        details(parameter(gradient), parameter(healthy)),
    ):
        assert value(found, "nonfinite", 0) == 42
        assert value(found, "nonfinite", 1) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_the_largest_magnitude_of_a_layer_that_is_not_finite_is_not_either(
    dtype: torch.dtype, bad: float
) -> None:
    gradient = seeded(60, 50).to(dtype)
    gradient[31, 7] = bad
    gradient[31, 9] = 1e4
    (reduced,) = reduce.reduce_layers([gradient], [0]).peaks
    assert reduced[31].item() == pytest.approx(abs(bad), nan_ok=True)
    others = torch.cat([gradient[:31], gradient[32:]]).abs().amax(1).to(reduced.dtype)
    assert torch.equal(torch.cat([reduced[:31], reduced[32:]]), others)


def test_a_non_finite_complex_element_is_counted_once() -> None:
    gradient = torch.ones(4, dtype=torch.complex64)
    gradient[1] = complex(math.nan, math.inf)
    assert value(details(parameter(gradient)), "nonfinite") == 1


def test_a_norm_too_large_for_float32_is_not_taken_for_non_finite() -> None:
    found = norms(parameter(torch.full((100,), 3e38)))
    assert value(found, "nonfinite") == 0
    assert value(found, "norm") == math.inf


def test_the_weight_norm_is_that_of_the_weight() -> None:
    weight = seeded(6, 5).float()
    found = details(parameter(torch.ones(6, 5), weight))
    assert value(found, "weight_norm") == pytest.approx(by_hand(weight)["norm"], rel=1e-6)


def test_the_histogram_of_a_small_layer_is_that_of_its_gradient() -> None:
    gradient = with_zeros().float()
    found = details(parameter(gradient))
    assert found.histograms is not None
    assert np.array_equal(found.histograms[0], histogram(gradient.numpy()))
    assert found.histograms[0, ZERO] == 140


@pytest.mark.parametrize("size", [1025, 2047, 5000, 1_000_003])
def test_the_histogram_of_a_large_layer_samples_it_from_end_to_end(size: int) -> None:
    gradient = torch.ones(size)
    gradient[size // 2 :] = 0
    found = details(parameter(gradient))
    assert found.histograms is not None
    counts = found.histograms[0].astype(int)
    assert SAMPLE_SIZE / 2 <= counts.sum() <= SAMPLE_SIZE
    assert counts[ZERO] == pytest.approx(counts.sum() / 2, abs=RUN)
    assert value(found, "zero_fraction") == pytest.approx(0.5, abs=2 * RUN / SAMPLE_SIZE)


def test_gradients_that_carry_a_loss_scale_are_measured_without_it() -> None:
    gradient = seeded(20, 30).float()
    scale = torch.tensor(1024.0)
    plain, scaled = parameter(gradient), parameter(gradient * 1024)
    for ask in (norms, details):
        expected, found = ask(plain), ask(scaled, scale=scale)
        unlike = found.columns.index("nonfinite")
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)
        assert found.values[unlike, 0] == 0
    expected, found = details(plain), details(scaled, scale=scale)
    assert expected.histograms is not None
    assert found.histograms is not None
    assert np.array_equal(found.histograms, expected.histograms)


def test_measuring_changes_no_gradient() -> None:
    gradients = [make() for make in GRADIENTS.values()]
    before = [gradient.clone() for gradient in gradients]
    details(*(parameter(gradient) for gradient in gradients))
    assert all(torch.equal(one, other) for one, other in zip(gradients, before, strict=True))


class Units:
    """A module whose gradients a test sets, measured frame after frame."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = list(named_layers([module]))
        self.meter = Meter(self.layers)

    def frame(self, dead: tuple[int, ...], dim: int, living_bias: tuple[int, ...] = ()) -> float:
        """The weight's dead fraction when these units have no gradient."""
        for layer in self.layers:
            gradient = torch.ones_like(layer.parameter)
            for unit in dead:
                if layer.name == "weight":
                    gradient.select(dim, unit).zero_()
                elif unit not in living_bias:
                    gradient[unit] = 0
            layer.parameter.grad = gradient
        reading = self.meter.details([layer.parameter for layer in self.layers])
        assert reading is not None
        place = [layer.name for layer in self.layers].index("weight")
        return value(reading.resolve(), "dead_fraction", place)


UNIT_MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Linear": (lambda: nn.Linear(3, 8), 0),
    "Linear without bias": (lambda: nn.Linear(3, 8, bias=False), 0),
    "Conv1d": (lambda: nn.Conv1d(3, 8, 3), 0),
    "Conv2d": (lambda: nn.Conv2d(3, 8, 3), 0),
    "Conv3d": (lambda: nn.Conv3d(3, 8, 3), 0),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 8, 3), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 8, 3), 1),
    "Linear of float64": (lambda: nn.Linear(3, 8, dtype=torch.float64), 0),
    "Linear of float16": (lambda: nn.Linear(3, 8, dtype=torch.float16), 0),
    "Linear of bfloat16": (lambda: nn.Linear(3, 8, dtype=torch.bfloat16), 0),
    "Linear of complex64": (lambda: nn.Linear(3, 8, dtype=torch.complex64), 0),
}


@pytest.mark.parametrize("kind", UNIT_MODULES)
def test_units_without_gradient_for_five_detail_frames_are_dead(kind: str) -> None:
    make, dim = UNIT_MODULES[kind]
    units = Units(make())
    early = [units.frame((1, 6), dim) for _ in range(DEAD_AFTER_FRAMES - 1)]
    assert all(math.isnan(fraction) for fraction in early)
    assert units.frame((1, 6), dim) == pytest.approx(2 / 8)


def test_a_unit_that_gets_a_gradient_again_is_alive_at_once() -> None:
    units = Units(nn.Linear(3, 8))
    for _ in range(DEAD_AFTER_FRAMES + 1):
        units.frame((1, 6), 0)
    assert units.frame((6,), 0) == pytest.approx(1 / 8)
    assert units.frame((1, 6), 0) == pytest.approx(1 / 8)


def test_a_unit_whose_bias_has_a_gradient_is_alive() -> None:
    units = Units(nn.Linear(3, 8))
    fractions = [units.frame((1, 6), 0, living_bias=(6,)) for _ in range(DEAD_AFTER_FRAMES)]
    assert fractions[-1] == pytest.approx(1 / 8)


def test_a_unit_with_gradients_too_small_to_square_is_alive() -> None:
    layer = nn.Linear(3, 2, bias=False)
    meter = Meter(list(named_layers([layer])))
    layer.weight.grad = torch.full((2, 3), 1e-40)
    layer.weight.grad[1] = 0
    for _ in range(DEAD_AFTER_FRAMES):
        reading = meter.details([layer.weight])
        assert reading is not None
        found = reading.resolve()
    assert value(found, "dead_fraction") == pytest.approx(1 / 2)


@pytest.mark.parametrize("module", [nn.Embedding(8, 3), nn.LayerNorm(8), nn.LSTM(3, 8)])
def test_rows_that_are_no_units_are_never_called_dead(module: nn.Module) -> None:
    found = list(named_layers([module]))
    meter = Meter(found)
    for layer in found:
        layer.parameter.grad = torch.zeros_like(layer.parameter)
    for _ in range(DEAD_AFTER_FRAMES):
        reading = meter.details([layer.parameter for layer in found])
        assert reading is not None
        reading.resolve()
    dead = reading.resolve().values[DETAIL_COLUMNS.index("dead_fraction")]
    assert np.isnan(dead).all()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2, 2.0),
        (0.5, 0.5),
        (np.float32(0.25), 0.25),
        (torch.tensor(0.75), 0.75),
        (torch.tensor([[3]]), 3.0),
        (torch.tensor(True), 1.0),
        (torch.tensor(0.1, dtype=torch.bfloat16), 0.10009765625),
        (torch.tensor(math.inf), math.inf),
    ],
)
def test_a_scalar_is_read_whatever_holds_it(given: float | Tensor, expected: float) -> None:
    assert read_scalar(given)() == expected


def test_a_scalar_is_the_number_at_the_time_of_reading_not_later() -> None:
    loss = torch.tensor(1.0)
    reader = read_scalar(loss)
    loss += 1
    assert reader() == 1.0
