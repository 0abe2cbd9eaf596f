"""A step's matrix products: weights laid out once as this CPU reads them, and what LoRA adapters add."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from danlu.serve.engines.torch.kernels import Kernels, LinearStruct
from danlu.serve.engines.torch.lora import LoraSite


@dataclass(frozen=True)
class Part:
    """Outputs [start, stop) of a product are those of the model's linear layer `name`."""

    name: str
    start: int
    stop: int


class Linear:
    """One product: a linear layer, or several that read the same input, side by side."""

    def __init__(self, layers: Sequence[tuple[str, nn.Linear]], kernels: Kernels | None = None) -> None:
        weight = torch.cat([layer.weight.detach() for _, layer in layers])
        biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach() for _, layer in layers]
        self.bias = None if all(layer.bias is None for _, layer in layers) else torch.cat(biases)
        self.parts: list[Part] = []
        for name, layer in layers:
            start = self.parts[-1].stop if self.parts else 0
            self.parts.append(Part(name, start, start + layer.out_features))
        self.shape = tuple(weight.shape)
        self.kernels = kernels
        self.packed = kernels is None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and packing_works()
        if kernels is not None:
            self.weight = kernels.pack(weight)
            self.own = self.struct()
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.packed else weight
        self.lora: LoraSite | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in]; returns [tokens, out]."""
        y: torch.Tensor
        if self.kernels is not None:
            y = self.kernels.linear(self.own, x)
        elif self.packed:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            y = nn.functional.linear(x, self.weight, self.bias)
        if self.lora is not None:
            self.lora.add(x, y)
        return y

    def struct(self) -> LinearStruct:
        """For the kernels; without adapters."""
        assert self.kernels is not None
        bias = None if self.bias is None else self.bias.data_ptr()
        return LinearStruct(weight=self.weight.data_ptr(), bias=bias, outs=self.shape[0], ins=self.shape[1])


class LinearModule(nn.Module):
    """A Linear in the place of a model's nn.Linear."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]; returns [..., out]."""
        return self.linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.linear.shape[0])


def exchange_linears(model: nn.Module, head: nn.Module) -> list[Linear]:
    """Put a Linear in the place of each nn.Linear, in place; those made for the purpose (quantized ones) stay. Without the head's, which
    sees fewer tokens than the others."""
    found = []
    own = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    # Exactly nn.Linear: a subclass computes something else, as one with a hook does; what is inside a PEFT layer, that layer reads.
    plain = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not module._forward_hooks and not name.startswith(tuple(own))
    ]
    for name, module in plain:
        linear = Linear([(name, module)])
        model.set_submodule(name, LinearModule(linear))
        if module is not head:
            found.append(linear)
    return found


@functools.cache
def packing_works() -> bool:
    """Try oneDNN's packed product once a process, against PyTorch's own: builds and CPUs differ in what they have."""
    generator = torch.Generator().manual_seed(0)
    for tokens, in_features, out_features in ((1, 64, 48), (19, 96, 100)):
        x = torch.randn(tokens, in_features, generator=generator).bfloat16()
        weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
        bias = torch.randn(out_features, generator=generator).bfloat16()
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        except (AttributeError, RuntimeError):
            return False
        if not torch.allclose(y.float(), nn.functional.linear(x, weight, bias).float(), rtol=2e-2, atol=2e-1):
            return False
    return True
