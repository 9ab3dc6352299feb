"""Training jobs beyond the demo's: rows of the zoo that tempt or test the four detectors.

Each job is `train(watch, seed)`; `watch` is called once for each optimizer of the job.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune

from gradwatch.demo.scenarios import Watch, digits, standard_library_text

Train = Callable[[Watch, int], None]


class Job(NamedTuple):
    """One training job: the kinds that must be found at its end, and those that may be as well."""

    name: str
    train: Train
    expected: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()


def fit(
    watch: Watch,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    objective: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    batch_size: int = 64,
) -> None:
    """Train on digits."""
    images, labels = digits()
    monitor = watch(model, optimizer)
    for _ in range(steps):
        batch = torch.randint(len(images), (batch_size,))
        loss = objective(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def mlp(
    widths: list[int],
    activation: Callable[[], nn.Module],
    initialise: Callable[[nn.Linear], object] | None = None,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        if initialise is not None:
            initialise(linear)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def conv_with_batch_norm(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    fit(watch, model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 200)


class Block(nn.Module):
    def __init__(self, width: int, scale: float | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), scale)) if scale is not None else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.down(torch.relu(self.up(self.norm(x))))
        return x + (branch if self.scale is None else self.scale * branch)


def residual_50_blocks(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 32), *(Block(32) for _ in range(50)), nn.LayerNorm(32), nn.Linear(32, 10)
    )
    fit(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), 100)


def layer_scale(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 32), *(Block(32, 1e-5) for _ in range(8)), nn.LayerNorm(32), nn.Linear(32, 10)
    )
    fit(watch, model, torch.optim.AdamW(model.parameters(), lr=1e-3), 200)


def frozen_backbone(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    model = mlp([64, 64, 64, 64, 64, 10], nn.ReLU)
    for layer in model[:6]:
        layer.requires_grad_(False)
    fit(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), 300)


class Adapter(nn.Module):
    """A frozen Linear with a trainable low-rank addition that starts at zero (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def lora(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        Adapter(nn.Linear(64, 64)), nn.ReLU(),
        Adapter(nn.Linear(64, 64)), nn.ReLU(),
        Adapter(nn.Linear(64, 64)), nn.ReLU(),
        Adapter(nn.Linear(64, 10)),
    )  # fmt: skip
    fit(watch, model, torch.optim.AdamW(model.parameters(), lr=1e-3), 200)


def scaled_loss(factor: float) -> Train:
    def train(watch: Watch, seed: int) -> None:
        torch.manual_seed(seed)
        model = mlp([64, 64, 64, 10], nn.ReLU)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-12)
        fit(watch, model, optimizer, 300, lambda x, y: factor * F.cross_entropy(x, y))

    return train


def converged(watch: Watch, seed: int) -> None:
    """Trained on long after the training loss is nearly 0, in full batches of 200 digits."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = mlp([64, 64, 64, 10], nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    monitor = watch(model, optimizer)
    for _ in range(1000):
        loss = F.cross_entropy(model(images[:200]), labels[:200])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def hinge_to_zero(watch: Watch, seed: int) -> None:
    """A margin loss that reaches exactly 0, so that no layer has any gradient left."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = mlp([64, 64, 64, 10], nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    monitor = watch(model, optimizer)
    for _ in range(400):
        loss = F.multi_margin_loss(model(images[:200]), labels[:200])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def restarts(watch: Watch, seed: int) -> None:
    """Cosine decay with warm restarts: the learning rate leaps back each 100 steps."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = mlp([64, 128, 128, 10], nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100)
    monitor = watch(model, optimizer)
    for _ in range(500):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        monitor.log(loss=loss.detach())


def gan(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    images, _ = digits()
    generator = mlp([16, 64, 64, 64], nn.ReLU)
    critic = mlp([64, 64, 64, 1], lambda: nn.LeakyReLU(0.2))
    steps_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    steps_c = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999))
    monitor_g, monitor_c = watch(generator, steps_g), watch(critic, steps_c)
    for _ in range(400):
        real = images[torch.randint(len(images), (64,))]
        fake = torch.sigmoid(generator(torch.randn(64, 16)))
        loss_c = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
        steps_c.zero_grad()
        loss_c.backward()
        steps_c.step()
        loss_g = F.softplus(-critic(fake)).mean()
        steps_g.zero_grad()
        loss_g.backward()
        steps_g.step()
        monitor_c.log(loss=loss_c.detach())
        monitor_g.log(loss=loss_g.detach())


class TiedModel(nn.Module):
    """A small causal language model whose output weights are its token embedding."""

    def __init__(self, vocabulary: int, width: int = 32, context: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            ),
            3,
            enable_nested_tensor=False,
        )
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time)
        x = self.token(tokens) + self.position(torch.arange(time))
        return self.blocks(x, mask=mask, is_causal=True) @ self.token.weight.T


def tied_transformer(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    text = standard_library_text(100_000).encode()
    tokens = torch.tensor(list(text))
    model = TiedModel(512)  # most rows are never seen
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = watch(model, optimizer)
    for _ in range(150):
        starts = torch.randint(len(tokens) - 33, (8,))
        pieces = torch.stack([tokens[start : start + 33] for start in starts])
        loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp([64, 64, 64], nn.ReLU)
        self.main, self.rare = nn.Linear(64, 10), nn.Linear(64, 10)


def rare_head(watch: Watch, seed: int) -> None:
    """Two tasks; the second head is used at each 10th step only and has gradient 0 otherwise."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer)
    for step in range(1, 301):
        batch = torch.randint(len(images), (64,))
        hidden = torch.relu(model.trunk(images[batch]))
        head = model.rare if step % 10 == 5 else model.main
        loss = F.cross_entropy(head(hidden), labels[batch])
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def pruned(watch: Watch, seed: int) -> None:
    """60 % of each hidden layer's rows are masked for good; their biases still learn."""
    torch.manual_seed(seed)
    model = mlp([64, 64, 64, 10], nn.ReLU)
    for layer in model:
        if isinstance(layer, nn.Linear) and layer.out_features == 64:
            prune.ln_structured(layer, "weight", amount=0.6, n=2, dim=0)
    fit(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), 200)


