"""Tensor parallelism: the matrices of each layer split over a group of workers, and data parallelism over the groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle
from transformers import PreTrainedModel

from danlu.errors import ModelError
from danlu.spec.parallel import Tensor
from danlu.train.optim import make_optimizer, set_learning_rate
from danlu.train.strategies import sharded
from danlu.train.strategies.group import ensure_process_group
from danlu.train.strategy import Setup, State

STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
SUMMED = "replicated_with_grad_allreduce"
"""A whole weight that works on split activations (a norm on each head): its gradient is a sum over the group."""

ENCODER_PLAN = {
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
"""transformers has plans for decoders only; this one fits BERT and its kin (RoBERTa, ELECTRA ...)."""

BUCKET_BYTES = 32 << 20


class TensorStrategy:
    """Matrices of attention and MLP are split as the model's own plan says; embeddings, norms and the head stand whole on each worker.

    bf16 is autocast over float32 weights, as with DDP.
    """

    def __init__(self, spec: Tensor) -> None:
        self.spec = spec

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        ensure_process_group(setup)
        self.setup = setup
        hf = model.model
        assert isinstance(hf, PreTrainedModel)
        plan = plan_of(hf, self.spec.tensor_parallel_size)
        size = self.spec.tensor_parallel_size
        mesh = init_device_mesh(setup.device.type, (setup.world_size // size, size), mesh_dim_names=("data", "tensor"))
        self.data, self.tensor = mesh["data"].get_group(), mesh["tensor"].get_group()
        self.num_models = setup.world_size // size
        names = sharded.names_of(setup.param_groups, model)
        backbone = hf.base_model
        styles: dict[str, ParallelStyle] = {name: STYLES[how]() for name, how in plan.items() if how in STYLES}
        expected = _answers(model)
        # Every worker built the same weights, so nothing has to be sent; only one matrix at a time is on the device whole.
        parallelize_module(backbone, mesh["tensor"], styles, src_data_rank=None)
        self.module = model.to(setup.device)
        if not torch.allclose(_answers(model), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise ModelError(f"{type(hf).__name__} gives other answers when it is split", where="parallel.kind", fix="parallel.kind=fsdp")
        groups = [part for group in sharded.groups_of(names, setup.param_groups, model) for part in _by_kind(group)]
        self.trained = [parameter for group in groups for parameter in group["params"]]
        summed = [module for name, how in plan.items() if how == SUMMED for module in _matching(backbone, name)]
        self.summed = [parameter for module in summed for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(groups, setup.optim)
        return model

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        with torch.autocast(self.setup.device.type, torch.bfloat16, enabled=self.setup.bf16):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self, learning_rate: float) -> float:
        _all_reduce([p.grad for p in self.summed if p.grad is not None], self.tensor)
        gradients = [sharded.local(p.grad) for p in self.trained if p.grad is not None]
        if self.num_models > 1:
            _all_reduce(gradients, self.data, scale=1 / self.num_models)
        grad_norm = self._norm()
        sharded.scale(gradients, grad_norm, self.setup.optim.max_grad_norm)
        set_learning_rate(self.optimizer.param_groups, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm

    def state(self) -> State:
        return sharded.ShardedState(self.module, self.optimizer, self.setup)

    def _norm(self) -> float:
        """Of one whole model: split gradients are summed over the group, whole ones counted once."""
        squares = torch.zeros(2, device=self.setup.device)
        for parameter in self.trained:
            if parameter.grad is not None:
                squares[int(_is_split(parameter))] += sharded.local(parameter.grad).float().square().sum()
        split = squares[1].clone()
        dist.all_reduce(split, group=self.tensor)
        return float((squares[0] + split).sqrt())


def plan_of(model: PreTrainedModel, size: int) -> dict[str, str]:
    """How each module of the backbone is split (names may hold `*`); ModelError if the model cannot be split over `size` workers."""
    config = model.config
    name = type(model).__name__
    plan: dict[str, str] = dict(getattr(config, "base_model_tp_plan", None) or {})
    if not plan and all(_matching(model.base_model, module) for module in ENCODER_PLAN):
        plan = ENCODER_PLAN
    if not plan:
        raise ModelError(
            f"{name} has no tensor-parallel plan in transformers, and its layers are not BERT's",
            where="parallel.kind",
            fix="parallel.kind=fsdp, which shards any model",
        )
    unknown = {module: how for module, how in plan.items() if how not in STYLES and how != SUMMED}
    if unknown:
        module, how = next(iter(unknown.items()))
        raise ModelError(f"{name} splits {module} as {how}, which is not trained here", where="parallel.kind", fix="parallel.kind=fsdp")
    heads = {key: getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
    for key, number in heads.items():
        if isinstance(number, int) and number % size:
            raise ModelError(
                f"{name} has {key}={number}, which is not a multiple of tensor_parallel_size={size}",
                where="parallel.tensor_parallel_size",
                fix="a tensor_parallel_size that divides all of: " + ", ".join(f"{k}={v}" for k, v in heads.items() if v),
            )
    return plan


@torch.no_grad()
def _answers(model: nn.Module) -> torch.Tensor:
    """What the model makes of three short rows: a plan that does not fit it shows here, not as a worse model."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    lengths = [5, 2, 9]
    ids = torch.arange(3, 3 + sum(lengths), device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    answers: torch.Tensor = model(ids, positions, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
    model.train(was_training)
    return answers.float().cpu()


def _matching(backbone: nn.Module, pattern: str) -> list[nn.Module]:
    parts = pattern.split(".")
    found = []
    for name, module in backbone.named_modules():
        its = name.split(".")
        if len(its) == len(parts) and all(part in ("*", own) for part, own in zip(parts, its, strict=True)):
            found.append(module)
    return found


def _is_split(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor) and parameter.placements[0].is_shard()


def _by_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The fused step takes DTensors or plain tensors, not both in one group."""
    kinds = [[p for p in group["params"] if isinstance(p, DTensor) is distributed] for distributed in (True, False)]
    return [group | {"params": parameters} for parameters in kinds if parameters]


def _all_reduce(tensors: list[torch.Tensor], group: Any, *, scale: float = 1.0) -> None:
    """Sum over `group`, times `scale`, in buckets: one message for many small gradients."""
    bucket: list[torch.Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if index + 1 == len(tensors) or sum(t.numel() * t.element_size() for t in bucket) >= BUCKET_BYTES:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat, group=group)
            flat.mul_(scale)
            for its, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                its.copy_(part.view_as(its))
            bucket = []
