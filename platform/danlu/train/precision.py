"""What a job computes in, and float16's loss scale."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from danlu.spec.train import TrainJob
from danlu.tasks.device import has_native_bf16
from danlu.train.run import Run
from danlu.train.strategy import State

FILE = "loss-scale.json"

SMALLEST = 1.0
"""A gradient that overflows float16 unscaled is no matter of the scale."""


def compute_dtype(job: TrainJob, run: Run) -> torch.dtype:
    """What matrices are multiplied in. `auto` is bfloat16 only where every rank's hardware multiplies it natively. Collective."""
    match job.precision:
        case "fp32":
            return torch.float32
        case "bf16":
            return torch.bfloat16
        case "fp16":
            return torch.float16
        case "auto":
            native = float(run.all_sum(torch.tensor(float(has_native_bf16(run.device))))) == run.world_size
            return torch.bfloat16 if native else torch.float32


@dataclass
class LossScale:
    """What a float16 loss is multiplied by so that small gradients do not become zero (https://arxiv.org/abs/1710.03740).

    The rule and the numbers of torch.amp.GradScaler. That one judges by the gradients of one optimizer on one rank; here a step is skipped
    by the global gradient norm, which is not finite on every rank as soon as one number on one of them is not.
    """

    scale: float = 65536.0
    growth_interval: int = 2000
    steps_since_change: int = 0
    skipped_steps: int = 0

    def unscale(self, gradients: Sequence[torch.Tensor]) -> None:
        """Divide gradients of the scaled loss, in place."""
        torch._foreach_mul_(list(gradients), 1 / self.scale)

    def takes_step(self, grad_norm: float) -> bool:
        """Whether this step is to be taken; the next one's scale follows from that."""
        if not math.isfinite(grad_norm):
            self.scale, self.steps_since_change = self.scale * 0.5, 0
            self.skipped_steps += 1
            return False
        self.steps_since_change += 1
        if self.steps_since_change == self.growth_interval:
            self.scale, self.steps_since_change = self.scale * 2.0, 0
        return True


class LossScaleState:
    """A strategy's state with the loss scale beside it."""

    def __init__(self, state: State, loss_scale: LossScale, rank: int) -> None:
        self.state, self.loss_scale, self.rank = state, loss_scale, rank

    def save(self, folder: Path) -> None:
        """Write this rank's part; the scale is the same on all ranks, so the first one's."""
        self.state.save(folder)
        if self.rank == 0:
            (folder / FILE).write_text(json.dumps(asdict(self.loss_scale)))

    def load(self, folder: Path) -> None:
        """Read both back; a checkpoint of another precision has no scale, and this one starts with its own."""
        self.state.load(folder)
        if (folder / FILE).exists():
            vars(self.loss_scale).update(json.loads((folder / FILE).read_text()))

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The named tensors."""
        return self.state.weights(names)
