"""int8 linears for encoders on CPU: int8 weights per output channel, activations with a scale of their own per token."""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from danlu.errors import ModelError

WEIGHT_MAX = 63
"""Seven bits, not eight. Without VNNI, AVX2's vpmaddubsw adds two uint8 x int8 products in int16 and saturates silently:
2 x 255 x 127 does not fit 32,767, 2 x 255 x 63 does. Weights give up the bit because activations have the outliers
(https://oneapi-src.github.io/oneDNN/dev_guide_int8_computations.html); so every CPU gives the same answers."""

ACTIVATION_MAX = 127
ZERO_POINT = 128
"""oneDNN's packed weights are made for uint8 inputs; int8 ones are repacked at every call."""

BLOCK_TOKENS = 512
"""Tokens quantized at a time, so that the float32 copy in between stays in the cache."""

_scratch = threading.local()


class Int8Linear(nn.Module):
    """A linear layer in int8. Buffers: weight int8 [out, in], scale float32 [out], bias float32 [out] or None.

    Each token is quantized by its own largest magnitude and the products are summed exactly, in integers: a row's output is the
    same to the bit whatever stands beside it in the batch. Inference only: rounding has no gradient.
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
        self.quantize = RowQuantizer()
        self._product: _Product | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Symmetric, per output channel, nearest step: what a weight loses is at most half its channel's maximum / 63."""
        quantized = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        weight = linear.weight.detach().float()
        quantized.scale = _positive(weight.abs().amax(dim=1)) / WEIGHT_MAX
        quantized.weight = (weight / quantized.scale[:, None]).round().to(torch.int8)
        if linear.bias is not None:
            quantized.bias = linear.bias.detach().float().clone()
        return quantized

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float [..., in]; returns [..., out] in x's dtype."""
        if self._product is None:
            self._product = _Product(self.weight, self.scale)
        steps, row_scale = self.quantize(x)
        # Two operations where addcmul would be one: fused or not, its rounding may differ between a vector and its tail.
        y = self._product(steps).mul_(row_scale)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    # The packed weight is a copy for this CPU: it follows no move, no load and no pickle.

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        self._product = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._product = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_product": None}


class RowQuantizer:
    """Rows as uint8 steps around 128. `readers` layers given the very same tensor, unchanged (query, key, value), share the work."""

    def __init__(self, readers: int = 1) -> None:
        self.readers = readers
        # (tensor, result, readers still to come) in one name: a thread that comes between two readers costs time, not truth.
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], int] | None = None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: float [..., in]; returns uint8 [tokens, in] and its scales, float32 [tokens, 1]: x = (steps - 128) * scale."""
        last = self._last
        if last is not None and last[0] is x:
            result, to_come = last[1], last[2] - 1
        else:
            result, to_come = quantize_rows(x.reshape(-1, x.shape[-1]).float()), self.readers - 1
        self._last = (x, result, to_come) if to_come else None
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {"readers": self.readers, "_last": None}


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: float32 [tokens, in]; returns uint8 [tokens, in] and float32 [tokens, 1]. A row's result depends on that row alone."""
    scale = torch.maximum(x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True).neg_())
    scale = _positive(scale).div_(ACTIVATION_MAX)
    steps = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scratch = _block(x.shape[1], x.device)
    for start in range(0, len(x), BLOCK_TOKENS):
        block = slice(start, min(start + BLOCK_TOKENS, len(x)))
        steps[block] = torch.div(x[block], scale[block], out=scratch[: block.stop - start]).round_()
    # Flipping the top bit adds 128; PyTorch converts float to int8 four times faster than to uint8.
    return steps.view(torch.uint8).bitwise_xor_(ZERO_POINT), scale


