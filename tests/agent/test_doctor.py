"""The doctor names each fault of a real model, passes healthy ones, and leaves all as it was."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gradwatch
from gradwatch.checkup.checks import CHECKS
from gradwatch.checkup.derivatives import slopes_of_function
from gradwatch.checkup.doctor import observed
from gradwatch.checkup.observation import FunctionCall
from gradwatch.checkup.verdict import Report, Status, Verdict, gravest

WRONG, PASSED, ADVICE, SKIPPED = Status.WRONG, Status.PASSED, Status.ADVICE, Status.SKIPPED


class Case(NamedTuple):
    """What the doctor is given."""

    model: nn.Module
    batch: Any
    loss: Callable[..., Tensor] | None = F.cross_entropy
    optimizer: torch.optim.Optimizer | None = None

    def report(self) -> Report:
        return gradwatch.doctor(self.model, self.batch, self.loss, self.optimizer)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def data(classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(32, 12), torch.arange(32) % classes


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, out: int = 5) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 12
    for width in widths or (24, 24):
        layers += [nn.Linear(before, width), activation()]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, out))


class Wrong(torch.autograd.Function):
    """A square whose derivative has the wrong sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -2 * x * grads[0]


class Right(Wrong):
    """The same with its derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class Rounded(torch.autograd.Function):
    """Rounding with a straight-through gradient, as in quantisation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.mul(4).round().div(4)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Reversed(torch.autograd.Function):
    """Gradient reversal, as in domain adaptation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


class Between(nn.Module):
    """Applies a function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def turned(x: Tensor) -> Tensor:
    """A hook that turns the gradient around, as a slip in a module by hand does."""
    y = torch.tanh(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: -gradient)
    return y


class Turned(nn.Module):
    """Learns the opposite."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return turned(self.net(x))


def weighted(change: Callable[[Tensor], Any], place: int = 0) -> Case:
    """An MLP with other weights in one layer."""
    model = mlp()
    with torch.no_grad():
        change(model[place].weight)
    return Case(model, data())


class Listed(nn.Module):
    """Keeps its layers where parameters() does not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = [nn.Linear(12, 12) for _ in range(2)], nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


class Cosines(nn.Module):
    """Scaled cosines of embeddings and class centres, as in metric learning."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.centres = mlp(out=16), nn.Parameter(torch.randn(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        return 60 * F.linear(F.normalize(self.net(x)), F.normalize(self.centres))


def words() -> tuple[Tensor, Tensor]:
    """Rows of a text's words, weighted: nearly all are 0."""
    rows = torch.rand(32, 12) * (torch.rand(32, 12) > 0.9)
    rows[0, 0] = 1e-4
    rows[1:, 0] = 0
    return F.normalize(rows + torch.eye(32, 12)), data()[1]


