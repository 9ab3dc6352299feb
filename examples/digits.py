"""The one line in a small training script: scikit-learn's digits, a ReLU network, Adam.

    gradwatch up                                                  # in another terminal
    GRADWATCH_URL=http://127.0.0.1:8470 python examples/digits.py

Without GRADWATCH_URL the run is kept on local disk, and `gradwatch sync` sends it later.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import gradwatch

EPOCHS = 20


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16, dtype=torch.float32)
    targets = torch.tensor(labels)

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = gradwatch.watch(model, optimizer, name="digits", config={"epochs": EPOCHS})

    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(64):
            loss = functional.cross_entropy(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss)
        accuracy = (model(inputs).argmax(1) == targets).float().mean()
        print(f"epoch {epoch + 1:2d}  accuracy {accuracy:.3f}")
    monitor.finish()


if __name__ == "__main__":
    main()
