"""What strategies that take a model apart share: workers as a grid of data, pipeline and tensor ranks; the step; checkpoints by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from danlu.train.optim import make_optimizer, set_learning_rate
from danlu.train.strategies import sharded
from danlu.train.strategies.group import ensure_process_group
from danlu.train.strategy import Setup

BUCKET_BYTES = 32 << 20


class Grid:
    """Where this worker stands: `data` x `pipe` x `tensor`, the workers of one model next to each other."""

    def __init__(self, setup: Setup, *, pipe: int = 1, tensor: int = 1) -> None:
        ensure_process_group(setup)
        self.setup = setup
        sizes = (setup.world_size // (pipe * tensor), pipe, tensor)
        self.mesh = init_device_mesh(setup.device.type, sizes, mesh_dim_names=("data", "pipe", "tensor"))
        self.num_data, self.num_pipe, self.num_tensor = sizes
        self.data, self.pipe, self.tensor = (self.mesh[name].get_group() for name in ("data", "pipe", "tensor"))
        self.data_rank, self.pipe_rank, self.tensor_rank = (self.mesh[name].get_local_rank() for name in ("data", "pipe", "tensor"))


class GridStep:
    """The optimizer step over this worker's part of a model: `names` are its trained parameters, by their names in the whole model.

    `summed` are whole weights that work on split activations: their gradients are sums over the tensor ranks. `tied` are held by the
    first and the last stage, the ranks of whose group it names; both make the same step from the summed gradient.
    """

    def __init__(
        self,
        grid: Grid,
        names: Mapping[str, nn.Parameter],
        groups: Sequence[dict[str, Any]],
        *,
        zero_stage: int = 0,
        summed: Sequence[nn.Parameter] = (),
        tied: Mapping[str, Any] | None = None,
        counted_here: Collection[str] | None = None,
    ) -> None:
        self.grid, self.setup, self.names, self.summed = grid, grid.setup, names, summed
        self.tied = tied or {}
        self.counted = set(names if counted_here is None else counted_here)
        self.owners = _shared_out(list(names.values()), grid.num_data) if zero_stage else {}
        self.mine = {name: p for name, p in names.items() if self.owners.get(p, grid.data_rank) == grid.data_rank}
        held = set(self.mine.values())
        parts = [part for group in groups for part in _by_kind(group | {"params": [p for p in group["params"] if p in held]})]
        self.optimizer = make_optimizer(parts, self.setup.optim) if parts else None

    def step(self, learning_rate: float) -> float:
        """Exchange gradients, clip, update."""
        setup = self.setup
        with setup.exchange.waiting():
            gradients = self._exchange()
        if setup.loss_scale is not None and gradients:
            setup.loss_scale.unscale(gradients)
        grad_norm = self._norm()
        sharded.scale(gradients, grad_norm, setup.optim.max_grad_norm)
        if setup.takes_step(grad_norm) and self.optimizer is not None:
            set_learning_rate(self.optimizer.param_groups, learning_rate)
            self.optimizer.step()
        if self.owners:
            with setup.exchange.waiting():
                self._fetch()
        for parameter in self.names.values():
            parameter.grad = None
        return grad_norm

    def _exchange(self) -> list[torch.Tensor]:
        """This worker's gradients, summed and averaged over those who hold the same weights."""
        grid = self.grid
        if grid.num_tensor > 1:
            all_reduce([p.grad for p in self.summed if p.grad is not None], grid.tensor)
        for name, group in self.tied.items():
            gradient = self.names[name].grad
            assert gradient is not None, f"{name} is used by both stages"
            dist.all_reduce(sharded.local(gradient), group=group)
        gradients = [sharded.local(p.grad) for p in self.names.values() if p.grad is not None]
        if grid.num_data > 1:
            all_reduce(gradients, grid.data, scale=1 / grid.num_data)
        return gradients

    def _norm(self) -> float:
        """Of one whole model: each number of it counts once, wherever it is held."""
        square = torch.zeros((), device=self.setup.device)
        for name, parameter in self.names.items():
            if parameter.grad is not None and name in self.counted and (is_split(parameter) or self.grid.tensor_rank == 0):
                square += sharded.local(parameter.grad).float().square().sum()
        for size, group in ((self.grid.num_tensor, self.grid.tensor), (self.grid.num_pipe, self.grid.pipe)):
            if size > 1:
                with self.setup.exchange.waiting():
                    dist.all_reduce(square, group=group)
        return float(square.sqrt())

    @torch.no_grad()
    def _fetch(self) -> None:
        """ZeRO-1: everybody gets what the others have updated."""
        for owner in range(self.grid.num_data):
            its = [sharded.local(p) for p in self.names.values() if self.owners[p] == owner]
            source = dist.get_global_rank(self.grid.data, owner)
            for bucket in buckets(its):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                dist.broadcast(flat, source, group=self.grid.data)
                if owner != self.grid.data_rank:
                    _put_back(flat, bucket)

    def save(self, folder: Path) -> None:
        """Write this worker's part. Collective; OSError on every rank if one of them could not write."""
        sharded.write(self._contents(), folder)

    def load(self, folder: Path) -> None:
        """Read the weights this worker holds and the state of those it updates, whoever wrote them. Collective."""
        if self.optimizer is not None:
            _make_state(self.optimizer)
            written = sharded.names_in(folder)
            for name, parameter in self.mine.items():
                if not any(key.startswith(f"optimizer.{name}.") for key in written):
                    self.optimizer.state.pop(parameter, None)  # it never had a gradient
        sharded.read(self._contents(), folder)

    def _contents(self) -> dict[str, Any]:
        state = {} if self.optimizer is None else self.optimizer.state
        return {
            "weights": {name: parameter.detach() for name, parameter in self.names.items()},
            "optimizer": {name: dict(state[parameter]) for name, parameter in self.mine.items() if parameter in state},
        }


