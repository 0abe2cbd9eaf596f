"""Where a step's time goes, which rank is the slowest, and how fast this hardware could be: what the loop measures of itself."""

from __future__ import annotations

import time
from functools import cache

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from danlu.tasks.device import matmul_per_second
from danlu.train.exchange import Exchange
from danlu.train.run import RanksRecord, Run

SAMPLE_EVERY = 10
"""Steps between two that are measured on a GPU, where measuring waits for it; and between two comparisons of the ranks."""

STATED_PEAK = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12,
}  # fmt: skip
"""Dense bf16 and fp16 FLOP/s of NVIDIA's data sheets, without sparsity. The first name that a device's own contains counts."""

OWN = ("data", "forward")
"""What a rank does before it needs another one."""


class Phases:
    """A stopwatch for the parts of a step: `begin`, then `end(name)` after each. On a GPU only sampled steps are measured.

    What a strategy's `exchange` tells of is `communication`, and no part of the phase it fell in. In a pipeline the passes of several
    micro-batches overlap: what is not the last stage's loss counts as `backward`.
    """

    def __init__(self, run: Run, exchange: Exchange | None = None) -> None:
        self.run, self.waits = run, run.device.type == "cuda"
        self.exchange = exchange or Exchange(run.device)
        self.seconds: dict[str, float] = {}
        self.measuring = False
        self.own, self.own_steps = 0.0, 0

    def begin(self, step: int) -> None:
        """A step begins."""
        self.measuring = not self.waits or step % SAMPLE_EVERY == 0
        self.exchange.measuring = self.measuring
        self.exchange.take()  # an evaluation's is no step's
        self.seconds = {}
        self.last = self._now()

    def end(self, name: str) -> None:
        """What was done since the last call is `name`."""
        if self.measuring:
            now, waited = self._now(), self.exchange.take()
            self._add(name, now - self.last - waited)
            if waited:
                self._add("communication", waited)
            self.last = now

    def compare(self, step: int) -> None:
        """After a step: every so many, tell how long each rank took by itself and what memory it holds. Collective."""
        if self.measuring:
            self.own += sum(self.seconds.get(name, 0.0) for name in OWN)
            self.own_steps += 1
        if step % SAMPLE_EVERY:
            return
        table = torch.zeros(2, self.run.world_size, dtype=torch.float64)
        table[0, self.run.rank] = self.own / max(1, self.own_steps)
        table[1, self.run.rank] = memory_bytes(self.run.device)
        own, memory = self.run.all_sum(table).tolist()
        self.run.report(RanksRecord(step, own, [int(held) for held in memory]))
        self.own, self.own_steps = 0.0, 0

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _now(self) -> float:
        if self.waits and self.measuring:
            torch.cuda.synchronize(self.run.device)
        return time.perf_counter()


def memory_bytes(device: torch.device) -> int:
    """The most this process held on its GPU so far, or what it holds now of a CPU's memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def flops_per_token(module: nn.Module) -> float:
    """Operations that training takes for a token: per multiplied weight 2 forward and 2 for the activations' gradients, 2 more if trained.

    The count of https://arxiv.org/abs/2204.02311, appendix B, without attention's own products; recomputed activations do not count.
    """
    everything = trained = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            size = part.in_features * part.out_features  # a 4-bit weight has fewer elements than it multiplies
        elif isinstance(part, Conv1D):
            size = part.weight.numel()
        else:
            continue
        everything += size
        trained += size if part.weight.requires_grad else 0
    return 4.0 * everything + 2.0 * trained


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of one worker's hardware, and `stated` or `measured`. Measuring takes a tenth of a second, once in a process."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, stated in STATED_PEAK.items():
            if known in name:
                return stated, "stated"
    return matmul_per_second(device, dtype=dtype, seconds=0.1), "measured"


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
