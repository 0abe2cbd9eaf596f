"""Run: what the loop knows of where it runs. One process (LocalRun), or a rank of a process group (RayRun)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did, for progress lines, curves and metrics."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens of the global batch, padding not counted."""
    tokens_total: int
    tokens_per_second: float
    step_seconds: float
    eta_s: float
    examples: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by what they went into; empty where they were not measured."""
    loss_scale: float | None = None
    """What a float16 loss is multiplied by."""
    skipped: bool = False
    """True if a float16 gradient overflowed, so that the weights are as they were."""
    kind: str = "step"


@dataclass(frozen=True)
class StartRecord:
    """Training begins, or begins again, after `step` steps."""

    step: int
    num_steps: int
    save_steps: int
    world_size: int
    threads_per_worker: int
    device: str
    flops_per_token: float
    peak_flops: float
    """Of one worker."""
    peak_source: str
    kind: str = "start"


@dataclass(frozen=True)
class RanksRecord:
    """Each rank beside the others."""

    step: int
    own_seconds: list[float]
    """A rank's time in a step before it needs another rank, mean of the last steps."""
    memory_bytes: list[int]
    kind: str = "ranks"


@dataclass(frozen=True)
class EvalRecord:
    """Scores of the dev split after `step` steps."""

    step: int
    metrics: dict[str, float]
    seconds: float
    is_best: bool
    kind: str = "eval"


@dataclass(frozen=True)
class EventRecord:
    """Something worth a line: a checkpoint, a restart, an early stop."""

    step: int
    event: str
    detail: str = ""
    seconds: float = 0.0
    bytes: int = 0
    kind: str = "event"


Record = StartRecord | StepRecord | RanksRecord | EvalRecord | EventRecord


def record_to_dict(record: Record) -> dict[str, Any]:
    """JSON-able form of a record."""
    return asdict(record)


def record_from_dict(values: dict[str, Any]) -> Record:
    """The record that `record_to_dict` was given."""
    kinds: dict[str, type[Record]] = {
        "start": StartRecord, "step": StepRecord, "ranks": RanksRecord, "eval": EvalRecord, "event": EventRecord
    }  # fmt: skip
    return kinds[values["kind"]](**values)


class Run(Protocol):
    """A place in a process group, and a way to say what happens."""

    rank: int
    world_size: int
    device: torch.device

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        ...

    def report(self, record: Record) -> None:
        """Tell the driver; only rank 0 is heard."""
        ...


class Models:
    """A run seen as the models in it: the workers of one model have one rank, read the same rows and count once."""

    def __init__(self, run: Run, workers_per_model: int) -> None:
        self.run, self.device = run, run.device
        self.rank, self.world_size = run.rank // workers_per_model, run.world_size // workers_per_model
        self.counts = run.rank % workers_per_model == 0

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all models."""
        return self.run.all_sum(tensor if self.counts else torch.zeros_like(tensor))

    def report(self, record: Record) -> None:
        """Tell the driver; only rank 0 is heard."""
        self.run.report(record)


@dataclass
class LocalRun:
    """One process, no process group; keeps its records."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    listener: Callable[[Record], None] | None = None
    rank: int = 0
    world_size: int = 1
    records: list[Record] = field(default_factory=list)

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def report(self, record: Record) -> None:
        self.records.append(record)
        if self.listener is not None:
            self.listener(record)


@dataclass
class RayRun:
    """A rank of an initialised torch process group; `listener` is heard on rank 0 only."""

    device: torch.device
    listener: Callable[[Record], None]
    rank: int = field(default_factory=lambda: dist.get_rank())
    world_size: int = field(default_factory=lambda: dist.get_world_size())

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        if self.device.type == "cuda" and not tensor.is_cuda:
            total = total.to(self.device)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def report(self, record: Record) -> None:
        if self.rank == 0:
            self.listener(record)