def headless() -> Case:
    """The optimizer was built before the head was replaced."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model[4] = nn.Linear(24, 5)
    return Case(model, data(), optimizer=optimizer)


def frozen_head() -> Case:
    model = mlp()
    model[4].requires_grad_(False)
    return Case(model, data(), optimizer=torch.optim.Adam(model.parameters()))


def with_nan() -> tuple[Tensor, Tensor]:
    inputs, labels = data()
    inputs[3, 2] = math.nan
    return inputs, labels


def out_of_unit_interval(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output[:, 0], target.float() * 2 - 1)


def log_of_output(output: Tensor, target: Tensor) -> Tensor:
    return -output.gather(1, target[:, None]).log().mean()


FAULTY: dict[str, tuple[str, Callable[[], Case]]] = {
    "NaN in a row": ("input_values", lambda: Case(mlp(), with_nan())),
    "pixels of 0 to 255": ("input_scale", lambda: Case(mlp(), (data()[0].abs() * 99, data()[1]))),
    "divided by 255 twice": ("input_scale", lambda: Case(mlp(), (data()[0] / 999, data()[1]))),
    "years as a feature": ("input_scale", lambda: Case(mlp(), (data()[0] / 99 + 2, data()[1]))),
    "a column in grams": (
        "input_scale",
        lambda: Case(mlp(), (data()[0] * torch.tensor([1e-4] + [1.0] * 11), data()[1])),
    ),
    "constant inputs": ("input_scale", lambda: Case(mlp(), (torch.ones(32, 12), data()[1]))),
    "labels from 1 to 5": ("labels", lambda: Case(mlp(), (data()[0], data()[1] + 1))),
    "labels of -1 and 1": ("labels", lambda: Case(mlp(), data(2), out_of_unit_interval)),
    "outputs and targets broadcast": (
        "labels",
        lambda: Case(mlp(out=1), (data()[0], data()[0].sum(1)), F.mse_loss),
    ),
    "one class": ("classes", lambda: Case(mlp(), (data()[0], data()[1] * 0))),
    "NaN in a weight": (
        "weight_values",
        lambda: weighted(lambda w: w.fill_(math.nan)),
    ),
    "weights of N(0, 10)": (
        "weight_scale",
        lambda: weighted(lambda w: w.normal_(0, 10)),
    ),
    "weights of N(0, 1e-5)": (
        "weight_scale",
        lambda: weighted(lambda w: w.normal_(0, 1e-5)),
    ),
    "an embedding of 1e4": (
        "weight_scale",
        lambda: Case(
            nn.Sequential(nn.Embedding.from_pretrained(torch.randn(9, 5) * 1e4, freeze=False)),
            (torch.arange(9), torch.arange(9) % 5),
        ),
    ),
    "all weights equal": (
        "identical_units",
        lambda: weighted(lambda w: w.fill_(0.1), 2),
    ),
    "layers of zeros in series": (
        "identical_units",
        lambda: Case(
            nn.Sequential(*(module for _ in range(3) for module in (zero_layer(), nn.Tanh()))),
            (torch.randn(32, 5), data()[1]),
        ),
    ),
    "shapes that do not fit": ("forward", lambda: Case(mlp(), (torch.randn(32, 13), data()[1]))),
    "an output of infinity": ("forward", lambda: Case(Between(lambda x: (99 * x).exp()), data())),
    "log of an output": ("domains", lambda: Case(mlp(), data(), log_of_output)),
    "sqrt of zero": (
        "domains",
        lambda: Case(mlp(), data(), lambda y, _: (y - y.detach()).square().sum(1).sqrt().mean()),
    ),
    "division by zero": ("domains", lambda: Case(mlp(), data(), lambda y, _: (y / (y * 0)).mean())),
    "softmax before cross-entropy": (
        "softmax",
        lambda: Case(nn.Sequential(mlp(), nn.Softmax(1)), data()),
    ),
    "sigmoid before a loss on logits": (
        "softmax",
        lambda: Case(
            nn.Sequential(mlp(out=1), nn.Sigmoid(), nn.Flatten(0)),
            (data()[0], (data()[1] % 2).float()),
            F.binary_cross_entropy_with_logits,
        ),
    ),
    "log-softmax over the samples": (
        "softmax",
        lambda: Case(nn.Sequential(mlp(), nn.LogSoftmax(0)), data(), F.nll_loss),
    ),
    "logits given to nll_loss": ("softmax", lambda: Case(mlp(), data(), F.nll_loss)),
    "an output far too large": ("chance", lambda: Case(Between(lambda x: x * 500), data())),
    "everything frozen": ("backward", lambda: Case(mlp().requires_grad_(False), data())),
    "an infinite gradient": (
        "backward",
        lambda: Case(mlp(), data(), lambda y, _: (y - y.detach()).square().sum(1).sqrt().mean()),
    ),
    "ten sigmoids": (
        "gradient_range",
        lambda: Case(mlp(*[24] * 10, activation=nn.Sigmoid), data()),
    ),
    "a deep net that explodes": (
        "gradient_range",
        lambda: Case(scaled(mlp(*[24] * 24, activation=nn.Tanh), 9.0), data()),
    ),
    "a detach": ("reached", lambda: Case(Between(lambda x: x.detach()), data())),
    "dead at birth": ("reached", lambda: Case(Between(lambda x: F.relu(x - 99)), data())),
    "four sigmoids": ("sigmoids", lambda: Case(mlp(*[24] * 4, activation=nn.Sigmoid), data())),
    "a wrong backward": ("functions", lambda: Case(Between(Wrong.apply), data())),
    "a wrong backward in a model": ("model", lambda: Case(Between(Wrong.apply), data())),
    "a hook that turns the gradient": ("model", lambda: Case(Between(turned), data())),
    "a loss that cannot fall": ("overfit", lambda: Case(Turned(), data())),
    "a rate of 1000": ("learning_rate", lambda: stepping(mlp(), 1000.0)),
    "eval mode": ("eval_mode", lambda: Case(nn.Sequential(mlp(), nn.Dropout(0.2)).eval(), data())),
    "a head replaced": ("held", headless),
    "an optimizer of another model": (
        "held",
        lambda: Case(mlp(), data(), optimizer=torch.optim.Adam(mlp().parameters())),
    ),
    "layers in a plain list": ("held", lambda: Case(Listed(), data())),
    "a frozen head": ("frozen", frozen_head),
}


def zero_layer() -> nn.Module:
    layer = nn.Linear(5, 5)
    nn.init.zeros_(layer.weight)
    return layer


def scaled(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor
    return model


def stepping(model: nn.Module, rate: float) -> Case:
    return Case(model, data(), optimizer=torch.optim.SGD(model.parameters(), lr=rate))


@pytest.mark.parametrize("fault", FAULTY)
def test_a_fault_is_named_with_what_to_do(fault: str) -> None:
    name, make = FAULTY[fault]
    (check,) = (check for check in CHECKS if check.name == name)
    verdict = check.look(observed(*make()))
    assert verdict.status is WRONG, verdict
    assert verdict.action


def test_there_is_a_faulty_model_for_every_check_that_looks_at_a_model() -> None:
    only_in_scripts = {"zero_grad", "seed"}
    assert {check for check, _ in FAULTY.values()} == {
        check.name for check in CHECKS
    } - only_in_scripts


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Named(nn.Module):
    """A model that computes its own loss and takes keywords, as of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Scaled(nn.Module):
    """Has a weight of its own beside its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = mlp(), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale.exp()


class Adapter(nn.Module):
    """A frozen layer with a low-rank correction that starts at zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 3, bias=False)
        self.up = nn.Linear(3, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def adapted() -> nn.Module:
    model = mlp()
    for place in (0, 2, 4):
        model[place] = Adapter(model[place])  # pyright: ignore[reportArgumentType]
    return model


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(16, 3, 8, 8), torch.arange(16) % 5


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def with_optimizer(case: Case, kind: Callable[..., torch.optim.Optimizer], **settings: Any) -> Case:
    trained = [item for item in case.model.parameters() if item.requires_grad]
    return case._replace(optimizer=kind(trained, **settings))


HEALTHY: dict[str, Callable[[], Case]] = {
    "mlp": lambda: with_optimizer(Case(mlp(), data()), torch.optim.Adam),
    "mlp by sgd": lambda: with_optimizer(
        Case(mlp(), data(), nn.CrossEntropyLoss(label_smoothing=0.1)),
        torch.optim.SGD, lr=0.1, momentum=0.9,
    ),
    "mlp by lbfgs": lambda: with_optimizer(Case(mlp(), data()), torch.optim.LBFGS),
    "convolutional": lambda: with_optimizer(Case(convolutional(), images()), torch.optim.AdamW),
    "batch-norm on raw pixels": lambda: Case(
        nn.Sequential(nn.BatchNorm2d(3), convolutional()), (images()[0] * 255, images()[1])
    ),
    "recurrent": lambda: Case(Recurrent(), (torch.randn(16, 9, 12), torch.arange(16) % 5)),
    "regression": lambda: Case(mlp(out=1), (data()[0], data()[0].sum(1, True)), nn.MSELoss()),
    "binary": lambda: Case(
        nn.Sequential(mlp(out=1), nn.Flatten(0)),
        (data()[0], (data()[0][:, 0] > 0).float()),
        F.binary_cross_entropy_with_logits,
    ),
    "log-softmax": lambda: Case(nn.Sequential(mlp(), nn.LogSoftmax(1)), data(), F.nll_loss),
    "an adapter that starts at zero": lambda: with_optimizer(
        Case(adapted(), data()), torch.optim.Adam
    ),
    "a padded embedding": lambda: Case(
        nn.Sequential(nn.Embedding(9, 8, padding_idx=0), nn.Flatten(), nn.Linear(24, 5)),
        (torch.randint(9, (32, 3)), data()[1]),
    ),
    "a parameter outside of modules": lambda: Case(Scaled(), data()),
    "its own loss": lambda: Case(
        Named(), {"values": data()[0], "labels": data()[1]}, None
    ),
    "a loss in float32 whatever comes": lambda: Case(
        mlp(), data(), lambda output, labels: F.cross_entropy(output.float(), labels)
    ),
    "a right custom function": lambda: Case(Between(Right.apply), data()),
    "deep, with norms and shortcuts": lambda: Case(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 6, enable_nested_tensor=False
        ),
        (torch.randn(8, 6, 12), torch.randn(8, 6, 12)),
        F.mse_loss,
    ),
    "words, nearly all of them 0": lambda: Case(mlp(), words()),
    "no dropout on purpose": lambda: Case(mlp().eval(), data()),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_passes(name: str) -> None:
    report = HEALTHY[name]().report()
    assert report.ok, report.table()
    assert report["model"].status is PASSED, report.table()
    assert report["overfit"].status in (PASSED, ADVICE)


def test_a_healthy_job_passes_every_check_that_needs_no_script() -> None:
    case = HEALTHY["convolutional"]()
    report = case.report()
    skipped = {line.check for line in report.lines if line.verdict.status is not PASSED}
    assert skipped <= {"functions", "gradient_range"}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of every tensor of a job."""
    tensors = dict(model.state_dict())
    for place, parameter in enumerate(model.parameters()):
        tensors[f"grad {place}"] = parameter.grad
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key} {place}"] = torch.as_tensor(value)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def generators() -> tuple[bytes, Any, str]:
    numpy_state = str(np.random.get_state())
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy_state


def test_model_optimizer_and_random_generators_stay_as_they_are_to_the_bit() -> None:
    model = convolutional()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    batch = images()
    before, states = snapshot(model, optimizer), generators()
    patched = nn.Module.__call__, Wrong.forward

    gradwatch.doctor(model, batch, F.cross_entropy, optimizer)

    after = snapshot(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert generators() == states
    assert model.training
    assert (nn.Module.__call__, Wrong.forward) == patched


def test_a_job_that_is_being_recorded_sees_nothing_of_it() -> None:
    stepped: list[torch.optim.Optimizer] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: stepped.append(optimizer)
    )
    try:
        HEALTHY["mlp"]().report()
        HEALTHY["mlp by lbfgs"]().report()
    finally:
        hook.remove()
    assert not stepped


def test_an_estimate_that_is_meant_is_told_and_is_no_fault() -> None:
    for function in (Rounded, Reversed):
        verdict = Case(Between(function.apply), data()).report()["functions"]
        assert verdict.status is ADVICE, verdict


def test_the_gradient_check_names_the_layers_before_the_fault() -> None:
    found = Case(Between(turned), data()).report()["model"].found
    assert "first.weight" in found
    assert "last.weight" not in found


def test_relative_errors_of_a_right_model_are_those_of_float64() -> None:
    error = Case(mlp(activation=nn.Tanh), data()).report()["model"].numbers["error"]
    assert isinstance(error, float)
    assert error < 1e-5


def test_the_loss_at_chance_is_the_logarithm_of_the_number_of_classes() -> None:
    numbers = Case(Between(lambda x: x * 500), data()).report()["chance"].numbers
    assert numbers["guess"] == pytest.approx(math.log(5))


def test_scaled_cosines_may_start_far_above_chance() -> None:
    assert Case(Cosines(), data()).report()["chance"].status is ADVICE


def test_a_slope_that_happens_to_be_right_along_one_direction_passes_for_nothing() -> None:
    first = torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Turned(torch.autograd.Function):
        """The identity, with a gradient that is wrong across the first direction alone."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] + torch.stack([first[1], -first[0]]).to(grads[0])

    call = FunctionCall(Turned, (torch.ones(2, requires_grad=True),))
    slopes = slopes_of_function(call)
    assert slopes is not None
    assert slopes.error > 0.01


def test_labels_that_are_left_out_are_no_fault() -> None:
    inputs, labels = data()
    labels[::3] = -100
    assert Case(mlp(), (inputs, labels)).report()["labels"].status is PASSED


def test_a_model_that_cannot_be_repeated_is_checked_as_far_as_it_goes() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * 10 ** random.SystemRandom().uniform(1, 9)

    report = Case(Fickle(), data()).report()
    assert report["overfit"].status is SKIPPED
    assert "made again, its loss is" in report["overfit"].found
    assert report["backward"].status is PASSED


def test_the_report_is_a_table_and_json() -> None:
    report = weighted(lambda w: w.fill_(math.nan)).report()
    table = report.table()
    assert all(check.title in table for check in CHECKS)
    told = json.loads(report.to_json())
    assert told["ok"] is False
    assert [item["check"] for item in told["checks"]] == [check.name for check in CHECKS]
    by_name = {item["check"]: item for item in told["checks"]}
    assert by_name["weight_values"]["status"] == "wrong"
    assert by_name["weight_values"]["action"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, data()), "torch.nn.Module first"),
        ((nn.Linear(1, 1), torch.ones(1)), "(inputs, targets)"),
        ((nn.Linear(1, 1), data(), None, "sgd"), "torch optimizer"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        gradwatch.doctor(*arguments)
    assert message in str(caught.value)


def test_the_documentation_explains_every_check_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    documented = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert documented == [check.name for check in CHECKS]


def test_the_verdict_that_stands_for_several_is_the_gravest() -> None:
    verdicts = [Verdict(status, status) for status in (PASSED, WRONG, ADVICE, SKIPPED)]
    assert gravest(verdicts).status is WRONG
