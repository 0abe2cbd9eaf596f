"""Tensor parallelism: the matrices of each layer split over a group of workers, and data parallelism over the groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from danlu.errors import ModelError
from danlu.spec.parallel import Tensor
from danlu.train.strategies import sharded
from danlu.train.strategies.grid import Grid, GridState, GridStep
from danlu.train.strategy import OneByOne, Setup, State

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


class TensorStrategy(OneByOne):
    """Matrices of attention and MLP are split as the model's own plan says, and LoRA's beside them; embeddings, norms and the head stand
    whole on each worker.

    bf16 and fp16 are autocast over float32 weights, as with DDP.
    """

    def __init__(self, spec: Tensor) -> None:
        self.spec = spec

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        self.setup = setup
        grid = Grid(setup, tensor=self.spec.tensor_parallel_size)
        names = sharded.names_of(setup.param_groups, model)
        expected = answers(model)
        # Every worker built the same weights, so nothing has to be sent; only one matrix at a time is on the device whole.
        summed = split(model, grid)
        self.model = model.to(setup.device)
        check_answers(answers(model), expected, model, "split")
        groups = sharded.groups_of(names, setup.param_groups, model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.grid_step = GridStep(grid, trained, groups, zero_stage=self.spec.zero_stage, summed=summed)
        return model

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        with self.setup.autocast():
            yield

    def step(self, learning_rate: float) -> float:
        return self.grid_step.step(learning_rate)

    def state(self) -> State:
        return GridState(self.grid_step, self.model)


def split(model: nn.Module, grid: Grid) -> list[nn.Parameter]:
    """Split the matrices of a task's model over the tensor ranks, in place; whole weights whose gradients are sums over them."""
    hf = _pretrained(model)
    summed: list[nn.Parameter] = []
    for pattern, how in plan_of(hf, grid.num_tensor).items():
        for module in _matching(hf.base_model, pattern):
            if how in STYLES:
                for part, style in _parts(module, how).items():
                    parallelize_module(part, grid.mesh["tensor"], STYLES[style](), src_data_rank=None)
            elif how == SUMMED:
                summed += [parameter for parameter in module.parameters() if parameter.requires_grad]
    return summed


def _parts(module: nn.Module, how: str) -> dict[nn.Module, str]:
    """The matrices of a module to split, and how. Of a LoRA layer the base, and that one of A and B which touches the split side: the
    other works on whole activations, and stands whole on each worker."""
    base = getattr(module, "base_layer", None)
    if base is None:
        return {module: how}
    pairs = getattr(module, "lora_B" if how == "colwise" else "lora_A")
    return {base: how, **dict.fromkeys(pairs.values(), how)}


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model of a task's model, without PEFT's around it."""
    hf: Any = model.model
    hf = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    assert isinstance(hf, PreTrainedModel)
    return hf


def check_answers(found: torch.Tensor, expected: torch.Tensor, model: nn.Module, done: str) -> None:
    """ModelError if a model answers otherwise now that something was `done` to it."""
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        name = type(_pretrained(model)).__name__
        raise ModelError(f"{name} gives other answers when it is {done}", where="parallel.kind", fix="parallel.kind=fsdp")


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
def answers(model: nn.Module) -> torch.Tensor:
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
