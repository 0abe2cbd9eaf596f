"""Strategy: how one optimizer step is spread over workers; and the one place where it is chosen."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from danlu.spec.optim import Optim
from danlu.spec.parallel import Ddp, DeepSpeed, Fsdp, Parallel, Tensor

if TYPE_CHECKING:
    from danlu.train.adalora import RankAllocator


@dataclass(frozen=True)
class Setup:
    """What a strategy needs besides the model."""

    optim: Optim
    param_groups: list[dict[str, Any]]
    micro_batch_size: int
    bf16: bool
    device: torch.device
    rank: int
    world_size: int
    allocator: RankAllocator | None = None
    """What moves ranks after each update, seeing weights and whole gradients."""


class Strategy(Protocol):
    """prepare once; then per optimizer step micro_step + backward for each pass, and step; state is for all ranks together."""

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        """The module to call instead of `model`."""
        ...

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Wraps the forward and backward of one pass; gradients are exchanged in the last one."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`, which the models (ranks, or groups of them) average."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients; the global gradient norm before clipping."""
        ...

    def state(self) -> State:
        """How this strategy's training state gets in and out of files."""
        ...


class State(Protocol):
    """Weights and optimizer state. Every call is collective."""

    def save(self, folder: Path) -> None:
        """Write this rank's part into an existing folder."""
        ...

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote; with another number of workers where `checkpoint.ANY_WORLD_SIZE` says so."""
        ...

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The named tensors, whole, float32 and on the CPU, by the unwrapped model's names; filled on rank 0, empty elsewhere."""
        ...


def make_strategy(parallel: Parallel) -> Strategy:
    """The strategy of a spec's `parallel:`."""
    match parallel:
        case Ddp():
            from danlu.train.strategies.ddp import DdpStrategy

            return DdpStrategy()
        case DeepSpeed():
            from danlu.train.strategies.deepspeed import DeepSpeedStrategy

            return DeepSpeedStrategy(parallel)
        case Fsdp():
            from danlu.train.strategies.fsdp import FsdpStrategy

            return FsdpStrategy(parallel)
        case Tensor():
            from danlu.train.strategies.tensor import TensorStrategy

            return TensorStrategy(parallel)
