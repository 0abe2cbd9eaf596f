"""Context parallelism on top of a strategy that averages gradients over all workers: some of them share each pass's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from danlu.data.pack import Packed
from danlu.errors import ModelError
from danlu.tasks.context import ATTENTION, Context
from danlu.tasks.packed import check_packed
from danlu.tasks.packed_decoder import PackedDecoder
from danlu.train.strategies.group import ensure_process_group
from danlu.train.strategy import Loss, Setup, Strategy


class InContext:
    """Another strategy, whose model computes its packed rows in groups of `size` workers."""

    def __init__(self, strategy: Strategy, size: int) -> None:
        self.strategy, self.size = strategy, size
        self.step, self.state = strategy.step, strategy.state

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        ensure_process_group(setup)
        mesh = init_device_mesh(setup.device.type, (setup.num_models, self.size), mesh_dim_names=("data", "context"))["context"]
        self.context = Context(mesh.get_group(), mesh.get_local_rank(), self.size, setup.exchange.waiting)
        share(model, self.context)
        return self.strategy.prepare(model, setup)

    def accumulate(self, micro_batches: Sequence[Packed], loss: Loss) -> torch.Tensor:
        # A model's workers draw alike; these hold different tokens.
        torch.manual_seed(torch.initial_seed() + self.context.rank)
        return self.strategy.accumulate(micro_batches, loss)


def share(model: nn.Module, context: Context) -> None:
    """Let a packed decoder's passes be shared out over `context`. ModelError if its rows or heads cannot be."""
    assert isinstance(model, PackedDecoder), "the spec lets no other task through"
    config, name = model.model.config, type(model.model).__name__
    check_packed(model, "context parallelism", where="parallel.context_parallel_size", fix="leave it out")
    heads = {key: number for key in ("num_attention_heads", "num_key_value_heads") if (number := getattr(config, key, None))}
    for key, number in heads.items():
        # Fewer key heads than workers are repeated.
        if number % context.size and not (key == "num_key_value_heads" and context.size % number == 0):
            raise ModelError(
                f"{name} has {key}={number}, which cannot be shared out over context_parallel_size={context.size}",
                where="parallel.context_parallel_size",
                fix="a size that divides all of: " + ", ".join(f"{key}={number}" for key, number in heads.items()),
            )
    model.model.set_attn_implementation(ATTENTION)
    model.context = context
