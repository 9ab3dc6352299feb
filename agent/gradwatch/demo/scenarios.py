"""The training jobs of the demo, each with the findings that gradwatch must make of it.

Each `train` is a script as a user would write it: a model, an optimizer, the one line, a loop.
torch and scikit-learn are imported when a job starts, never with this module.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Monitor(AbstractContextManager["Monitor"], Protocol):
    """What `gradwatch.watch` returns."""

    def log(self, *, loss: Tensor) -> None: ...
    def finish(self) -> None: ...


class Watch(Protocol):
    """`gradwatch.watch`, or whatever stands in for it."""

    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        name: str | None = None,
        project: str | None = None,
        config: dict[str, object] | None = None,
        tags: list[str] | None = None,
    ) -> Monitor: ...


Tick = Callable[[], None]


class Train(Protocol):
    """Trains one network from start to end; calls `tick` after each optimizer step."""

    def __call__(self, watch: Watch, tick: Tick, seed: int = 0) -> None: ...


class Scenario(NamedTuple):
    """One training job and the verdict that it must get."""

    name: str
    title: str
    expected: frozenset[str]  # kinds of finding at the end, see gradwatch.health.kinds
    steps: int  # how often `train` calls tick
    train: Train


HEALTHY_MLP_STEPS = 1000
TRANSFORMER_STEPS = 300
SIGMOID_STEPS = 800
RNN_STEPS = 600
DEAD_STEPS = 800
LOG_STEPS = 800
LOG_BLANK_STEP = 700  # the step whose batch holds a blank page


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits. Returns float32[1797, 64] in 0..1, int64[1797]."""
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def train_healthy_mlp(watch: Watch, tick: Tick, seed: int = 0) -> None:
    """A ReLU classifier of digits under Adam: converges to a training accuracy of 1."""
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    torch.manual_seed(seed)
    images, labels = digits()
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watch(model, optimizer, name="healthy-mlp", tags=["healthy"]) as monitor:
        for _ in range(HEALTHY_MLP_STEPS):
            batch = torch.randint(len(images), (128,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss.detach())
            tick()


def standard_library_text(characters: int) -> str:
    """The first characters of Python's own source, modules in alphabetical order."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = ""
    for module in sorted(folder.glob("*.py")):
        text += module.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= characters:
            break
    return text[:characters]


def train_healthy_transformer(watch: Watch, tick: Tick, seed: int = 0) -> None:
    """A causal transformer that learns to write Python, one character at a time."""
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    width, heads, context = 48, 4, 48

    class Block(nn.Module):
        """Attention over the past, then a small MLP, each added to what came in."""

        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )

        def forward(self, x: Tensor) -> Tensor:
            batch, time, _ = x.shape
            parts = self.qkv(self.norm1(x)).view(batch, time, 3, heads, width // heads)
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
            return x + self.mlp(self.norm2(x))

    class CharacterModel(nn.Module):
        """Learned tokens and positions, two blocks, and a guess of the next character."""

        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.token = nn.Embedding(vocabulary, width)
            self.position = nn.Embedding(context, width)
            self.blocks = nn.Sequential(Block(), Block())
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, vocabulary)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
            return self.head(self.norm(self.blocks(x)))

    torch.manual_seed(seed)
    text = standard_library_text(200_000)
    alphabet = sorted(set(text))
    index = {character: number for number, character in enumerate(alphabet)}
    tokens = torch.tensor([index[character] for character in text])

    model = CharacterModel(len(alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with watch(model, optimizer, name="healthy-transformer", tags=["healthy"]) as monitor:
        for _ in range(TRANSFORMER_STEPS):
            starts = torch.randint(len(tokens) - context - 1, (16,))
            pieces = torch.stack([tokens[start : start + context + 1] for start in starts])
            logits = model(pieces[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss.detach())
            tick()


def train_ten_sigmoids(watch: Watch, tick: Tick, seed: int = 0) -> None:
    """Ten sigmoid layers: each passes on at most a quarter of the gradient."""
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    torch.manual_seed(seed)
    images, labels = digits()
    widths = [64] * 11
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watch(model, optimizer, name="ten-sigmoids", tags=["faulty"]) as monitor:
        for _ in range(SIGMOID_STEPS):
            batch = torch.randint(len(images), (128,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss.detach())
            tick()


def train_exploding_rnn(watch: Watch, tick: Tick, seed: int = 0) -> None:
    """A linear recurrence over 32 pairs of pixels whose state grows 1.5-fold a pair: 1.5^32."""
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    class Reader(nn.Module):
        """Reads a digit two pixels at a time, then guesses it from the last state."""

        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(2, 64)
            self.recur = nn.Linear(64, 64, bias=False)
            nn.init.orthogonal_(self.recur.weight, gain=1.5)
            self.head = nn.Linear(64, 10)

        def forward(self, pairs: Tensor) -> Tensor:
            state = torch.zeros(len(pairs), 64)
            for time in range(pairs.shape[1]):
                state = self.read(pairs[:, time]) + self.recur(state)
            return self.head(state)

    torch.manual_seed(seed)
    images, labels = digits()
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watch(model, optimizer, name="exploding-rnn", tags=["faulty"]) as monitor:
        for _ in range(RNN_STEPS):
            batch = torch.randint(len(images), (64,))
            loss = F.cross_entropy(model(images[batch].view(64, 32, 2)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss.detach())
            tick()


def train_dead_relu(watch: Watch, tick: Tick, seed: int = 0) -> None:
    """A ReLU classifier whose third layer starts with biases of -10: no unit of it ever fires."""
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    torch.manual_seed(seed)
    images, labels = digits()
    third = nn.Linear(128, 128)
    nn.init.constant_(third.bias, -10.0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(),
        nn.Linear(128, 128), nn.ReLU(),
        third, nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watch(model, optimizer, name="dead-relu", tags=["faulty"]) as monitor:
        for _ in range(DEAD_STEPS):
            batch = torch.randint(len(images), (128,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss.detach())
            tick()


def train_log_of_zero(watch: Watch, tick: Tick, seed: int = 0) -> None:
    """Learns the logarithm of a digit's ink, in good health until a blank page makes it log(0)."""
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    torch.manual_seed(seed)
    images, _ = digits()
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watch(model, optimizer, name="log-of-zero", tags=["faulty"]) as monitor:
        for step in range(1, LOG_STEPS + 1):
            pages = images[torch.randint(len(images), (128,))]
            if step == LOG_BLANK_STEP:
                pages[0] = 0.0
            ink = pages.sum(dim=1)
            predicted = F.softplus(model(pages)).squeeze(1)
            loss = F.mse_loss(predicted.log(), ink.log())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss.detach())
            tick()


HEALTHY: frozenset[str] = frozenset()

SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "healthy-mlp",
            "ReLU network on digits",
            HEALTHY,
            HEALTHY_MLP_STEPS,
            train_healthy_mlp,
        ),
        Scenario(
            "healthy-transformer",
            "Transformer that writes Python",
            HEALTHY,
            TRANSFORMER_STEPS,
            train_healthy_transformer,
        ),
        Scenario(
            "ten-sigmoids",
            "Ten sigmoid layers",
            frozenset({"vanishing"}),
            SIGMOID_STEPS,
            train_ten_sigmoids,
        ),
        Scenario(
            "exploding-rnn",
            "Recurrent network, spectral radius 1.5",
            frozenset({"exploding"}),
            RNN_STEPS,
            train_exploding_rnn,
        ),
        Scenario(
            "dead-relu",
            "ReLU layer with biases of -10",
            frozenset({"dead_units"}),
            DEAD_STEPS,
            train_dead_relu,
        ),
        Scenario(
            "log-of-zero",
            "Logarithm of 0",
            frozenset({"non_finite"}),
            LOG_STEPS,
            train_log_of_zero,
        ),
    )
}
