"""A GAN: two networks, two optimizers, labels that the step makes up."""

import torch
from torch import nn

torch.manual_seed(4)
generator = nn.Sequential(
    nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(True), nn.Linear(32, 2), nn.Tanh()
)
discriminator = nn.Sequential(
    nn.Linear(2, 32), nn.LeakyReLU(0.2, inplace=True), nn.Linear(32, 1), nn.Sigmoid()
)
criterion = nn.BCELoss()
optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
for _ in range(10_000):
    angle = torch.rand(64, 1) * 6.28
    real = torch.cat([angle.cos(), angle.sin()], 1) * 0.7
    label = torch.full((64, 1), 1.0)

    discriminator.zero_grad()
    error_real = criterion(discriminator(real), label)
    error_real.backward()
    fake = generator(torch.randn(64, 8))
    error_fake = criterion(discriminator(fake.detach()), torch.zeros(64, 1))
    error_fake.backward()
    optimizer_d.step()

    generator.zero_grad()
    error = criterion(discriminator(fake), label)
    error.backward()
    optimizer_g.step()
