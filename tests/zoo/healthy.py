"""Healthy jobs that a naive rule would cry about."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune

from gradwatch.demo.scenarios import Watch

from .scenario import Scenario, Train
from .training import (
    Adapter,
    Gpt,
    an_optimizer,
    batch_of,
    digit_data,
    fit,
    fit_text,
    he,
    mlp,
    regression_data,
    residual,
    some_data,
    tanh_convolutions,
    teacher_data,
    text_tokens,
    warm_up_cosine,
)


def relu_mlp(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    width = chance.choice([32, 64, 128])
    model = mlp([features, *[width] * chance.randint(1, 5), classes])
    fit(watch, model, an_optimizer(chance, model), 600, data)


def conv_batch_norm(watch: Watch, chance: Random) -> None:
    width = chance.choice([8, 16])
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * width, 10),
    )  # fmt: skip
    fit(watch, model, an_optimizer(chance, model, sgd=0.1), 250)


def gpt(tied: bool) -> Train:
    def train(watch: Watch, chance: Random) -> None:
        _, letters = text_tokens()
        vocabulary = 512 if tied else letters  # most rows of a tied embedding are never seen
        model = Gpt(vocabulary, chance.choice([32, 48]), chance.randint(2, 4), tied=tied)
        fit_text(watch, model, torch.optim.AdamW(model.parameters(), lr=3e-3), 200)

    return train


class Lstm(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, 2 * width, batch_first=True)
        self.head = nn.Linear(2 * width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.token(tokens))[0])


def clipped_lstm(watch: Watch, chance: Random) -> None:
    _, letters = text_tokens()
    model = Lstm(letters, chance.choice([16, 32]))
    optimizer = torch.optim.Adam(model.parameters(), lr=chance.choice([3e-3, 1e-2]))
    limit = chance.choice([0.25, 1.0])
    fit_text(
        watch, model, optimizer, 250,
        after_backward=lambda: nn.utils.clip_grad_norm_(model.parameters(), limit),
    )  # fmt: skip


def residual_normed(watch: Watch, chance: Random) -> None:
    model = residual(64, 32, chance.choice([30, 50]), 10)
    fit(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), 120)


def frozen_backbone(watch: Watch, chance: Random) -> None:
    depth = chance.randint(3, 6)
    model = mlp([64, *[64] * depth, 10], nn.ReLU, he)
    for layer in list(model)[: 2 * chance.randint(1, depth)]:
        layer.requires_grad_(False)
    fit(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), 300)


def gradual_unfreezing(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 64, 10])
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in linears[:-1]:
        layer.requires_grad_(False)

    def unfreeze(step: int) -> None:
        if step % 80 == 0 and step // 80 < len(linears):
            linears[-1 - step // 80].requires_grad_(True)

    fit(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), 350, before=unfreeze)


def lora(watch: Watch, chance: Random) -> None:
    layers: list[nn.Module] = []
    for _ in range(chance.randint(2, 5)):
        layers += [Adapter(nn.Linear(64, 64), chance.choice([2, 4, 8])), nn.ReLU()]
    model = nn.Sequential(*layers, Adapter(nn.Linear(64, 10)))
    fit(watch, model, torch.optim.AdamW(model.parameters(), lr=chance.choice([1e-3, 5e-3])), 300)


def accumulated(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10])
    optimizer = an_optimizer(chance, model)
    monitor = watch(model, optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(8):
            x, y = batch_of(digit_data(), 16)
            loss = F.cross_entropy(model(x), y) / 8
            loss.backward()
            total += loss.item()
        optimizer.step()
        monitor.log(loss=torch.tensor(total))


def grad_scaler(watch: Watch, chance: Random) -> None:
    """fp16 autocast with a scale that overflows at first, then settles."""
    model = mlp([64, 64, 64, 10])
    optimizer = an_optimizer(chance, model, sgd=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** chance.choice([20, 24]))
    monitor = watch(model, optimizer)
    for _ in range(250):
        x, y = batch_of(digit_data(), 64)
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.log(loss=loss.detach().float())


def bf16_autocast(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10], nn.GELU)
    optimizer = an_optimizer(chance, model)
    monitor = watch(model, optimizer)
    for _ in range(250):
        x, y = batch_of(digit_data(), 64)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach().float())


def cosine(watch: Watch, chance: Random) -> None:
    data, features, classes = some_data(chance)
    model = mlp([features, 96, 96, classes])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = warm_up_cosine(optimizer, 50, 400)
    fit(watch, model, optimizer, 400, data, after_step=lambda _: schedule.step())  # type: ignore[attr-defined]


def restarts(watch: Watch, chance: Random) -> None:
    model = mlp([64, 128, 128, 10])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, chance.choice([60, 100])
    )
    fit(watch, model, optimizer, 500, after_step=lambda _: schedule.step())


def gan(watch: Watch, chance: Random) -> None:
    images, _ = digit_data()
    width = chance.choice([64, 96])
    generator = mlp([16, width, width, 64])
    critic = mlp([64, width, width, 1], lambda: nn.LeakyReLU(0.2))
    rate = chance.choice([1e-3, 5e-4])
    steps_g = torch.optim.Adam(generator.parameters(), lr=rate, betas=(0.5, 0.999))
    steps_c = torch.optim.Adam(critic.parameters(), lr=rate, betas=(0.5, 0.999))
    monitor_g, monitor_c = watch(generator, steps_g), watch(critic, steps_c)
    for _ in range(500):
        real = images[torch.randint(len(images), (64,))]
        fake = torch.sigmoid(generator(torch.randn(64, 16)))
        loss_c = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
        steps_c.zero_grad()
        loss_c.backward()
        steps_c.step()
        monitor_c.log(loss=loss_c.detach())
        loss_g = F.softplus(-critic(fake)).mean()
        steps_g.zero_grad()
        loss_g.backward()
        steps_g.step()
        monitor_g.log(loss=loss_g.detach())


class Experts(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.inner = nn.Linear(64, width)
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(mlp([width, width, width]) for _ in range(experts))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.inner(x))
        weight, chosen = self.gate(hidden).softmax(dim=1).max(dim=1)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(hidden[rows]))
        return self.head(hidden + out)


def mixture_of_experts(watch: Watch, chance: Random) -> None:
    model = Experts(chance.choice([32, 64]), 8)
    size = chance.choice([32, 64])
    fit(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), 300, batch_size=size)


class Bag(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.token = nn.EmbeddingBag(words, width, sparse=True, mode="mean")
        self.head = mlp([width, 32, 4])

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.token(words))


def sparse_embedding(watch: Watch, chance: Random) -> None:
    words = torch.randint(5000, (3000, 12))
    labels = (words.sum(dim=1) // 7) % 2 + 2 * (words[:, 0] > 2500).long()
    model = Bag(5000, 16)
    sparse = torch.optim.SparseAdam(model.token.parameters(), lr=1e-2)
    dense = torch.optim.Adam(model.head.parameters(), lr=1e-3)
    monitor = watch(model, sparse)
    watch(model, dense)
    for _ in range(300):
        rows = torch.randint(3000, (64,))
        loss = F.cross_entropy(model(words[rows]), labels[rows])
        sparse.zero_grad()
        dense.zero_grad()
        loss.backward()
        sparse.step()
        dense.step()
        monitor.log(loss=loss.detach())


class QPair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.online = mlp([4, width, width, 2])
        self.target = copy.deepcopy(self.online)


def q_learning(watch: Watch, chance: Random) -> None:
    """A learner of a walk with a sparse reward; its target network lags behind by copies."""
    model = QPair(chance.choice([32, 64]))
    optimizer = torch.optim.Adam(model.online.parameters(), lr=1e-3)
    monitor = watch(model, optimizer)
    for step in range(400):
        if step % 50 == 0:
            model.target.load_state_dict(model.online.state_dict())
        state = torch.randn(32, 4)
        action = torch.randint(2, (32,))
        after = state + 0.3 * (2.0 * action[:, None] - 1.0) + 0.05 * torch.randn(32, 4)
        reward = (after.sum(dim=1) > 2.5).float()
        with torch.no_grad():
            goal = reward + 0.95 * model.target(after).max(dim=1).values
        value = model.online(state).gather(1, action[:, None]).squeeze(1)
        loss = F.smooth_l1_loss(value, goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def slow_but_sure(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10])
    if chance.random() < 0.5:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9)
    fit(watch, model, optimizer, 600)


def converged(watch: Watch, chance: Random) -> None:
    """Trained on long after the training loss is nearly 0, in full batches."""
    images, labels = digit_data()
    rows = chance.choice([100, 200])
    model = mlp([64, 64, 64, 10])
    fit(
        watch, model, torch.optim.Adam(model.parameters(), lr=3e-3), 900,
        spoil=lambda _, x, y: (images[:rows], labels[:rows]),
    )  # fmt: skip


def margin_loss_at_0(watch: Watch, chance: Random) -> None:
    images, labels = digit_data()
    model = mlp([64, 64, 64, 10])
    fit(
        watch, model, torch.optim.Adam(model.parameters(), lr=3e-3), 400,
        objective=F.multi_margin_loss, spoil=lambda _, x, y: (images[:200], labels[:200]),
    )  # fmt: skip


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = mlp([64, 64, 16])
        self.decode = mlp([8, 64, 64])

    def forward(self, x: Tensor) -> Tensor:
        mean, log_var = self.encode(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        divergence = 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum()
        squares = ((self.decode(z) - x) ** 2).sum() / (2 * 0.05)
        # Up to a constant the negative evidence lower bound, summed: large, and may be negative.
        return squares + divergence - 200.0 * len(x)


def elbo(watch: Watch, chance: Random) -> None:
    model = Vae()
    fit(
        watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), 400,
        objective=lambda out, _: out,
    )  # fmt: skip


def scaled_loss(factor: float) -> Train:
    def train(watch: Watch, chance: Random) -> None:
        model = mlp([64, *[64] * chance.randint(2, 4), 10])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-14)
        fit(watch, model, optimizer, 300, objective=lambda x, y: factor * F.cross_entropy(x, y))

    return train


def dropout(watch: Watch, chance: Random) -> None:
    layers: list[nn.Module] = []
    width = 64
    for _ in range(chance.randint(2, 4)):
        layers += [nn.Linear(width, 128), nn.ReLU(), nn.Dropout(0.5)]
        width = 128
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    optimizer = an_optimizer(chance, model)
    fit(watch, model, optimizer, 500, batch_size=chance.choice([4, 8]))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp([64, 64, 64])
        self.main, self.rare = nn.Linear(64, 10), nn.Linear(64, 10)


def rare_head(watch: Watch, chance: Random) -> None:
    """Two tasks; the second head is used at each 10th step only."""
    model = TwoHeads()
    optimizer = an_optimizer(chance, model)
    keep = chance.random() < 0.5  # gradient 0, or none at all
    monitor = watch(model, optimizer)
    for step in range(1, 401):
        x, y = batch_of(digit_data(), 64)
        head = model.rare if step % 10 == 5 else model.main
        loss = F.cross_entropy(head(torch.relu(model.trunk(x))), y)
        optimizer.zero_grad(set_to_none=not keep)
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def pruned(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10])
    for layer in model:
        if isinstance(layer, nn.Linear) and layer.out_features == 64:
            prune.ln_structured(layer, "weight", amount=0.6, n=2, dim=0)
    fit(watch, model, an_optimizer(chance, model), 300)


def tanh_images(watch: Watch, chance: Random) -> None:
    model = tanh_convolutions(chance.choice([8, 12]))
    fit(watch, model, an_optimizer(chance, model, sgd=0.05), 250)


def few_sigmoids(watch: Watch, chance: Random) -> None:
    """Two hidden layers of sigmoids, and one at the end that becomes sure of itself."""
    images, labels = digit_data()
    model = nn.Sequential(mlp([64, 64, 32, 1], nn.Sigmoid), nn.Flatten(0), nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), lr=chance.choice([3e-3, 1e-2]))
    odd = (labels % 2).float()
    fit(watch, model, optimizer, 500, (images, odd), F.binary_cross_entropy)


def leaky(watch: Watch, chance: Random) -> None:
    kinds: list[Callable[[], nn.Module]] = [nn.PReLU, nn.GELU, nn.LeakyReLU, nn.SiLU]
    model = mlp([64, *[64] * chance.randint(2, 5), 10], chance.choice(kinds))
    fit(watch, model, an_optimizer(chance, model), 300)


def layer_scale(watch: Watch, chance: Random) -> None:
    model = residual(64, 32, chance.choice([6, 12]), 10, scale=1e-5)
    fit(watch, model, torch.optim.AdamW(model.parameters(), lr=1e-3), 250)


def focal(outputs: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(outputs, labels, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def label_smoothing(watch: Watch, chance: Random) -> None:
    model = mlp([64, 64, 64, 10])

    def smoothed(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, label_smoothing=0.2)

    fit(watch, model, an_optimizer(chance, model), 600, objective=chance.choice([focal, smoothed]))


def curriculum(watch: Watch, chance: Random) -> None:
    _, letters = text_tokens()
    model = Gpt(letters, 32, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fit_text(watch, model, optimizer, 240, length=lambda step: 4 + 7 * min(step // 60, 4))


def lbfgs(watch: Watch, chance: Random) -> None:
    x, y = digit_data()
    x, y = x[:300], y[:300]
    model = mlp([64, 32, 10], nn.Tanh)
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe"
    )
    monitor = watch(model, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(60):
        loss = optimizer.step(closure)
        monitor.log(loss=loss.detach())


class Averaged(nn.Module):
    """A model beside the running average of its weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.average = copy.deepcopy(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def weight_average(watch: Watch, chance: Random) -> None:
    model = Averaged(mlp([64, 64, 64, 10]))

    def blend(_: int) -> None:
        with torch.no_grad():
            for mean, new in zip(model.average.parameters(), model.inner.parameters(), strict=True):
                mean.lerp_(new, 0.01)

    fit(watch, model, torch.optim.Adam(model.inner.parameters(), lr=1e-3), 300, after_step=blend)


def deep_supervision(watch: Watch, chance: Random) -> None:
    """Small and clean: regression of a smooth function."""
    data = regression_data(chance)
    model = mlp([16, 64, 64, 1], chance.choice([nn.Tanh, nn.ReLU, nn.GELU]))
    fit(watch, model, an_optimizer(chance, model, sgd=0.03), 500, data, objective=F.mse_loss)


def autoencoder(watch: Watch, chance: Random) -> None:
    model = mlp([64, 48, 12, 48, 64], chance.choice([nn.ReLU, nn.ELU, nn.Tanh]))
    images, _ = digit_data()
    fit(
        watch, model, an_optimizer(chance, model, sgd=0.5), 400, (images, images),
        objective=F.mse_loss,
    )  # fmt: skip


def small_batches_converged(watch: Watch, chance: Random) -> None:
    """A nearly solved task in small batches: now and then a hard sample stands out."""
    data = teacher_data(chance, classes=3)
    model = mlp([32, 64, 64, 3])
    fit(watch, model, torch.optim.Adam(model.parameters(), lr=2e-3), 1200, data, batch_size=8)


def policy_gradient(watch: Watch, chance: Random) -> None:
    """REINFORCE on a bandit with contexts: the loss means nothing, and wanders about 0."""
    model = mlp([8, 32, 4], nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    best = torch.randn(8, 4)
    monitor = watch(model, optimizer)
    for _ in range(400):
        state = torch.randn(64, 8)
        policy = torch.distributions.Categorical(logits=model(state))
        action = policy.sample()
        reward = (action == (state @ best).argmax(dim=1)).float()
        loss = -(policy.log_prob(action) * (reward - reward.mean())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def bandit(watch: Watch, chance: Random) -> None:
    """REINFORCE with a baseline: large steps of few weights, and a loss that ends at 0 or below."""
    arms = chance.choice([4, 6])
    worth = torch.randn(arms)
    model = nn.Linear(1, arms)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    monitor = watch(model, optimizer)
    baseline = 0.0
    for _ in range(400):
        policy = torch.distributions.Categorical(logits=model(torch.ones(32, 1)))
        action = policy.sample()
        reward = worth[action] + 0.3 * torch.randn(32)
        loss = -(policy.log_prob(action) * (reward - baseline)).mean()
        baseline = 0.9 * baseline + 0.1 * float(reward.mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def single_samples(watch: Watch, chance: Random) -> None:
    """Squared errors of one sample each: they vary by more than they fall."""
    model = mlp([16, 32, 1], nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = regression_data(chance)
    fit(watch, model, optimizer, 800, data, F.mse_loss, batch_size=1)


def penalised_critic(watch: Watch, chance: Random) -> None:
    """A critic with a gradient penalty: its norms grow as smoothly as sums do, and so its loss."""
    images, _ = digit_data()
    critic = mlp([64, 64, 64, 1], lambda: nn.LeakyReLU(0.2))
    generator = mlp([8, 64, 64])
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
    monitor = watch(critic, optimizer)
    for _ in range(250):
        real = images[torch.randint(len(images), (64,))]
        fake = torch.sigmoid(generator(torch.randn(64, 8))).detach()
        share = torch.rand(64, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = ((slope.norm(dim=1) - 1) ** 2).mean()
        loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def two_optimizers(watch: Watch, chance: Random) -> None:
    """Of body and head, each with an optimizer of its own, one alone is watched."""
    model = mlp([64, 64, 64, 10])
    body = torch.optim.Adam(model[:-1].parameters(), lr=1e-3)
    head = torch.optim.SGD(model[-1].parameters(), lr=0.1)

    def clear(_: int) -> None:
        head.zero_grad()

    def step(_: int) -> None:
        head.step()

    fit(watch, model, body, 250, before=clear, after_step=step)


def tied_late(watch: Watch, chance: Random) -> None:
    """The head shares the embedding's weight since after the optimizer was built."""
    _, letters = text_tokens()
    model = Gpt(letters, 32, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    assert model.head is not None
    model.head.weight = model.token.weight
    fit_text(watch, model, optimizer, 150)


def deep_plain(watch: Watch, chance: Random) -> None:
    """Ten plain layers, well initialised."""
    activation = chance.choice([nn.ReLU, nn.Tanh])

    def initialise(layer: nn.Linear) -> None:
        he(layer) if activation is nn.ReLU else nn.init.xavier_normal_(layer.weight, 5 / 3)

    model = mlp([64, *[64] * 10, 10], activation, initialise)
    fit(watch, model, torch.optim.Adam(model.parameters(), lr=5e-4), 300)


HEALTHY: tuple[Scenario, ...] = (
    Scenario("H01 ReLU MLP", relu_mlp),
    Scenario("H02 conv, batch-norm", conv_batch_norm),
    Scenario("H03 GPT, tied", gpt(tied=True)),
    Scenario("H03 GPT, untied", gpt(tied=False)),
    Scenario("H04 LSTM, clipped", clipped_lstm),
    Scenario("H05 residual, normed", residual_normed),
    Scenario("H06 frozen backbone", frozen_backbone),
    Scenario("H07 gradual unfreezing", gradual_unfreezing),
    Scenario("H08 LoRA", lora),
    Scenario("H09 accumulation", accumulated),
    Scenario("H10 GradScaler", grad_scaler),
    Scenario("H11 bf16 autocast", bf16_autocast),
    Scenario("H12 warm-up, cosine", cosine),
    Scenario("H12 restarts", restarts),
    Scenario("H13 GAN", gan),
    Scenario("H14 experts", mixture_of_experts),
    Scenario("H15 sparse embedding", sparse_embedding),
    Scenario("H16 Q-learning", q_learning),
    Scenario("H16 policy gradient", policy_gradient),
    Scenario("H17 slow but sure", slow_but_sure),
    Scenario("H18 converged", converged),
    Scenario("H18 margin loss at 0", margin_loss_at_0),
    Scenario("H18 small batches", small_batches_converged),
    Scenario("H19 ELBO", elbo),
    Scenario("H20 loss x 1e-4", scaled_loss(1e-4)),
    Scenario("H20 loss x 1e4", scaled_loss(1e4)),
    Scenario("H21 dropout", dropout),
    Scenario("H22 rare head", rare_head),
    Scenario("H23 pruned", pruned),
    Scenario("H24 leaky", leaky),
    Scenario("H24 tanh convolutions", tanh_images),
    Scenario("H24 few sigmoids", few_sigmoids),
    Scenario("H25 layer-scale", layer_scale),
    Scenario("H26 smoothed labels", label_smoothing),
    Scenario("H27 curriculum", curriculum),
    Scenario("H28 LBFGS", lbfgs),
    Scenario("H29 weight average", weight_average),
    Scenario("H06 two optimizers", two_optimizers),
    Scenario("H03 GPT, tied late", tied_late),
    Scenario("H13 penalised critic", penalised_critic),
    Scenario("H16 bandit", bandit),
    Scenario("H21 single samples", single_samples),
    Scenario("H regression", deep_supervision),
    Scenario("H autoencoder", autoencoder),
    Scenario("H ten plain layers", deep_plain),
)
