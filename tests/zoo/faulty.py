"""Training faults, each with what must be told of it and by when."""

from __future__ import annotations

import math
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradwatch.demo.scenarios import Watch

from .scenario import FAST, LONG, Scenario, Train, expect
from .training import (
    Adapter,
    Data,
    Gpt,
    Recurrent,
    an_optimizer,
    batch_of,
    digit_data,
    fit,
    fit_text,
    mlp,
    regression_data,
    residual,
    some_data,
    tanh_convolutions,
    teacher_data,
    text_batch,
    text_tokens,
)

SGD, Adam = torch.optim.SGD, torch.optim.Adam


def sigmoid_chain(watch: Watch, chance: Random) -> None:
    model = mlp([64, *[chance.choice([32, 64])] * chance.randint(8, 14), 10], nn.Sigmoid)
    fit(watch, model, an_optimizer(chance, model), 300)


def small_tanh(watch: Watch, chance: Random) -> None:
    std = chance.choice([0.01, 0.02])
    model = mlp(
        [64, *[64] * chance.choice([12, 30]), 10], nn.Tanh,
        lambda layer: nn.init.normal_(layer.weight, std=std),
    )  # fmt: skip
    fit(watch, model, an_optimizer(chance, model), 200)


def long_memory(watch: Watch, chance: Random) -> None:
    """The label is the sign of the first of 100 inputs; the state forgets it by half a step."""
    x = torch.randn(1000, 100)
    model = Recurrent(1, 32, 2, 0.5)
    fit(
        watch, model, an_optimizer(chance, model, sgd=0.05),
        400, (x, (x[:, 0] > 0).long()), batch_size=32,
    )  # fmt: skip


def exploding_rnn(activation: str, radius: float, chunk: int) -> Train:
    def train(watch: Watch, chance: Random) -> None:
        model = Recurrent(chunk, chance.choice([48, 64]), 10, radius, activation)
        if activation == "tanh":
            nn.init.normal_(model.recur.weight, std=radius / model.recur.in_features**0.5)
        fit(watch, model, SGD(model.parameters(), lr=0.01), 150)

    return train


def large_relu(watch: Watch, chance: Random) -> None:
    std = chance.choice([0.7, 1.0])
    model = mlp(
        [64, *[64] * chance.randint(6, 10), 10], nn.ReLU,
        lambda layer: nn.init.normal_(layer.weight, std=std),
    )  # fmt: skip
    fit(watch, model, SGD(model.parameters(), lr=0.01), 60)


def unnormalised_residual(watch: Watch, chance: Random) -> None:
    model = residual(64, 32, 50, 10, norm=False)
    fit(watch, model, SGD(model.parameters(), lr=0.3), 80)


def dead_at_birth(watch: Watch, chance: Random) -> None:
    depth = chance.randint(3, 5)
    model = mlp([64, *[chance.choice([48, 64])] * depth, 10])
    layer = model[2 * chance.randrange(depth)]
    assert isinstance(layer, nn.Linear)
    nn.init.constant_(layer.bias, -10.0)
    fit(watch, model, an_optimizer(chance, model), 200)


def killed_by_one_step(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 64, 10])
    optimizer = SGD(model.parameters(), lr=0.1)

    def rate(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 100.0 if step == 100 else 0.1

    fit(watch, model, optimizer, 260, before=rate)


def dead_channels(watch: Watch, chance: Random) -> None:
    middle = nn.Conv2d(16, 20, 3, padding=1)
    assert middle.bias is not None
    nn.init.constant_(middle.bias[:14], -10.0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), middle, nn.ReLU(),
        nn.Conv2d(20, 16, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    fit(watch, model, an_optimizer(chance, model, sgd=0.05), 200)


def log_of_zero(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 1])

    def blank(step: int, x: Tensor, y: Tensor) -> Data:
        if step == 120:
            x = x.clone()
            x[0] = 0.0
        return x, x.sum(dim=1).log()

    def objective(out: Tensor, ink: Tensor) -> Tensor:
        return F.mse_loss(F.softplus(out).squeeze(1).log(), ink)

    fit(watch, model, Adam(model.parameters(), 1e-3), 140, objective=objective, spoil=blank)


def division_by_spread(watch: Watch, chance: Random) -> None:
    """Divides by the standard deviation of a batch, which once holds one picture only."""
    model = mlp([64, 64, 10])

    def same(step: int, x: Tensor, y: Tensor) -> Data:
        if step == 90:
            x, y = x[:1].expand(64, -1), y[:1].expand(64)
        return (x - x.mean(dim=0)) / x.std(dim=0).mean(), y

    fit(watch, model, Adam(model.parameters(), 1e-3), 110, spoil=same)


def root_of_zero(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 16], nn.Tanh)

    def distance(out: Tensor, _: Tensor) -> Tensor:
        gap = ((out[:32] - out[32:]) ** 2).sum(dim=1)
        return (gap.sqrt() - 1.0).pow(2).mean()

    def twins(step: int, x: Tensor, y: Tensor) -> Data:
        if step == 60:
            x = x.clone()
            x[0] = x[32]
        return x, y

    fit(watch, model, Adam(model.parameters(), 1e-3), 80, objective=distance, spoil=twins)


