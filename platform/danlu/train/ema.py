"""A running average of the trained weights (https://arxiv.org/abs/1803.05407): what is scored and stored instead of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from danlu.train.strategy import State

FILE = "ema.pt"


class Ema:
    """The average of a module's trainable parameters. They have to be whole in every process.

    `put_out` names those in which a zero is a decision and not a value: it is zero in the average too.
    """

    def __init__(self, module: nn.Module, decay: float, put_out: Collection[str] = ()) -> None:
        self.decay, self.put_out = decay, put_out
        self.live = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.average = {name: parameter.detach().clone() for name, parameter in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after 1-based `step` in. Early on it is the mean so far, or the first weights would weigh for ever."""
        share = max(1 - self.decay, 1 / (step + 1))
        for name, average in self.average.items():
            average.lerp_(self.live[name], share)
            if name in self.put_out:
                average.masked_fill_(self.live[name] == 0, 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the average while the block runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.average.items():
            kept = self.live[name].detach().clone()
            self.live[name].copy_(average)
            average.copy_(kept)


class EmaState:
    """A strategy's state with the average beside it."""

    def __init__(self, state: State, ema: Ema, rank: int) -> None:
        self.state, self.ema, self.rank = state, ema, rank
        self.weights = state.weights

    def save(self, folder: Path) -> None:
        """Write this rank's part; the average is the same on all ranks, so the first one's."""
        self.state.save(folder)
        if self.rank == 0:
            torch.save(self.ema.average, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read both back."""
        self.state.load(folder)
        for name, average in torch.load(folder / FILE, map_location="cpu", weights_only=True).items():
            self.ema.average[name].copy_(average)
