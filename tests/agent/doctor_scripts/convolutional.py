"""A convolutional network with batch-norm and residuals: accumulation, schedule, workers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset


class Stripes(Dataset[tuple[Tensor, int]]):
    """Images of stripes: the label is how often they repeat."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % 4
        generator = torch.Generator().manual_seed(index)
        wave = torch.sin(torch.arange(16) * (label + 1) * 0.5 + torch.rand(1, generator=generator))
        image = wave.expand(3, 16, 16) + 0.3 * torch.randn(3, 16, 16, generator=generator)
        return image, label


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)  # the branch starts silent

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)), inplace=True)
        return F.relu(x + self.norm2(self.second(y)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(16) for _ in range(3)))
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def main() -> None:
    torch.manual_seed(1)
    model = torch.compile(Net(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    loader = DataLoader(Stripes(), batch_size=16, shuffle=True, num_workers=1)
    for _ in range(100):
        optimizer.zero_grad(set_to_none=True)
        for place, (images, labels) in enumerate(loader):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(images), labels, label_smoothing=0.1) / 2
            loss.backward()
            if place % 2 == 1:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        schedule.step()


if __name__ == "__main__":
    main()
