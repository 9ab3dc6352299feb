"""The parts that the zoo's jobs are made of: data, networks and the usual loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import cache
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradwatch.demo.scenarios import Watch, digits, standard_library_text

Data = tuple[Tensor, Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]


@cache
def digit_data() -> Data:
    return digits()


def teacher_data(chance: Random, classes: int = 5, features: int = 32, rows: int = 2000) -> Data:
    """Points labelled by a random network of one hidden layer."""
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    x = torch.randn(rows, features, generator=generator)
    hidden = torch.tanh(x @ torch.randn(features, 16, generator=generator) / features**0.5)
    return x, (hidden @ torch.randn(16, classes, generator=generator)).argmax(dim=1)


def regression_data(chance: Random, features: int = 16, rows: int = 2000) -> Data:
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    x = torch.randn(rows, features, generator=generator)
    target = torch.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + 0.1 * x[:, 3:].sum(dim=1)
    noise = 0.05 * torch.randn(rows, generator=generator)
    return x, (target + noise).unsqueeze(1)


@cache
def text_tokens(characters: int = 100_000) -> tuple[Tensor, int]:
    """Python's own source as numbers, and the size of the alphabet."""
    text = standard_library_text(characters)
    alphabet = {character: place for place, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def some_data(chance: Random) -> tuple[Data, int, int]:
    """A classification task: data, features, classes."""
    if chance.random() < 0.6:
        return digit_data(), 64, 10
    return teacher_data(chance), 32, 5


def mlp(
    widths: list[int],
    activation: Callable[[], nn.Module] = nn.ReLU,
    initialise: Callable[[nn.Linear], object] | None = None,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        if initialise is not None:
            initialise(linear)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def tanh_convolutions(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 3, padding=1), nn.Tanh(),
        nn.Conv2d(width, width, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(32 * width, 10),
    )  # fmt: skip


def he(layer: nn.Linear) -> None:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)


def batch_of(data: Data, size: int) -> Data:
    rows = torch.randint(len(data[0]), (size,))
    return data[0][rows], data[1][rows]


def fit(
    watch: Watch,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    data: Data | None = None,
    objective: Objective = F.cross_entropy,
    batch_size: int = 64,
    *,
    before: Callable[[int], object] | None = None,
    spoil: Callable[[int, Tensor, Tensor], Data] | None = None,
    after_backward: Callable[[], object] | None = None,
    after_step: Callable[[int], object] | None = None,
    zero_grad: bool = True,
    watched: nn.Module | None = None,
    extra: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """The usual loop over random batches, with a place for each kind of mistake."""
    data = data if data is not None else digit_data()
    monitor = watch(watched or model, optimizer)
    for step in range(1, steps + 1):
        if before is not None:
            before(step)
        x, y = batch_of(data, batch_size)
        if spoil is not None:
            x, y = spoil(step, x, y)
        loss = objective(model(x), y)
        if zero_grad:
            optimizer.zero_grad()
        loss.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        if after_step is not None:
            after_step(step)
        monitor.log(loss=loss.detach(), **(extra() if extra is not None else {}))


class Block(nn.Module):
    """A residual block; `scale` multiplies its branch, `norm` normalises what enters it."""

    def __init__(self, width: int, scale: float | None = None, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), scale)) if scale is not None else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.down(torch.relu(self.up(self.norm(x))))
        return x + (branch if self.scale is None else self.scale * branch)


def residual(features: int, width: int, blocks: int, classes: int, **options: object) -> nn.Module:
    norm = bool(options.get("norm", True))
    return nn.Sequential(
        nn.Linear(features, width),
        *(Block(width, **options) for _ in range(blocks)),  # pyright: ignore[reportArgumentType]
        nn.LayerNorm(width) if norm else nn.Identity(),
        nn.Linear(width, classes),
    )


class Adapter(nn.Module):
    """A frozen Linear with a trainable low-rank addition that starts at zero (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Recurrent(nn.Module):
    """Reads a sequence a piece at a time; guesses from its last state."""

    def __init__(
        self, chunk: int, width: int, classes: int, radius: float, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.read = nn.Linear(chunk, width)
        self.recur = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.recur.weight, gain=radius)
        self.head = nn.Linear(width, classes)
        self.activation = torch.tanh if activation == "tanh" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), self.recur.in_features)
        for piece in x.split(self.chunk, dim=1):
            state = self.activation(self.read(piece) + self.recur(state))
        return self.head(state)


class Gpt(nn.Module):
    """A small causal transformer."""

    def __init__(
        self,
        vocabulary: int,
        width: int = 32,
        blocks: int = 2,
        context: int = 32,
        tied: bool = False,
        norm_first: bool = True,
        std: float = 0.02,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout, "gelu", batch_first=True, norm_first=norm_first
            ),
            blocks,
            norm=nn.LayerNorm(width) if norm_first else None,
            enable_nested_tensor=False,
        )
        nn.init.normal_(self.token.weight, std=std)
        nn.init.normal_(self.position.weight, std=std)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time)
        x = self.token(tokens) + self.position(torch.arange(time))
        x = self.blocks(x, mask=mask, is_causal=True)
        return x @ self.token.weight.T if self.head is None else self.head(x)


def text_batch(size: int, length: int) -> Data:
    tokens, _ = text_tokens()
    starts = torch.randint(len(tokens) - length - 1, (size,))
    pieces = torch.stack([tokens[start : start + length + 1] for start in starts.tolist()])
    return pieces[:, :-1], pieces[:, 1:]


def fit_text(
    watch: Watch,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    size: int = 8,
    length: int | Callable[[int], int] = 32,
    before: Callable[[int], object] | None = None,
    after_backward: Callable[[], object] | None = None,
) -> None:
    """Learn to continue Python's source, one character at a time."""
    monitor = watch(model, optimizer)
    for step in range(1, steps + 1):
        if before is not None:
            before(step)
        x, y = text_batch(size, length if isinstance(length, int) else length(step))
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        monitor.log(loss=loss.detach())


def an_optimizer(chance: Random, model: nn.Module, *, adam: float = 1e-3, sgd: float = 0.1):
    """One that suits the model, of several kinds."""
    parameters = [item for item in model.parameters() if item.requires_grad]
    kind = chance.choice(["adam", "adamw", "sgd", "momentum"])
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=adam)
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=adam)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=sgd)
    return torch.optim.SGD(parameters, lr=sgd / 5, momentum=0.9)


def warm_up_cosine(optimizer: torch.optim.Optimizer, warm_up: int, steps: int) -> object:
    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / (steps - warm_up))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
