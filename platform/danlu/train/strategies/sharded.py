"""What strategies over DTensors share: parameter groups by name, the norm over shards, checkpoints, whole weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor

from danlu.train.strategy import Setup

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Frozen weights are not saved: they are the pretrained ones, which the model was built with."""


def names_of(groups: Sequence[dict[str, Any]], model: nn.Module) -> list[list[str]]:
    """Each group's parameters by name: sharding puts other objects in their place."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def groups_of(names: Sequence[Sequence[str]], groups: Sequence[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """The groups again, with the parameters that have those names now."""
    parameters = dict(model.named_parameters())
    return [group | {"params": [parameters[name] for name in its]} for its, group in zip(names, groups, strict=True)]


def clip_grad_norm(parameters: Sequence[nn.Parameter], limit: float | None, setup: Setup) -> float:
    """Scale the gradients of parameters that are sharded over all ranks to a global norm of at most `limit`; the norm before."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    # By hand: torch's own would reduce on the gradients' device, and offloaded ones are where NCCL is not.
    square = torch.stack([gradient.float().square().sum().to(setup.device) for gradient in gradients]).sum()
    with setup.exchange.waiting():
        dist.all_reduce(square)
    norm = float(square.sqrt())
    scale(gradients, norm, limit)
    return norm


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scale(gradients: Sequence[torch.Tensor], norm: float, limit: float | None) -> None:
    """Multiply like clip_grad_norm_, epsilon included."""
    if gradients and limit is not None and norm > limit:  # a stage of frozen layers has none
        torch._foreach_mul_(list(gradients), limit / (norm + 1e-6))


class ShardedState:
    """Every rank writes its shards through torch's distributed checkpoint; any number of workers, split in any way, can read them."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, setup: Setup) -> None:
        self.module, self.optimizer, self.setup = module, optimizer, setup

    def save(self, folder: Path) -> None:
        save(self.module, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        load(self.module, self.optimizer, folder)

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        return whole_weights(self.module, names, self.setup)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write this rank's shards. Collective; OSError on every rank if one of them could not write."""
    weights, state = get_state_dict(model, optimizer, options=TRAINED)
    write({"weights": weights, "optimizer": state}, folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what `save` wrote, on any number of ranks. Collective."""
    weights, state = get_state_dict(model, optimizer, options=TRAINED)
    read({"weights": weights, "optimizer": state}, folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=TRAINED)


def write(contents: dict[str, Any], folder: Path) -> None:
    """Write this rank's tensors, whole or shards. Collective; OSError on every rank if one of them could not write."""
    try:
        save_shards(contents, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:  # a BaseException, which no caller would catch
        raise OSError(str(next(iter(error.failures.values()))[0])) from error


def read(contents: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of `contents` with what was written under their names. Collective."""
    load_shards(contents, storage_reader=FileSystemReader(folder))


def names_in(folder: Path) -> set[str]:
    """The names of what was written there."""
    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


def whole_weights(model: nn.Module, names: Collection[str], setup: Setup) -> dict[str, torch.Tensor]:
    """The named tensors gathered from their shards, one after the other, float32 and on the CPU; filled on rank 0. Collective."""
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name not in names:
            continue
        value = whole_tensor(tensor.detach(), setup.device)
        if setup.rank == 0:
            whole[name] = value.float().cpu().clone()
    return whole


def whole_tensor(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Gathered on `device` if it is sharded: the backend of an offloaded tensor's own device may not be there. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    moved = DTensor.from_local(
        tensor.to_local().to(device), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
    return moved.full_tensor()