def small_tanh(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    model = mlp([64] * 30 + [10], nn.Tanh, lambda layer: nn.init.normal_(layer.weight, std=0.01))
    fit(watch, model, torch.optim.SGD(model.parameters(), lr=0.1), 200)


def sigmoids(depth: int, optimizer: Callable[..., torch.optim.Optimizer], lr: float) -> Train:
    def train(watch: Watch, seed: int) -> None:
        torch.manual_seed(seed)
        model = mlp([64] * (depth + 1) + [10], nn.Sigmoid)
        fit(watch, model, optimizer(model.parameters(), lr=lr), 200)

    return train


def large_relu(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    model = mlp([64] * 10 + [10], nn.ReLU, lambda layer: nn.init.normal_(layer.weight, std=1.0))
    fit(watch, model, torch.optim.SGD(model.parameters(), lr=0.01), 30)


class Recurrent(nn.Module):
    def __init__(self, kind: str, chunk: int, radius: float) -> None:
        super().__init__()
        self.chunk = chunk
        self.kind = kind
        self.cell = nn.RNNCell(chunk, 64)
        nn.init.normal_(self.cell.weight_hh, std=radius / 8)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 64)
        cell = self.cell
        for piece in x.split(self.chunk, dim=1):
            state = F.linear(piece, cell.weight_ih, cell.bias_ih) + F.linear(
                state, cell.weight_hh, cell.bias_hh
            )
            if self.kind == "tanh":
                state = torch.tanh(state)
        return self.head(state)


def recurrent(kind: str, chunk: int, lr: float, radius: float = 1.5) -> Train:
    def train(watch: Watch, seed: int) -> None:
        torch.manual_seed(seed)
        model = Recurrent(kind, chunk, radius)
        fit(watch, model, torch.optim.SGD(model.parameters(), lr=lr), 100)

    return train


def dead_layer(position: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Train:
    def train(watch: Watch, seed: int) -> None:
        torch.manual_seed(seed)
        model = mlp([64, 64, 64, 64, 64, 10], activation)
        nn.init.constant_(model[2 * position].bias, -10.0)
        fit(watch, model, torch.optim.SGD(model.parameters(), lr=0.1), 100)

    return train


def partly_dead_conv(watch: Watch, seed: int) -> None:
    torch.manual_seed(seed)
    middle = nn.Conv2d(16, 20, 3, padding=1)
    nn.init.constant_(middle.bias[:14], -10.0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), middle, nn.ReLU(),
        nn.Conv2d(20, 16, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    fit(watch, model, torch.optim.Adam(model.parameters(), lr=1e-3), 150)


def killed_by_one_step(watch: Watch, seed: int) -> None:
    """One step with a learning rate 1,000 times too large, at step 100."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = mlp([64, 64, 64, 64, 10], nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer)
    for step in range(1, 201):
        optimizer.param_groups[0]["lr"] = 100.0 if step == 100 else 0.1
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


VANISHING = frozenset({"vanishing"})
EXPLODING = frozenset({"exploding"})
DEAD = frozenset({"dead_units"})
NON_FINITE = frozenset({"non_finite"})

JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job("H02 conv with batch-norm", conv_with_batch_norm),
        Job("H03 tied transformer", tied_transformer),
        Job("H05 residual, 50 blocks", residual_50_blocks),
        Job("H06 frozen backbone", frozen_backbone),
        Job("H08 LoRA", lora),
        Job("H12 restarts", restarts),
        Job("H13 GAN", gan),
        Job("H18 converged", converged),
        Job("H18 margin loss at 0", hinge_to_zero),
        Job("H20 loss x 1e-4", scaled_loss(1e-4)),
        Job("H20 loss x 1e4", scaled_loss(1e4)),
        Job("H22 rare head", rare_head),
        Job("H23 pruned rows", pruned),
        Job("H25 layer-scale 1e-5", layer_scale),
        Job("F01 sigmoids, SGD", sigmoids(10, torch.optim.SGD, 0.1), VANISHING),
        Job("F01 sigmoids, 6 layers", sigmoids(6, torch.optim.SGD, 0.1), VANISHING),
        Job("F01 sigmoids, Adam", sigmoids(10, torch.optim.Adam, 1e-3), VANISHING),
        Job("F02 small tanh", small_tanh, VANISHING),
        Job("F04 linear RNN", recurrent("linear", 2, 0.01), EXPLODING, NON_FINITE),
        Job("F04 linear RNN, short", recurrent("linear", 4, 0.01), EXPLODING, NON_FINITE),
        Job("F04 tanh RNN", recurrent("tanh", 1, 0.01, 2.5), EXPLODING, DEAD | VANISHING),
        Job("F05 large ReLU", large_relu, EXPLODING, NON_FINITE | DEAD),
        Job("F07 dead layer 1", dead_layer(0), DEAD),
        Job("F07 dead layer 3", dead_layer(2), DEAD),
        Job("F07 dead layer 4", dead_layer(3), DEAD),
        Job("F08 killed by one step", killed_by_one_step, DEAD, EXPLODING | NON_FINITE),
        Job("F09 14 of 20 channels dead", partly_dead_conv, DEAD),
    )
}
