"""An MLP on scikit-learn's digits, as a first script is written: nothing is wrong with it."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=1e-3)
arguments = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
data = TensorDataset(
    torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=arguments.lr)
loss_of = nn.CrossEntropyLoss()

with torch.no_grad():
    print("accuracy before", (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean())
for epoch in range(100):
    model.train()
    for inputs, targets in DataLoader(data, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
    print(epoch, loss.item())
