"""A step's matrix products: weights laid out once as this CPU reads them, and what LoRA adapters add."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from danlu.compress.weight_only import WeightOnlyLinear, multiply
from danlu.serve.engines.torch.kernels import Empty, Kernels, LinearStruct
from danlu.serve.engines.torch.lora import LoraSite


@dataclass(frozen=True)
class Part:
    """Outputs [start, stop) of a product are those of the model's linear layer `name`."""

    name: str
    start: int
    stop: int


class Linear:
    """One product: a linear layer, or several that read the same input, side by side. All with weights of floating point, or all with
    integers of one kind."""

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Linear | WeightOnlyLinear]],
        kernels: Kernels | None = None,
        *,
        dtype: torch.dtype | None = None,
        empty: Empty = torch.empty,
    ) -> None:
        """`dtype`: of activations, where the weights are integers. `empty`: whose memory the kernels' weights lie in."""
        modules = [layer for _, layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in modules])
        self.bias = _joined_bias(modules, weight.dtype if dtype is None else dtype)
        self.parts: list[Part] = []
        for name, layer in layers:
            start = self.parts[-1].stop if self.parts else 0
            self.parts.append(Part(name, start, start + layer.out_features))
        self.shape = (self.parts[-1].stop, modules[0].in_features)
        self.kernels = kernels
        self.packed = False
        self.scale: torch.Tensor | None = None
        self.bits, self.group = 0, 0
        self.weight = weight
        if isinstance(modules[0], WeightOnlyLinear):
            assert dtype is not None
            self._hold_integers([layer for layer in modules if isinstance(layer, WeightOnlyLinear)], dtype, empty)
        elif kernels is not None:
            self.weight = kernels.pack(weight, empty)
        elif weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and packing_works():
            self.packed = True
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.lora: LoraSite | None = None

    def _hold_integers(self, layers: Sequence[WeightOnlyLinear], dtype: torch.dtype, empty: Empty) -> None:
        self.bits, self.group = layers[0].bits, layers[0].group_size
        assert all((layer.bits, layer.group_size) == (self.bits, self.group) for layer in layers)
        self.scale = torch.cat([layer.scale for layer in layers])
        if self.kernels is not None:
            values = torch.cat([layer.values() for layer in layers])
            self.weight, self.scale = self.kernels.pack_integers(values, self.scale, self.bits, dtype, empty)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in]; returns [tokens, out]."""
        assert self.kernels is None, "laid out for the compiled kernels, which make whole steps"
        y: torch.Tensor
        if self.packed:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        elif self.scale is not None:
            y = multiply(x, self.weight, self.scale, self.bias)
        else:
            y = nn.functional.linear(x, self.weight, self.bias)
        if self.lora is not None:
            self.lora.add(x, y)
        return y

    def struct(self) -> LinearStruct:
        """For the kernels; without adapters."""
        assert self.kernels is not None
        bias, scales = (None if tensor is None else tensor.data_ptr() for tensor in (self.bias, self.scale))
        return LinearStruct(
            weight=self.weight.data_ptr(),
            scales=scales,
            bits=self.bits,
            group=self.group,
            bias=bias,
            outs=self.shape[0],
            ins=self.shape[1],
        )


def _joined_bias(layers: Sequence[nn.Linear | WeightOnlyLinear], dtype: torch.dtype) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    zeros = [torch.zeros(layer.out_features, device=layer.weight.device) for layer in layers]
    return torch.cat([zero if layer.bias is None else layer.bias.detach() for zero, layer in zip(zeros, layers, strict=True)]).to(dtype)


class LinearModule(nn.Module):
    """A Linear in the place of a model's nn.Linear."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]; returns [..., out]."""
        return self.linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.linear.shape[0])


def exchange_linears(model: PreTrainedModel, head: nn.Module) -> list[Linear]:
    """Put a Linear in the place of each nn.Linear and WeightOnlyLinear, in place; others that are quantized stay. Without the head's,
    which sees fewer tokens than the others."""
    found = []
    own = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    # Exactly nn.Linear: a subclass computes something else, as one with a hook does; what is inside a PEFT layer, that layer reads.
    plain = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, WeightOnlyLinear) and not module._forward_hooks and not name.startswith(tuple(own))
    ]
    for name, module in plain:
        linear = Linear([(name, module)], dtype=model.dtype)
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