def bad_row(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp([features, 64, 64, classes])

    def broken(step: int, x: Tensor, y: Tensor) -> Data:
        if step == 77:
            x = x.clone()
            x[3] = math.nan
        return x, y

    fit(watch, model, an_optimizer(chance, model), 100, data, spoil=broken)


def softmax_by_hand(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10])

    def naive(out: Tensor, labels: Tensor) -> Tensor:
        powers = out.exp()
        return -(powers / powers.sum(dim=1, keepdim=True))[range(len(out)), labels].log().mean()

    def large(step: int, x: Tensor, y: Tensor) -> Data:
        return (x * 5000 if step == 70 else x), y

    fit(watch, model, Adam(model.parameters(), 1e-3), 90, objective=naive, spoil=large)


def masked_row(watch: Watch, chance: Random) -> None:
    """A row of attention that may look nowhere."""
    _, letters = text_tokens()
    token, head = nn.Embedding(letters, 32), nn.Linear(32, letters)
    qkv = nn.Linear(32, 96)
    model = nn.ModuleList([token, qkv, head])
    optimizer = Adam(model.parameters(), 1e-3)
    monitor = watch(model, optimizer)
    for step in range(1, 81):
        x, y = text_batch(8, 16)
        q, k, v = qkv(token(x)).chunk(3, dim=2)
        mask = torch.ones(16, 16).tril().bool()
        if step == 60:
            mask[5] = False
        scores = (q @ k.transpose(1, 2) / 32**0.5).masked_fill(~mask, -math.inf)
        out = head(token(x) + scores.softmax(dim=2) @ v)
        loss = F.cross_entropy(out.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def no_zero_grad(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp(
        [features, *[64] * chance.randint(1, 4), classes], chance.choice([nn.ReLU, nn.Tanh])
    )
    optimizer = an_optimizer(chance, model, sgd=0.05)
    fit(watch, model, optimizer, 250, data, zero_grad=False)


def no_zero_grad_swinging(watch: Watch, chance: Random) -> None:
    """RMSprop's first step is ten times its rate: the sums leap, and then swing about."""
    data = regression_data(chance)
    model = mlp([16, *[64] * chance.randint(1, 3), 1], chance.choice([nn.ReLU, nn.Tanh]))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=chance.choice([3e-3, 1e-2]))
    fit(watch, model, optimizer, 150, data, F.mse_loss, zero_grad=False)


def hot_gpt(watch: Watch, chance: Random) -> None:
    """The first step throws all weights away; what is learnt since are the letters' frequencies."""
    _, letters = text_tokens()
    model = Gpt(letters, 32, 2)
    fit_text(watch, model, torch.optim.AdamW(model.parameters(), lr=chance.choice([0.2, 0.3])), 200)


def far_too_fast(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp([features, *[64] * chance.randint(2, 4), classes])
    optimizer = SGD(model.parameters(), lr=10.0)
    fit(watch, model, optimizer, 200, data)


def too_fast_adam(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp(
        [features, *[64] * chance.randint(2, 4), classes], chance.choice([nn.GELU, nn.ReLU])
    )
    fit(watch, model, Adam(model.parameters(), lr=chance.choice([0.3, 1.0])), 250, data)


def bouncing(watch: Watch, chance: Random) -> None:
    """Twenty times the rate at which it learns: the loss goes up and down, or is thrown away."""
    data, features, classes = teacher_data(chance), 32, 5
    model = mlp([features, 64, 64, classes], chance.choice([nn.ReLU, nn.GELU]))
    rate = chance.choice([0.4, 0.5])
    fit(watch, model, SGD(model.parameters(), lr=rate, momentum=0.9), 300, data)


def xor_too_fast(watch: Watch, chance: Random) -> None:
    """A 2-4-1 tanh network on XOR, one sample an update, at a rate that never learns."""
    x = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    y = torch.tensor([[-1.0], [1], [1], [-1]])
    layers = nn.Linear(2, 4), nn.Linear(4, 1)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh())
    for layer in layers:
        nn.init.uniform_(layer.weight, -1, 1)
        nn.init.zeros_(layer.bias)
    optimizer = SGD(model.parameters(), lr=1.5)
    monitor = watch(model, optimizer)
    for step in range(400):
        row = step % 4
        loss = ((model(x[row]) - y[row]) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def far_too_slow(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp([features, *[64] * chance.randint(1, 4), classes])
    if chance.random() < 0.5:
        optimizer: torch.optim.Optimizer = SGD(model.parameters(), lr=1e-5)
    else:
        optimizer = Adam(model.parameters(), lr=1e-7)
    fit(watch, model, optimizer, 300, data)


def old_head(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 5])
    optimizer = an_optimizer(chance, model)
    model[-1] = nn.Linear(64, 10)
    fit(watch, model, optimizer, 120)


def old_middle(watch: Watch, chance: Random) -> None:
    """A hidden layer was replaced; the head is held, and the job learns without the layer."""
    model = mlp([64, 64, 64, 64, 10], chance.choice([nn.ReLU, nn.GELU]))
    optimizer = an_optimizer(chance, model)
    model[2 * chance.choice([1, 2])] = nn.Linear(64, 64)
    fit(watch, model, optimizer, 120)


class Branches(nn.Module):
    """Two ways side by side, one of which is cut."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.main = mlp([64, 48, 48])
        self.side = mlp([64, 48, 48])
        self.head = nn.Linear(96, 10)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        if self.cut == "no_grad":
            with torch.no_grad():
                side = self.side(x)
        else:
            side = self.side(x).detach()
        return self.head(torch.cat([self.main(x), side], dim=1))


def cut_branch(watch: Watch, chance: Random) -> None:
    model = Branches(chance.choice(["no_grad", "detach"]))
    fit(watch, model, an_optimizer(chance, model), 120)


def frozen_adapter(watch: Watch, chance: Random) -> None:
    """Nothing that the optimizer holds gets a gradient: the adapters are cut off by mistake."""
    model = nn.Sequential(Adapter(nn.Linear(64, 64)), nn.ReLU(), Adapter(nn.Linear(64, 10)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    probe = torch.ones(1, requires_grad=True)
    fit(watch, model, optimizer, 100, objective=lambda x, y: F.cross_entropy(x * probe, y))


def double_softmax(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10])
    fit(
        watch, model, an_optimizer(chance, model), 300,
        objective=lambda x, y: F.cross_entropy(x.softmax(dim=1), y),
    )  # fmt: skip


def shuffled_labels(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp([features, 64, 64, classes], chance.choice([nn.ReLU, nn.GELU, nn.Tanh]))
    fit(
        watch, model, an_optimizer(chance, model, sgd=0.05), 400, data,
        spoil=lambda _, x, y: (x, y[torch.randperm(len(y))]),
    )  # fmt: skip


def equal_units(watch: Watch, chance: Random) -> None:
    depth = chance.randint(2, 3)
    model = mlp([64, *[48] * depth, 10], chance.choice([nn.Tanh, nn.ReLU, nn.GELU]))
    for layer in model if chance.random() < 0.5 else [model[2 * chance.randrange(depth)]]:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, 0.02)
            nn.init.zeros_(layer.bias)
    fit(watch, model, an_optimizer(chance, model), 150)


def fp16_underflow(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10]).half()
    factor = chance.choice([1e-4, 1e-5])
    images, labels = digit_data()
    fit(
        watch, model, SGD(model.parameters(), lr=0.1), 150, (images.half(), labels),
        objective=lambda x, y: F.cross_entropy(x.float(), y) * factor,
    )  # fmt: skip


def clipped_to_nothing(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp([features, 64, 64, classes])
    fit(
        watch, model, SGD(model.parameters(), lr=0.1), 300, data,
        after_backward=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e-4),
    )  # fmt: skip


def lost_to_rounding(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10]).bfloat16()
    images, labels = digit_data()
    fit(
        watch, model, SGD(model.parameters(), lr=chance.choice([1e-6, 1e-5])), 150,
        (images.bfloat16(), labels),
        objective=lambda x, y: F.cross_entropy(x.float(), y),
    )  # fmt: skip


def saturated_tanh(watch: Watch, chance: Random) -> None:
    model = mlp([64, *[64] * chance.randint(2, 4), 10], nn.Tanh)
    factor = chance.choice([100.0, 300.0])
    images, labels = digit_data()
    fit(watch, model, an_optimizer(chance, model), 250, (factor * images, labels))


def saturated_convolutions(watch: Watch, chance: Random) -> None:
    """Weights far too large: nothing but what the activations put out shows it."""
    width = chance.choice([8, 12])
    model = tanh_convolutions(width)
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=chance.choice([3.0, 5.0]))
    fit(watch, model, an_optimizer(chance, model), 150)


def saturated_sigmoid(watch: Watch, chance: Random) -> None:
    model = mlp([64, *[64] * chance.randint(1, 3), 10], nn.Sigmoid)
    factor = chance.choice([100.0, 300.0])
    images, labels = digit_data()
    fit(watch, model, an_optimizer(chance, model), 250, (factor * images, labels))


def batch_norm_of_one(watch: Watch, chance: Random) -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    fit(watch, model, SGD(model.parameters(), lr=0.02), 300, batch_size=1)


def heavy_decay(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp([features, 64, 64, classes])
    if chance.random() < 0.5:
        optimizer: torch.optim.Optimizer = SGD(model.parameters(), lr=0.01, weight_decay=10.0)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=50.0)
    fit(watch, model, optimizer, 400, data)


def decay_beside_learning(watch: Watch, chance: Random) -> None:
    """Something is learnt, of weights that melt faster."""
    model = mlp([64, 96, 96, 10])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=20.0)
    fit(watch, model, optimizer, 400)


def one_bad_batch(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10])
    factor = chance.choice([100.0, 300.0])
    fit(
        watch, model, Adam(model.parameters(), lr=1e-3), 420,
        spoil=lambda step, x, y: (x * (factor if step == 300 else 1.0), y),
    )  # fmt: skip


def creeping(watch: Watch, chance: Random) -> None:
    """The recurrence grows a little with each step, until it overflows."""
    model = Recurrent(2, 32, 10, 0.9, "linear")
    optimizer = SGD(model.parameters(), lr=1e-3)

    def grow(step: int) -> None:
        if step > 100:
            with torch.no_grad():
                model.recur.weight.mul_(1.002 if step < 600 else 1.05)

    fit(watch, model, optimizer, 800, after_step=grow)


class WrongSign(torch.autograd.Function):
    """The identity, whose backward pass forgets that it is one."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def wrong_sign(watch: Watch, chance: Random) -> None:
    """Every step goes uphill: the loss climbs, slowly at first."""
    model = mlp([16, 64, 64, 1], chance.choice([nn.Tanh, nn.ReLU, nn.GELU]))
    optimizer = chance.choice([Adam, torch.optim.AdamW])(model.parameters(), lr=1e-3)
    fit(
        watch, model, optimizer, 300, regression_data(chance),
        objective=lambda out, y: F.mse_loss(WrongSign.apply(out), y),  # pyright: ignore
    )  # fmt: skip


class OneWildRow(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.token = nn.Embedding(words, 32)
        with torch.no_grad():
            self.token.weight[3] *= 1e4
        self.body = mlp([32, 64, 64])
        self.head = nn.Linear(64, 10)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.token(words).mean(dim=1))))


def wild_row(watch: Watch, chance: Random) -> None:
    words = torch.randint(50, (2000, 8))
    labels = words[:, 0] % 10
    model = OneWildRow(50)
    fit(watch, model, SGD(model.parameters(), lr=1e-7), 100, (words, labels))


def replaced_parameters(watch: Watch, chance: Random) -> None:
    """The optimizer holds parameters that are no longer the model's."""
    model = mlp([64, 64, 64, 10])
    optimizer = an_optimizer(chance, model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach().clone())
            layer.bias = nn.Parameter(layer.bias.detach().clone())
    fit(watch, model, optimizer, 100)


def wrong_wrapper(watch: Watch, chance: Random) -> None:
    """A wrapper restores the weights after each step."""
    model = mlp([64, 64, 64, 10])
    optimizer = an_optimizer(chance, model)
    kept = [parameter.detach().clone() for parameter in model.parameters()]

    def restore(_: int) -> None:
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), kept, strict=True):
                parameter.copy_(before)

    fit(watch, model, optimizer, 100, after_step=restore)


