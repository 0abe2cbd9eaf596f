"""Checkpoints of ZeRO-3 training whose optimizer state or parameters are on NVMe: read from there one weight at a time.

DeepSpeed's own would copy its swap folder and leave out what it never swapped: what is under 1 MiB on a worker stays in memory. These hold
no more in memory than one file's contents, and any number of workers can read them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from danlu.errors import CheckpointError, ResourceError
from danlu.spec.optim import Optim
from danlu.spec.parallel import DeepSpeed
from danlu.train.optim import make_optimizer
from danlu.train.strategies.nvme import NUM_BUFFERS, SWAPPED_FROM, check_lock, check_whole, reserve_file
from danlu.train.strategy import Setup

FILE_BYTES = 64 << 20
"""A file takes weights until it is as large as this."""

REST = "rest.pt"
"""Beside the weights: buffers, the loss scale, and how many workers wrote."""

WEIGHT = "weight"
"""The float32 weight's name among those of its optimizer state."""


def check_room(spec: DeepSpeed, model: nn.Module, setup: Setup, folder: Path) -> None:
    """ResourceError, on every worker, if one of them cannot swap this model: too little room, too little memory it may lock, or nothing
    that is large enough. Collective, and before DeepSpeed writes: what it cannot write it does not notice."""
    half = setup.dtype != torch.float32
    shards = [(-(-weight.numel() // setup.world_size), weight.requires_grad) for weight in model.parameters()]
    states = [4 * numel for numel, trained in shards if trained and 4 * numel >= SWAPPED_FROM] if spec.offload_optimizer == "nvme" else []
    weights = [numel * (2 if half else 4) for numel, _ in shards] if spec.offload_param == "nvme" else []
    weights = [size for size in weights if size >= SWAPPED_FROM]
    if not states + weights:
        largest = 4 * max(numel for numel, _ in shards)
        raise ResourceError(
            f"nvme has no effect: the largest weight is {largest} bytes on a worker, and DeepSpeed swaps what is {SWAPPED_FROM} or more",
            where="parallel.offload_optimizer" if spec.offload_optimizer == "nvme" else "parallel.offload_param",
            fix="leave it out" + (", or fewer workers" if setup.world_size > 1 else ""),
        )
    # The weight itself, its gradient and what the optimizer keeps.
    num_bytes = sum(states) * (2 + len(state_names(setup.optim))) + sum(weights)
    ballast = folder / "ballast"

    def take() -> None:
        check_lock(NUM_BUFFERS * max(states, default=0))
        reserve_file(ballast, num_bytes)

    _on_all(take, setup, f"this model takes {num_bytes / 2**30:.3f} GiB there for each worker")
    ballast.unlink()


def reserve(zero: Any, model: nn.Module, setup: Setup) -> None:
    """Look at what DeepSpeed has written, and take the space of what the optimizer will keep and of the gradients, on every worker, as
    long as training goes on. Collective."""
    swapper = zero.optimizer_swapper  # None where only parameters are swapped

    def take() -> None:
        for path, num_bytes in _parameter_files(model).items():
            check_whole(path, num_bytes)
        for its in () if swapper is None else swapper.swap_params_info.values():
            check_whole(Path(its.get_swap_paths()[0]), 4 * its.numel())
            for name in state_names(setup.optim):
                reserve_file(Path(its.swap_folder) / f"{name}-{its.param_id}.tensor.swp", 4 * its.numel())
            aligned = its.numel() // swapper.numel_alignment * swapper.numel_alignment  # what is left over it does not swap
            reserve_file(Path(its.swap_folder) / f"{its.param_id}_gradient_0_{aligned}.tensor.swp", 4 * aligned)

    _on_all(take, setup, "another process took the drive's space meanwhile")


def _parameter_files(model: nn.Module) -> dict[Path, int]:
    """The files of a worker's shards of parameters, and the bytes in each."""
    files: dict[Path, int] = {}
    for parameter in model.parameters():
        swapper, number = getattr(parameter, "nvme_swapper", None), getattr(parameter, "ds_id", None)
        if swapper is not None and number in swapper.id_to_path:
            files[Path(swapper.id_to_path[number])] = swapper.param_id_to_numel[number] * swapper.swap_element_size
    return files


def _on_all(take: Callable[[], None], setup: Setup, otherwise: str) -> None:
    """ResourceError on every worker if one of them cannot."""
    error: ResourceError | None = None
    try:
        take()
    except ResourceError as caught:
        error = caught
    except OSError as caught:
        fix = "free some space, another drive, more machines, or offload to cpu"
        problem = f"{otherwise}; worker {setup.rank} on {socket.gethostname()}: {caught.strerror}"
        error = ResourceError(problem, where="parallel.nvme_path", fix=fix)
    errors: list[ResourceError | None] = [None] * setup.world_size
    dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise found


def state_names(optim: Optim) -> list[str]:
    """What the optimizer keeps for every element of a weight, by its own names."""
    weight = nn.Parameter(torch.zeros(8))
    weight.grad = torch.zeros(8)
    optimizer = make_optimizer([{"params": [weight]}], optim)
    optimizer.step()
    return [name for name, value in optimizer.state[weight].items() if _is_per_element(value, weight)]


def forget_gradients(zero: Any) -> None:
    """A weight that the next step does not use has no gradient then; DeepSpeed would read this step's again."""
    for its in zero.optimizer_swapper.swap_params_info.values():
        its.swapped_gradients.clear()


class SwappedState:
    """Every rank writes its shards, by the weights' names, without their padding; whole weights are gathered as ZeRO-3's are."""

    def __init__(self, engine: Any, zero: Any, setup: Setup, weights: Callable[[Collection[str]], dict[str, torch.Tensor]]) -> None:
        self.engine, self.zero, self.setup, self.weights = engine, zero, setup, weights

    def save(self, folder: Path) -> None:
        """Not collective: a rank that cannot write lets none wait."""
        file, size, number = {}, 0, 0
        for i, parameter in enumerate(_parameters(self.zero)):
            start, stop = _span(parameter.ds_numel, self.setup.rank, self.setup.world_size)
            with in_memory(self.zero, i) as (weight, state):
                its = {WEIGHT: weight.detach(), **state}
                kept = {key: value[: stop - start].cpu().clone() if _is_per_element(value, weight) else value for key, value in its.items()}
            file[self.zero.param_names[parameter]] = kept
            size += sum(value.nbytes for value in kept.values() if torch.is_tensor(value))
            if size >= FILE_BYTES:
                torch.save(file, folder / _file_name(self.setup.rank, number))
                file, size, number = {}, 0, number + 1
        torch.save(file, folder / _file_name(self.setup.rank, number))
        if self.setup.rank == 0:
            torch.save(self._rest(), folder / REST)

    def load(self, folder: Path) -> None:
        """Collective at its end."""
        if not (folder / REST).exists():
            raise CheckpointError(f"{REST} is missing: it was written by another version", where=str(folder), fix="start anew with --fresh")
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
        saved = Saved(folder, rest["world_size"])
        self.zero.checkpoint_event_prologue()
        for i, parameter in enumerate(_parameters(self.zero)):
            start, stop = _span(parameter.ds_numel, self.setup.rank, self.setup.world_size)
            values = saved.read(self.zero.param_names[parameter], parameter.ds_numel, start, stop)
            with in_memory(self.zero, i, write=True) as (weight, state):
                _fill(weight.detach(), values.pop(WEIGHT))
                for key, value in values.items():
                    if torch.is_tensor(value) and value.ndim:
                        _fill(state.setdefault(key, torch.zeros_like(weight, requires_grad=False)), value)
                    else:
                        state[key] = value
                self.zero._reassign_or_swap_out_partitioned_parameters(i)
        self._load_rest(rest)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].partition(self.zero.persistent_parameters)
        self.zero.checkpoint_event_epilogue()

    def _rest(self) -> dict[str, Any]:
        return {
            "world_size": self.setup.world_size,
            "buffers": {name: buffer.cpu() for name, buffer in self.engine.module.named_buffers()},
            "loss_scaler": vars(self.zero.loss_scaler),
            "skipped_steps": self.engine.skipped_steps,
        }

    def _load_rest(self, rest: dict[str, Any]) -> None:
        for name, buffer in self.engine.module.named_buffers():
            buffer.copy_(rest["buffers"][name])
        vars(self.zero.loss_scaler).update(rest["loss_scaler"])
        self.engine.skipped_steps = rest["skipped_steps"]


@contextmanager
def in_memory(zero: Any, i: int, *, write: bool = False) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
    """The `i`-th weight's shard, float32 and flat, and its optimizer state, read from NVMe while the block runs where they are there."""
    swapped = zero._swappable_optimizer_subgroup(i)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(i)
    try:
        weight = zero.fp32_partitioned_groups_flat[i]
        yield weight, zero.optimizer.state[weight]
    finally:
        if swapped and write:
            zero._optimizer_states_and_gradient_swap_out(i)
        elif swapped:
            zero._release_swap_buffers(i)


class Saved:
    """The files of a checkpoint, of which only what is read gets into memory."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder, self.world_size = folder, world_size
        self.written: dict[int, dict[str, dict[str, Any]]] = {}

    def read(self, name: str, num_elements: int, start: int, stop: int) -> dict[str, Any]:
        """A weight's elements `start` to `stop` and what belongs to them, put together from the shards of those who wrote them."""
        parts = []
        for rank in range(self.world_size):
            first, last = _span(num_elements, rank, self.world_size)
            if (start < last and first < stop) or rank == 0:
                its = self._of(rank)[name]
                cut = slice(max(start - first, 0), max(stop - first, 0))
                parts.append({key: value[cut] if torch.is_tensor(value) and value.ndim else value for key, value in its.items()})
        return {
            key: torch.cat([part[key] for part in parts]) if torch.is_tensor(value) and value.ndim else value
            for key, value in parts[0].items()
        }

    def _of(self, rank: int) -> dict[str, dict[str, Any]]:
        if rank not in self.written:
            paths = sorted(self.folder.glob(_file_name(rank, "*")))
            if not paths:
                raise CheckpointError(f"{_file_name(rank, 0)} is missing", where=str(self.folder), fix="start anew with --fresh")
            files = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
            self.written[rank] = {name: its for file in files for name, its in file.items()}
        return self.written[rank]


def _parameters(zero: Any) -> list[Any]:
    assert all(len(group) == 1 for group in zero.fp16_groups), "sub_group_size=1 puts each weight into a group of its own"
    return [group[0] for group in zero.fp16_groups]


def _span(num_elements: int, rank: int, world_size: int) -> tuple[int, int]:
    """Which elements of a weight ZeRO-3 gives to a rank."""
    each = -(-num_elements // world_size)
    return min(rank * each, num_elements), min((rank + 1) * each, num_elements)


def _is_per_element(value: Any, weight: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == weight.shape


def _fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """The padding behind the values is nobody's: zero, so that nothing there grows."""
    target[: len(values)].copy_(values)
    target[len(values) :].zero_()


def _file_name(rank: int, number: int | str) -> str:
    return f"shard-{rank:05d}-{number:05d}.pt" if isinstance(number, int) else f"shard-{rank:05d}-{number}.pt"
