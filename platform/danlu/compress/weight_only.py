"""Linear layers whose weights alone are integers, for language models: a token that is made reads every weight once, and fewer bytes.

Activations stay as they are, so that an answer is that of the same model with its weights rounded: what `dequantize` gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from danlu.errors import ModelError
from danlu.spec.compress import Int4, Int8

FEW_TOKENS = 4
"""Up to so many PyTorch's product with int8 weights is faster than one with weights that are made floating point first."""

CLIPPINGS = (1.0, 0.92, 0.84)
"""Of a group's largest weight: what is beyond loses, and all others gain by finer steps. The least squared error decides; of normally
distributed groups of 32 it is 0.95 of that without, and twice as many to choose from would make it 0.93."""


class WeightOnlyLinear(nn.Module):
    """A linear layer with a weight of 8 or 4 bits. Buffers: weight int8 [out, in], or uint8 [out, in / 2], a first input's four bits below
    the next one's; scale [out, groups]; bias [out] or None.

    A scale is a number that bf16 holds, so that no cast of the model changes it.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bits: int, group_size: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        weight = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.register_buffer("weight", weight if bits == 8 else pack_nibbles(weight))
        self.register_buffer("scale", torch.ones(out_features, in_features // group_size))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantization: Int8 | Int4) -> WeightOnlyLinear:
        """To the nearest step of an output's scale, or of an output's group of inputs."""
        group = linear.in_features if isinstance(quantization, Int8) else quantization.group_size
        bits = 8 if isinstance(quantization, Int8) else 4
        made = cls(linear.in_features, linear.out_features, bits=bits, group_size=group, bias=linear.bias is not None)
        values, made.scale = (_round_int8 if bits == 8 else _round_int4)(linear.weight.detach().float(), group)
        made.weight = values if bits == 8 else pack_nibbles(values)
        made.bias = None if linear.bias is None else linear.bias.detach().clone()
        return made

    def values(self) -> torch.Tensor:
        """The integers: int8 [out, in]."""
        return self.weight if self.bits == 8 else unpack_nibbles(self.weight)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the weight stands for, [out, in]."""
        return dequantize(self.values(), self.scale, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]; returns [..., out] in x's dtype."""
        return multiply(x.reshape(-1, x.shape[-1]), self.weight, self.scale, self.bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group_size={self.group_size}"


def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias for a WeightOnlyLinear's buffers, in plain PyTorch. x: [tokens, in]."""
    if weight.dtype == torch.uint8:
        return nn.functional.linear(x, dequantize(unpack_nibbles(weight), scale, x.dtype), None if bias is None else bias.to(x.dtype))
    # Integers up to 127 are exact in bf16, and so is what is multiplied before the scale.
    if _takes_int8_product(x, weight):
        y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x, weight, scale[:, 0].to(x.dtype))
    else:
        y = nn.functional.linear(x, weight.to(x.dtype)).mul_(scale[:, 0])
    return y if bias is None else y.add_(bias)


