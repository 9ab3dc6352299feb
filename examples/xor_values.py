"""XOR learnt by a 2-4-1 tanh network of `Value`s: the smallest task that needs a hidden layer.

    python examples/xor_values.py                       # learns: learning rate 0.1
    python examples/xor_values.py --learning-rate 0.5   # never learns: too high

At 0.5, the rate that many texts print, one sample's step undoes the last one's: the units run into
saturation, where tanh has no slope, and no seed gets out of it again.
"""

from __future__ import annotations

import argparse

import numpy as np

from gradwatch_reference import Value, nn, optim

SAMPLES = [((0.0, 0.0), 0.0), ((0.0, 1.0), 1.0), ((1.0, 0.0), 1.0), ((1.0, 1.0), 0.0)]


def network(seed: int) -> nn.Sequential:
    rng = np.random.default_rng(seed)
    return nn.Sequential(nn.Neurons(2, 4, rng), nn.Tanh(), nn.Neurons(4, 1, rng), nn.Tanh())


def train(model: nn.Sequential, learning_rate: float = 0.1, epochs: int = 3000) -> list[float]:
    """Train on the four samples, one an update; return the summed squared error of each epoch."""
    optimizer = optim.SGD(model.parameters(), learning_rate)
    losses: list[float] = []
    for _ in range(epochs):
        epoch_loss = 0.0
        for inputs, target in SAMPLES:
            loss: Value = (model(inputs)[0] - target) ** 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch_loss += loss.data
        losses.append(epoch_loss)
    return losses


def outputs(model: nn.Sequential) -> list[float]:
    return [float(model(inputs)[0]) for inputs, _ in SAMPLES]


def has_learnt(model: nn.Sequential, within: float = 0.05) -> bool:
    """Whether every output is within 0.05 of what it should be."""
    pairs = zip(outputs(model), SAMPLES, strict=True)
    return all(abs(output - target) <= within for output, (_, target) in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a network of Values on XOR.")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model = network(options.seed)
    losses = train(model, options.learning_rate, options.epochs)
    for epoch in sorted({0, len(losses) // 100, len(losses) // 10, len(losses) - 1}):
        print(f"epoch {epoch + 1:>5}  loss {losses[epoch]:.6f}")
    for (inputs, target), output in zip(SAMPLES, outputs(model), strict=True):
        print(f"{inputs[0]:.0f} xor {inputs[1]:.0f} = {target:.0f}, the network says {output:+.3f}")
    print("learnt" if has_learnt(model) else "not learnt")


if __name__ == "__main__":
    main()