def schedule_per_batch(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp([features, 64, 64, classes])
    optimizer = an_optimizer(chance, model)
    schedule = chance.choice(
        [
            torch.optim.lr_scheduler.StepLR(optimizer, 10, gamma=0.1),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
        ]
    )
    fit(watch, model, optimizer, 300, data, after_step=lambda _: schedule.step())


def halving_scaler(watch: Watch, chance: Random) -> None:
    """From step 100 on every backward pass overflows, and every step is skipped."""
    model = mlp([64, 64, 64, 10])
    optimizer = an_optimizer(chance, model, sgd=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    monitor = watch(model, optimizer)
    for step in range(1, 221):
        x, y = batch_of(digit_data(), 64)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step > 100 and step % 12:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.inf)
        scaler.step(optimizer)
        scaler.update()
        monitor.log(loss=loss.detach())


BLOWN = frozenset({"exploding", "non_finite", "divergence", "learning_rate_too_high", "dead_units"})

FAULTY: tuple[Scenario, ...] = (
    Scenario("F01 sigmoids", sigmoid_chain, (expect("vanishing", within=FAST),)),
    Scenario(
        "F02 small tanh",
        small_tanh,
        (expect("vanishing", within=20), expect("poor_initialisation", within=20)),
    ),
    Scenario("F03 long memory", long_memory, (expect("vanishing", "plateau", within=250),)),
    Scenario(
        "F04 linear RNN",
        exploding_rnn("linear", 1.5, 2),
        (expect("exploding", within=20),),
        frozenset({"non_finite"}),
    ),
    Scenario(
        "F04 long linear RNN",
        exploding_rnn("linear", 1.2, 1),
        (expect("exploding", within=20),),
        frozenset({"non_finite"}),
    ),
    # A tanh holds its state down: a random matrix of radius 2 explodes on some seeds only.
    Scenario(
        "F04 tanh RNN",
        exploding_rnn("tanh", 2.5, 1),
        (expect("exploding", within=FAST),),
        frozenset({"saturation"}),
    ),
    Scenario(
        "F05 large ReLU",
        large_relu,
        (expect("exploding", within=FAST), expect("poor_initialisation", within=FAST)),
        frozenset({"non_finite", "dead_units", "learning_rate_too_high"}),
    ),
    Scenario(
        "F06 residual, no norm",
        unnormalised_residual,
        (expect("exploding", within=FAST),),
        frozenset({"non_finite", "learning_rate_too_high", "divergence", "dead_units"}),
    ),
    Scenario("F07 dead at birth", dead_at_birth, (expect("dead_units", within=FAST),)),
    Scenario(
        "F08 killed by one step",
        killed_by_one_step,
        (expect("loss_spike", onset=100, within=5), expect("dead_units", onset=100, within=100)),
        frozenset({"exploding"}),
    ),
    Scenario("F09 dead channels", dead_channels, (expect("dead_units", within=100),)),
    Scenario("F10 log of 0", log_of_zero, (expect("non_finite", onset=120, within=0),)),
    Scenario("F11 division by 0", division_by_spread, (expect("non_finite", onset=90, within=0),)),
    Scenario("F12 root of 0", root_of_zero, (expect("non_finite", onset=60, within=0),)),
    Scenario("F13 bad row", bad_row, (expect("non_finite", onset=77, within=0),)),
    Scenario("F14 softmax by hand", softmax_by_hand, (expect("non_finite", onset=70, within=0),)),
    Scenario("F15 masked row", masked_row, (expect("non_finite", onset=60, within=0),)),
    Scenario("F16 no zero_grad", no_zero_grad, (expect("missing_zero_grad", within=FAST),)),
    Scenario(
        "F16 no zero_grad, RMSprop",
        no_zero_grad_swinging,
        (expect("missing_zero_grad", within=FAST),),
    ),
    Scenario(
        "F17 GPT x 100",
        hot_gpt,
        (expect("learning_rate_too_high", "divergence", "oscillation", within=FAST),),
        frozenset({"exploding", "non_finite"}),
    ),
    Scenario(
        "F17 rate x 100",
        far_too_fast,
        (expect("learning_rate_too_high", "divergence", within=FAST),),
        frozenset({"exploding", "non_finite"}),
    ),
    Scenario(
        "F17 Adam x 300",
        too_fast_adam,
        (expect("learning_rate_too_high", "divergence", "oscillation", within=FAST),),
        frozenset({"exploding", "non_finite"}),
    ),
    Scenario("F18 rate x 20", bouncing, (expect("oscillation", "learning_rate_too_high"),)),
    Scenario("F46 XOR", xor_too_fast, (expect("oscillation", "learning_rate_too_high"),)),
    Scenario("F19 rate / 10,000", far_too_slow, (expect("learning_rate_too_low"),)),
    Scenario("F20 head replaced", old_head, (expect("never_updated", within=FAST),)),
    Scenario("F20 middle replaced", old_middle, (expect("never_updated", within=FAST),)),
    Scenario("F21 cut branch", cut_branch, (expect("disconnected", within=20),)),
    Scenario("F22 frozen adapter", frozen_adapter, (expect("disconnected", within=20),)),
    Scenario("F23 softmax twice", double_softmax, (), frozenset({"plateau"})),
    Scenario("F24 shuffled labels", shuffled_labels, (expect("plateau", within=250),)),
    Scenario(
        "F25 equal units",
        equal_units,
        (expect("symmetric_units", "poor_initialisation", within=20),),
        frozenset({"plateau"}),
    ),
    Scenario("F26 fp16 underflow", fp16_underflow, (expect("underflow", within=FAST),)),
    Scenario("F27 halving scale", halving_scaler, (expect("amp_skips", onset=101, within=100),)),
    Scenario("F28 clipped to nothing", clipped_to_nothing, (expect("clipping", within=100),)),
    Scenario("F29 lost to rounding", lost_to_rounding, (expect("never_updated", within=100),)),
    Scenario("F34 saturated tanh", saturated_tanh, (expect("saturation", within=FAST),)),
    Scenario(
        "F34 saturated convolutions",
        saturated_convolutions,
        (expect("saturation", within=FAST),),
    ),
    Scenario("F34 saturated sigmoid", saturated_sigmoid, (expect("saturation", within=FAST),)),
    Scenario("F35 batch-norm of one", batch_norm_of_one, (), frozenset({"plateau", "oscillation"})),
    Scenario(
        "F36 heavy decay",
        heavy_decay,
        (expect("weights_shrinking", "plateau"),),
        frozenset({"plateau", "vanishing"}),
    ),
    Scenario("F36 decay of 20", decay_beside_learning, (expect("weights_shrinking"),)),
    Scenario("F37 one bad batch", one_bad_batch, (expect("loss_spike", onset=300, within=5),)),
    Scenario(
        "F38 creeping",
        creeping,
        (expect("exploding", onset=300, within=LONG),),
        frozenset({"non_finite", "divergence"}),
    ),
    Scenario(
        "F39 wrong sign",
        wrong_sign,
        (expect("divergence"),),
        frozenset({"exploding", "learning_rate_too_high", "non_finite"}),
    ),
    Scenario("F40 wild row", wild_row, (expect("exploding", within=20),)),
    Scenario("F41 replaced parameters", replaced_parameters, (expect("never_updated", within=20),)),
    Scenario("F43 wrong wrapper", wrong_wrapper, (expect("never_updated", within=60),)),
    Scenario(
        "F45 schedule a batch", schedule_per_batch, (expect("learning_rate_too_low", onset=40),)
    ),
)