def _takes_int8_product(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """It reads whole vectors, and beyond a weight whose rows are none: the process ends."""
    few = len(x) <= FEW_TOKENS and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return few and weight.shape[0] % 32 == 0 and weight.shape[1] % 32 == 0 and int8_product_works()


def dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values: int8 [out, in]; scale: [out, groups]; returns their products, [out, in]."""
    groups = values.view(*scale.shape, -1).to(dtype)
    return groups.mul_(scale[..., None].to(dtype)).view(values.shape)


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """int8 [out, in], -8 to 7 -> uint8 [out, in / 2]."""
    nibbles = values.view(torch.uint8) & 15
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in / 2] -> int8 [out, in]."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1).view(len(packed), -1)
    return ((both ^ 8).view(torch.int8) - 8).contiguous()


def _round_int8(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _held_by_bf16(weight.abs().amax(dim=1, keepdim=True) / 127)
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def _round_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of a group, with its sign, becomes -8 or what is beyond it."""
    groups = weight.view(len(weight), -1, group)
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for clipping in CLIPPINGS:
        scale = _held_by_bf16(largest * (clipping / -8))
        values = (groups / scale).round_().clamp_(-8, 7)
        error = (values * scale).sub_(groups).square_().sum(dim=2, keepdim=True)
        if best is None:
            best = error, values, scale
        else:
            better = error < best[0]
            best = (torch.where(better, error, best[0]), torch.where(better, values, best[1]), torch.where(better, scale, best[2]))
    assert best is not None
    return best[1].to(torch.int8).view(weight.shape), best[2][..., 0]


def _held_by_bf16(scale: torch.Tensor) -> torch.Tensor:
    """Not zero, which a channel of zeros would be divided by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale).bfloat16().float()


@functools.cache
def int8_product_works() -> bool:
    """Try PyTorch's product of bf16 and int8 once a process, against its own in steps: builds and CPUs differ in what they have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 96, generator=generator).bfloat16()
    weight = torch.randint(-127, 128, (64, 96), generator=generator).to(torch.int8)
    scale = torch.rand(64, generator=generator).bfloat16()
    try:
        y = torch.ops.aten._weight_int8pack_mm(x, weight, scale)
    except (AttributeError, RuntimeError):
        return False
    expected = nn.functional.linear(x.float(), weight.float()) * scale.float()
    return torch.allclose(y.float(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def quantize_weights(model: PreTrainedModel, quantization: Int8 | Int4) -> PreTrainedModel:
    """Swap the linears of a language model's layers, and its head, for ones with integer weights, in place, and freeze it.

    The head keeps 8 bits: an error there is an error of every answer. What is tied to it becomes what it stands for; so does, with 4 bits,
    a layer whose inputs are no whole groups. ModelError if there is no linear layer.
    """
    tied, head = _tied_head(model), model.get_output_embeddings()
    chosen = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (module is head or any(part.isdigit() for part in name.split(".")))
    }
    if all(module is head for module in chosen.values()):
        raise ModelError(f"{type(model).__name__} has no linear layer to quantize", where="quantization", fix="leave quantization out")
    for name, module in chosen.items():
        whole = isinstance(quantization, Int4) and module is not head and module.in_features % quantization.group_size == 0
        model.set_submodule(name, WeightOnlyLinear.from_linear(module, quantization if whole else Int8()))
    if tied:
        _tie(model)
    return model.requires_grad_(False)


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A quantized model's tensors; what the head stands for is not kept twice."""
    tied = _tied_name(model)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != tied}


def load_weights(build: Callable[[], PreTrainedModel], state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """The quantized model that `state_of` gave the tensors of; `build` makes one of its configuration, whose weights need no memory."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = build()
    for name, module in list(model.named_modules()):
        scale = state.get(f"{name}.scale")
        if type(module) is nn.Linear and scale is not None:
            bits = 8 if state[f"{name}.weight"].dtype == torch.int8 else 4
            group = module.in_features // scale.shape[1]
            bias = f"{name}.bias" in state
            model.set_submodule(name, WeightOnlyLinear(module.in_features, module.out_features, bits=bits, group_size=group, bias=bias))
    tied = _tied_name(model)
    if wrong := sorted(state.keys() ^ (model.state_dict().keys() - {tied})):
        raise ModelError(f"the weights are not those of a {type(model).__name__}: {', '.join(wrong[:3])}", where="bundle")
    model.load_state_dict(dict(state), strict=False, assign=True)
    if tied is not None:
        _tie(model)
    return model.requires_grad_(False)


def _tied_head(model: PreTrainedModel) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return isinstance(head, nn.Linear) and head.weight is embeddings.weight


def _tied_name(model: PreTrainedModel) -> str | None:
    """Of the embeddings' weight, where the head says what it is."""
    if not (isinstance(model.get_output_embeddings(), WeightOnlyLinear) and model.config.get_text_config().tie_word_embeddings):
        return None
    embeddings: Any = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embeddings)


def _tie(model: PreTrainedModel) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, WeightOnlyLinear)
    embeddings.weight = nn.Parameter(head.dequantize(), requires_grad=False)
