"""The state of every random generator, kept and given back."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# torch seeds itself with 53 random bits; people choose seeds that numpy takes too.
CHOSEN_SEEDS = 2**32


def torch_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The state of torch's generators: the CPU's, and those of the CUDA devices in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def set_torch_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


@contextmanager
def preserved() -> Generator[None]:
    """Leave torch's, numpy's and Python's generators as they were."""
    before = torch_state()
    legacy: Any = np.random.get_state()
    plain = random.getstate()
    try:
        yield
    finally:
        set_torch_state(before)
        np.random.set_state(legacy)
        random.setstate(plain)


def seeded() -> bool:
    """Whether somebody chose torch's seed, as far as the number shows."""
    return torch.initial_seed() < CHOSEN_SEEDS
