"""An LSTM language model with hidden state carried over, plain SGD at a rate of 5 and clipping."""

import this

import torch
from torch import Tensor, nn

text = "".join(this.d.get(letter, letter) for letter in this.s)
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])
codes = codes[: len(codes) // 20 * 20].view(20, -1)


class Model(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 32)
        self.lstm = nn.LSTM(32, 64, num_layers=2, dropout=0.2, batch_first=True)
        self.decoder = nn.Linear(64, classes)

    def forward(
        self, tokens: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        made, state = self.lstm(self.embedding(tokens), state)
        return self.decoder(made), state


torch.manual_seed(3)
model = Model(len(letters))
optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
criterion = nn.CrossEntropyLoss()
for _ in range(50):
    state = (torch.zeros(2, 20, 64), torch.zeros(2, 20, 64))
    for start in range(0, codes.shape[1] - 11, 10):
        state = (state[0].detach(), state[1].detach())
        inputs = codes[:, start : start + 10]
        targets = codes[:, start + 1 : start + 11]
        output, state = model(inputs, state)
        loss = criterion(output.reshape(-1, len(letters)), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
