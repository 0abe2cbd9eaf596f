"""DDP: every worker holds the whole model, gradients are averaged in the last pass. Also the strategy of one process."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from danlu.train.compiled_adamw import CompiledAdamW, can_be_compiled, use_row_gradients
from danlu.train.optim import make_optimizer, set_learning_rate
from danlu.train.strategy import OneByOne, Setup, State

FILE = "ddp.pt"


class DdpStrategy(OneByOne):
    """bf16 and fp16 are autocast over float32 weights."""

    computed: float | None = None
    """When a backward had nothing left to compute."""

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        self.setup = setup
        self.module = model.to(setup.device)
        self.trained = [parameter for group in setup.param_groups for parameter in group["params"]]
        # What moves ranks reads the gradients when they are clipped.
        compiled = setup.allocator is None and can_be_compiled(self.trained)
        self.optimizer = make_optimizer(setup.param_groups, setup.optim, compiled=compiled)
        if isinstance(self.optimizer, CompiledAdamW) and setup.world_size == 1:
            use_row_gradients(self.module, self.trained)
        self.model: nn.Module = self.module
        if setup.world_size > 1:
            # No buffer of an encoder changes while it trains, so there is nothing to broadcast before each forward.
            self.model = DistributedDataParallel(self.module, forward_sync_buffers=False, gradient_as_bucket_view=True)
            # Not annotated, as DDP looks at annotations themselves and these are strings.
            self.model.register_comm_hook(None, lambda group, bucket: self._average(group, bucket))
        return self.model

    def _average(self, group: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """What DDP does without a hook, but for the last bit: it divides where DDP multiplies. With the last bucket there is nothing left
        to compute."""
        averaged = allreduce_hook(group, bucket)
        if bucket.is_last():
            self.computed = self.setup.exchange.now()
        return averaged

    def backward(self, loss: torch.Tensor) -> None:
        self.computed = None
        super().backward(loss)
        if self.computed is not None:
            self.setup.exchange.waited_since(self.computed)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        quiet = self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext()
        with quiet, self.setup.autocast():
            yield

    def step(self, learning_rate: float) -> float:
        limit = float("inf") if self.setup.optim.max_grad_norm is None else self.setup.optim.max_grad_norm
        if self.setup.loss_scale is not None:
            self.setup.loss_scale.unscale([parameter.grad for parameter in self.trained if parameter.grad is not None])
        if isinstance(self.optimizer, CompiledAdamW):
            grad_norm = self.optimizer.clip(limit)
        else:
            grad_norm = float(nn.utils.clip_grad_norm_(self.trained, limit))
        if self.setup.takes_step(grad_norm):
            set_learning_rate(self.optimizer.param_groups, learning_rate)
            self.optimizer.step()
            if self.setup.allocator is not None:
                self.setup.allocator.update()
        # Kept, not freed: with gradient_as_bucket_view they are the buckets that DDP communicates.
        self.optimizer.zero_grad(set_to_none=self.setup.world_size == 1)
        return grad_norm

    def state(self) -> State:
        return DdpState(self)


class DdpState:
    """The whole state in one file, written by rank 0."""

    def __init__(self, strategy: DdpStrategy) -> None:
        self.strategy = strategy

    def save(self, folder: Path) -> None:
        if self.strategy.setup.rank == 0:
            trained = {id(parameter) for parameter in self.strategy.trained}
            weights = {name: p.detach() for name, p in self.strategy.module.named_parameters() if id(p) in trained}
            torch.save({"weights": weights, "optimizer": self.strategy.optimizer.state_dict()}, folder / FILE)

    def load(self, folder: Path) -> None:
        state = torch.load(folder / FILE, map_location=self.strategy.setup.device, weights_only=True)
        parameters = dict(self.strategy.module.named_parameters())
        with torch.no_grad():
            for name, weight in state["weights"].items():
                parameters[name].copy_(weight)
        self.strategy.optimizer.load_state_dict(state["optimizer"])

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        if self.strategy.setup.rank != 0:
            return {}
        state = self.strategy.module.state_dict()
        return {name: state[name].detach().float().cpu().clone() for name in names}