def is_split(parameter: torch.Tensor) -> bool:
    """True if a worker holds only a part of it."""
    return isinstance(parameter, DTensor) and any(placement.is_shard() for placement in parameter.placements)


def _shared_out(parameters: Sequence[nn.Parameter], workers: int) -> dict[nn.Parameter, int]:
    """Who updates each parameter: the largest first, each to the one with the least so far (as ZeroRedundancyOptimizer does)."""
    held, owners = [0] * workers, {}
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        owners[parameter] = held.index(min(held))
        held[owners[parameter]] += parameter.numel()
    return owners


def _by_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The fused step takes DTensors or plain tensors, not both in one group."""
    kinds = [[p for p in group["params"] if isinstance(p, DTensor) is distributed] for distributed in (True, False)]
    return [group | {"params": parameters} for parameters in kinds if parameters]


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, which it does in its first step: one that moves nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def all_reduce(tensors: Sequence[torch.Tensor], group: Any, *, scale: float = 1.0) -> None:
    """Sum over `group`, times `scale`, in buckets: one message for many small gradients."""
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        if scale != 1.0:
            flat.mul_(scale)
        _put_back(flat, bucket)


def buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Neighbours of `BUCKET_BYTES` together, or one that is more."""
    found: list[list[torch.Tensor]] = []
    room = 0
    for tensor in tensors:
        if room <= 0:
            found.append([])
            room = BUCKET_BYTES
        found[-1].append(tensor)
        room -= tensor.numel() * tensor.element_size()
    return found


def _put_back(flat: torch.Tensor, bucket: Sequence[torch.Tensor]) -> None:
    for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


class GridState:
    """The step's checkpoint, and whole weights where one worker's part and its shards are all there is."""

    def __init__(self, step: GridStep, module: nn.Module) -> None:
        self.step, self.module = step, module
        self.save, self.load = step.save, step.load

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        return sharded.whole_weights(self.module, names, self.step.setup)