def _block(width: int, device: torch.device) -> torch.Tensor:
    """This thread's float32 [BLOCK_TOKENS, width]. Kept: the page faults of a fresh one cost more than the quantizing."""
    kept: torch.Tensor | None = getattr(_scratch, "kept", None)
    if kept is None or kept.numel() < BLOCK_TOKENS * width or kept.device != device:
        with torch.inference_mode(False):  # else it could not be written to outside inference mode later
            kept = _scratch.kept = torch.empty(BLOCK_TOKENS * width, device=device)
    return kept[: BLOCK_TOKENS * width].view(BLOCK_TOKENS, width)


def _positive(maximum: torch.Tensor) -> torch.Tensor:
    """A row of zeros has no scale of its own; any will do that does not divide by zero."""
    return maximum.clamp_min(1e-30)


class _Product:
    """(steps - 128) @ weight.T * scale, as float32 [tokens, out]: the sums exact, by oneDNN or in floating point."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, *, onednn: bool | None = None) -> None:
        self.onednn = weight.device.type == "cpu" and onednn_is_exact() if onednn is None else onednn
        self.scale = scale
        if self.onednn:
            self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
            self.zero_points = torch.zeros(len(weight), dtype=torch.int64)
        else:
            # Integers up to 2^24 are exact in float32, whatever the order of the sum.
            fits = weight.shape[1] * ACTIVATION_MAX * WEIGHT_MAX <= 2**24
            self.weight = weight.t().to(torch.float32 if fits else torch.float64)

    def __call__(self, steps: torch.Tensor) -> torch.Tensor:
        if not self.onednn:
            sums: torch.Tensor = (steps.to(self.weight.dtype) - ZERO_POINT) @ self.weight
            return sums.float().mul_(self.scale)
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            steps, 1.0, ZERO_POINT, self.weight, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y


@functools.cache
def onednn_is_exact() -> bool:
    """Try oneDNN's int8 matmul on the largest values there can be, once a process: builds and CPUs differ in what they have and do."""
    generator = torch.Generator().manual_seed(0)
    for tokens, in_features, out_features in ((1, 384, 48), (37, 1536, 64), (64, 100, 37)):
        weight = torch.randint(-WEIGHT_MAX, WEIGHT_MAX + 1, (out_features, in_features), generator=generator).to(torch.int8)
        steps = torch.randint(1, 256, (tokens, in_features), generator=generator).to(torch.uint8)
        weight[0], weight[1], steps[0] = WEIGHT_MAX, -WEIGHT_MAX, 255
        expected = (steps.double() - ZERO_POINT) @ weight.double().t()
        try:
            product = _Product(weight, torch.ones(out_features), onednn=True)(steps)
        except (AttributeError, RuntimeError):
            return False
        if not torch.equal(product.double(), expected):
            return False
    return True


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
    _swap(model, chosen)
    return model.requires_grad_(False)


def load_int8(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
    """Load a quantized model's state dict into a float one of the same shape, in place: linears whose weights are int8 are swapped."""
    chosen = {
        name: Int8Linear(module.in_features, module.out_features, bias=f"{name}.bias" in state_dict)
        for name, module in _linears(model).items()
        if (weight := state_dict.get(f"{name}.weight")) is not None and weight.dtype == torch.int8
    }
    _swap(model, chosen)
    model.load_state_dict(state_dict)
    return model.requires_grad_(False)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    # Exactly nn.Linear: a subclass (a LoRA layer, an out-projection that PyTorch reads by attribute) computes something else.
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def _swap(model: nn.Module, chosen: Mapping[str, Int8Linear]) -> None:
    """Put the int8 linears in place; siblings of one input width (query, key, value) quantize their common input once."""
    siblings: dict[tuple[str, int], list[Int8Linear]] = {}
    for name, linear in chosen.items():
        model.set_submodule(name, linear)
        siblings.setdefault((name.rpartition(".")[0], linear.in_features), []).append(linear)
    for group in siblings.values():
        quantizer = RowQuantizer(readers=len(group))
        for linear in group:
            linear.quantize = quantizer
