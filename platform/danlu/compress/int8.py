"""int8 linears for encoders on CPU: int8 weights per output channel, activations with a range of their own per token."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from danlu.errors import ModelError

WEIGHT_MAX = 63
"""Seven bits, not eight. Without VNNI, AVX2's vpmaddubsw adds two uint8 x int8 products in int16 and saturates silently:
2 x 255 x 127 does not fit 32,767, 2 x 255 x 63 does. Weights give up the bit because activations have the outliers
(https://oneapi-src.github.io/oneDNN/dev_guide_int8_computations.html); so every CPU gives the same answers."""

STEP_MAX = 255


class Int8Linear(nn.Module):
    """A linear layer in int8. Buffers: weight int8 [out, in], scale float32 [out], bias float32 [out] or None.

    Each token is quantized between its own least and largest value, and the products are summed in integers: a row's output is
    the same to the bit whatever stands beside it in the batch. Inference only: rounding has no gradient.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._packed: _Packed | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Symmetric, per output channel, to the nearest step: a weight loses at most half of its channel's maximum / 63."""
        quantized = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        weight = linear.weight.detach().float()
        quantized.scale = weight.abs().amax(dim=1).clamp_min(1e-30) / WEIGHT_MAX
        quantized.weight = (weight / quantized.scale[:, None]).round().to(torch.int8)
        if linear.bias is not None:
            quantized.bias = linear.bias.detach().float().clone()
        return quantized

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float [..., in]; returns [..., out] in x's dtype."""
        if self._packed is None:
            self._packed = _Packed(self.weight, self.scale)
        steps, scale, low = quantize_rows(x.reshape(-1, self.in_features).float())
        # x = steps * scale + low, so x @ w is steps @ w scaled, plus low times the sums of w.
        y = self._packed.product(steps).mul_(scale).addcmul_(low, self._packed.sums)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    # The packed weight is a copy made for this CPU: it must not outlive a move or a load, nor travel with a pickle.

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        self._packed = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: float32 [tokens, in]; returns steps uint8 [tokens, in], scale and low float32 [tokens, 1]: x = steps * scale + low.

    A row's result depends on that row alone. Made for embedding tables, PyTorch's operation does in one pass what takes eight
    others six times as long.
    """
    if not _has_row_quantizer() or x.device.type != "cpu":
        return _quantize_rows_in_torch(x)
    rows = torch.ops.quantized.embedding_bag_byte_prepack(x)  # uint8 [tokens, in + 8]: the steps, then scale and low as float32
    width = x.shape[1]
    # A copy always: a view as float32 needs an offset that is a multiple of four.
    tail = rows[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return rows[:, :width], tail[:, :1], tail[:, 1:]


def _quantize_rows_in_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = x.amin(dim=1, keepdim=True)
    span = x.amax(dim=1, keepdim=True) - low
    return ((x - low) * (STEP_MAX / (span + 1e-8))).round().to(torch.uint8), span / STEP_MAX, low


class _Packed:
    """A weight as this CPU multiplies it. `sums`: float32 [out], each channel's weights added up."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, *, onednn: bool | None = None) -> None:
        self.onednn = weight.device.type == "cpu" and onednn_is_exact() if onednn is None else onednn
        self.scale = scale
        self.sums = weight.sum(dim=1).float() * scale
        if self.onednn:
            self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
            self.zero_points = torch.zeros(len(weight), dtype=torch.int64)
        else:
            # Integers up to 2^24 are exact in float32, whatever the order they are added in.
            exact = weight.shape[1] * STEP_MAX * WEIGHT_MAX <= 2**24
            self.weight = weight.t().to(torch.float32 if exact else torch.float64)

    def product(self, steps: torch.Tensor) -> torch.Tensor:
        """steps: uint8 [tokens, in]; returns steps @ weight.T * scale, float32 [tokens, out], the sums exact."""
        if not self.onednn:
            product: torch.Tensor = steps.to(self.weight.dtype) @ self.weight
            return product.float().mul_(self.scale)
        # A zero point would be cheaper to write and dearer to run: oneDNN adds the weights up anew at every call.
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            steps, 1.0, 0, self.weight, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y


@functools.cache
def onednn_is_exact() -> bool:
    """Try oneDNN's int8 matmul on the largest values there can be, once a process: builds and CPUs differ in what they have and do."""
    generator = torch.Generator().manual_seed(0)
    for tokens, in_features, out_features in ((1, 384, 48), (37, 1536, 64), (64, 100, 37)):
        weight = torch.randint(-WEIGHT_MAX, WEIGHT_MAX + 1, (out_features, in_features), generator=generator).to(torch.int8)
        steps = torch.randint(0, STEP_MAX + 1, (tokens, in_features), generator=generator).to(torch.uint8)
        weight[0], weight[1], steps[0] = WEIGHT_MAX, -WEIGHT_MAX, STEP_MAX
        expected = (steps.double() @ weight.double().t()).float()
        try:
            product = _Packed(weight, torch.ones(out_features), onednn=True).product(steps)
        except (AttributeError, RuntimeError):
            return False
        if not torch.equal(product, expected):
            return False
    return True


@functools.cache
def _has_row_quantizer() -> bool:
    return hasattr(torch.ops.quantized, "embedding_bag_byte_prepack")


def quantize_int8(model: nn.Module, skip: Collection[str] = ("classifier",)) -> nn.Module:
    """Swap the linears of the model's layers for int8 ones, in place, and freeze it; those named in `skip` (last component) stay.

    Layers are what stands in a numbered list (`encoder.layer.0...`). Pooler and head see one token a row: nothing to gain, accuracy
    to lose. Raises ModelError if there is nothing to swap.
    """
    chosen = {
        name: Int8Linear.from_linear(module)
        for name, module in _linears(model).items()
        if name.rpartition(".")[2] not in skip and any(part.isdigit() for part in name.split("."))
    }
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no linear layer to quantize", where="quantization", fix="leave quantization out")
    for name, linear in chosen.items():
        model.set_submodule(name, linear)
    return model.requires_grad_(False)


def load_int8(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
    """Load a quantized model's state dict into a float one of the same shape, in place: linears whose weights are int8 are swapped."""
    for name, module in _linears(model).items():
        weight = state_dict.get(f"{name}.weight")
        if weight is not None and weight.dtype == torch.int8:
            model.set_submodule(name, Int8Linear(module.in_features, module.out_features, bias=f"{name}.bias" in state_dict))
    model.load_state_dict(state_dict)
    return model.requires_grad_(False)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    # Exactly nn.Linear: a subclass (a LoRA layer, attention's out-projection, read by attribute) computes something else.
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
