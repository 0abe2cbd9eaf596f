"""Strategy: how one optimizer step is spread over workers; and the one place where it is chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from danlu.data.pack import Packed
from danlu.spec.optim import Optim
from danlu.spec.parallel import Ddp, DeepSpeed, Fsdp, Parallel, Pipeline, Tensor
from danlu.train.exchange import Exchange

if TYPE_CHECKING:
    from danlu.train.adalora import RankAllocator
    from danlu.train.precision import LossScale

Loss = Callable[[nn.Module, Packed], torch.Tensor]
"""A task's loss of one pass: this model's share of the global batch's mean."""


@dataclass(frozen=True)
class Setup:
    """What a strategy needs besides the model."""

    optim: Optim
    param_groups: list[dict[str, Any]]
    micro_batch_size: int
    dtype: torch.dtype
    """What matrices are multiplied in."""
    device: torch.device
    rank: int
    world_size: int
    workers_per_model: int = 1
    allocator: RankAllocator | None = None
    """What moves ranks after each update, seeing weights and whole gradients."""
    loss_scale: LossScale | None = None
    """What the loss is multiplied by before its backward, in float16."""
    exchange: Exchange = field(default_factory=lambda: Exchange(torch.device("cpu")))
    """What is told of waiting for other workers."""

    @property
    def num_models(self) -> int:
        """Models that read different rows."""
        return self.world_size // self.workers_per_model

    def autocast(self) -> torch.autocast:
        """Matrices are multiplied in `dtype`, over float32 weights, while the block runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def takes_step(self, grad_norm: float) -> bool:
        """False if a float16 gradient has overflowed: this step is then skipped, on all ranks."""
        return self.loss_scale is None or self.loss_scale.takes_step(grad_norm)


class Strategy(Protocol):
    """prepare once; then accumulate and step for each optimizer step; state is for all ranks together."""

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        """The module to call instead of `model`."""
        ...

    def accumulate(self, micro_batches: Sequence[Packed], loss: Loss) -> torch.Tensor:
        """Run the step's passes and keep their gradients; the sum of this model's losses, on the first of its workers at least."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients; the global gradient norm before clipping, not finite if the step was skipped."""
        ...

    def state(self) -> State:
        """How this strategy's training state gets in and out of files."""
        ...


class OneByOne(ABC):
    """Strategies whose passes run one after the other: they say what one pass is."""

    setup: Setup
    model: nn.Module

    @abstractmethod
    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Wraps the forward and backward of one pass; gradients are exchanged in the last one."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`, which the models average."""
        scale = self.setup.loss_scale
        torch.autograd.backward(loss if scale is None else loss * scale.scale)

    def accumulate(self, micro_batches: Sequence[Packed], loss: Loss) -> torch.Tensor:
        """One forward and backward for each micro-batch."""
        total = torch.zeros((), device=self.setup.device)
        models, allocator = self.setup.num_models, self.setup.allocator
        for i, batch in enumerate(micro_batches):
            with self.micro_step(last=i + 1 == len(micro_batches)):
                its = loss(self.model, batch)
                penalty = 0.0 if allocator is None else allocator.penalty() / (len(micro_batches) * models)
                # The models average, and we want the sum.
                self.backward((its + penalty) * models)
            total += its.detach()
        return total


class State(Protocol):
    """Weights and optimizer state. Every call is collective."""

    def save(self, folder: Path) -> None:
        """Write this rank's part into an existing folder."""
        ...

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, whatever the number of workers that did."""
        ...

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The named tensors, whole, float32 and on the CPU, by the unwrapped model's names; filled on rank 0, empty elsewhere."""
        ...


def make_strategy(parallel: Parallel) -> Strategy:
    """The strategy of a spec's `parallel:`."""
    if isinstance(parallel, Ddp | DeepSpeed | Fsdp) and parallel.context_parallel_size > 1:
        from danlu.train.strategies.context import InContext

        return InContext(_make_strategy(parallel), parallel.context_parallel_size)
    return _make_strategy(parallel)


def _make_strategy(parallel: Parallel) -> Strategy:
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
        case Pipeline():
            from danlu.train.strategies.pipeline import PipelineStrategy

            return PipelineStrategy(parallel)
