"""FSDP2: parameters, gradients and optimizer state sharded over the workers; each layer is gathered where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from danlu.spec.parallel import Fsdp
from danlu.train.exchange import Exchange
from danlu.train.optim import make_optimizer, set_learning_rate
from danlu.train.strategies import sharded
from danlu.train.strategies.group import ensure_process_group
from danlu.train.strategy import OneByOne, Setup, State


class FsdpStrategy(OneByOne):
    """bf16 and fp16 gather and compute in it over float32 shards; gradients are summed in float32."""

    def __init__(self, spec: Fsdp) -> None:
        self.spec = spec

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        ensure_process_group(setup)
        self.setup = setup
        names = sharded.names_of(setup.param_groups, model)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(setup.device.type, (setup.world_size,)),
            "mp_policy": MixedPrecisionPolicy() if setup.dtype == torch.float32 else MixedPrecisionPolicy(setup.dtype, torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=setup.device.type == "cuda") if self.spec.cpu_offload else OffloadPolicy(),
        }
        for layer in layers_of(model):
            fully_shard(layer, reshard_after_forward=self.spec.reshard_after_forward, **options)
        # What is left (embeddings, head, final norm) is used first and last: freeing it in between would only fetch it twice.
        root = fully_shard(model, reshard_after_forward=False, **options)
        assert isinstance(root, FSDPModule)
        self.root: FSDPModule = root
        if setup.device.type == "cpu":
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    # Their interface has no public name to inherit from.
                    gather: Any = Timed(dist.all_gather_single, setup.exchange)
                    scatter: Any = Timed(dist.reduce_scatter_single, setup.exchange)
                    module.set_custom_all_gather(gather)
                    module.set_custom_reduce_scatter(scatter)
        self.model = model
        groups = sharded.groups_of(names, setup.param_groups, model)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = make_optimizer(groups, setup.optim)
        return model

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.root.set_requires_gradient_sync(last)
        yield

    def step(self, learning_rate: float) -> float:
        if self.setup.loss_scale is not None:
            self.setup.loss_scale.unscale([sharded.local(parameter.grad) for parameter in self.trained if parameter.grad is not None])
        grad_norm = sharded.clip_grad_norm(self.trained, self.setup.optim.max_grad_norm, self.setup)
        if self.setup.takes_step(grad_norm):
            set_learning_rate(self.optimizer.param_groups, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm

    def state(self) -> State:
        return sharded.ShardedState(self.model, self.optimizer, self.setup)


class Timed:
    """FSDP's own way to gather or scatter, which is waiting on a CPU. (On a GPU it goes on beside computing, in a stream of its own.)"""

    def __init__(self, collective: Callable[..., dist.Work | None], exchange: Exchange) -> None:
        self.collective, self.exchange = collective, exchange

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor to send or receive."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **named: Any) -> dist.Work | None:
        with self.exchange.waiting():
            return self.collective(output_tensor, input_tensor, **named)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks a model is stacked of: members of the outermost module lists, in encoders (`encoder.layer`) and decoders (`layers`)."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child)
            else:
                look(child)

    look(model)
    return found
