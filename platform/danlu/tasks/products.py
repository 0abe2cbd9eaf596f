"""The matrix products of a layer's step in bf16: on a CPU with AMX by the compiled kernels, else by PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK = 32
"""What a matrix has to be a multiple of on both sides."""


@dataclass(frozen=True)
class Products:
    """Of weights W [outs, ins] that are laid out once for a pass, `tiles` being the library (products.cpp) or None."""

    tiles: ctypes.CDLL | None

    def lay_out(self, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 weights below each other, in bf16: as `product` takes them, and as `of_input` does."""
        if self.tiles is None:
            whole = torch.cat([weight.detach() for weight in weights]).bfloat16()
            return whole, whole
        outs, ins = sum(len(weight) for weight in weights), weights[0].shape[1]
        forward, backward = (torch.empty(outs, ins, dtype=torch.bfloat16) for _ in range(2))
        first = 0
        for weight in weights:
            self.tiles.danlu_lay_out(weight.data_ptr(), *weight.shape, first, outs, forward.data_ptr(), backward.data_ptr())
            first += len(weight)
        return forward, backward

    def product(self, x: torch.Tensor, laid_out: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """x @ W.T + bias, bf16 [tokens, outs]. x: bf16 [tokens, ins], contiguous; bias: float32."""
        if self.tiles is None:
            return torch.addmm(bias.bfloat16(), x, laid_out.t())
        out = x.new_empty(len(x), len(laid_out))
        self.tiles.danlu_product(x.data_ptr(), *x.shape, laid_out.data_ptr(), out.shape[1], bias.data_ptr(), out.data_ptr())
        return out

    def of_input(self, gradient: torch.Tensor, laid_out: torch.Tensor) -> torch.Tensor:
        """gradient @ W, bf16 [tokens, ins]. gradient: bf16 [tokens, outs], contiguous."""
        if self.tiles is None:
            return torch.mm(gradient, laid_out)
        out = gradient.new_empty(len(gradient), laid_out.shape[1])
        self.tiles.danlu_product(gradient.data_ptr(), *gradient.shape, laid_out.data_ptr(), out.shape[1], None, out.data_ptr())
        return out

    def of_weight(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """gradient.T @ x, float32 [outs, ins]. Both bf16 [tokens, ...], contiguous."""
        if self.tiles is None:
            return torch.mm(gradient.t(), x).float()
        out = torch.empty(gradient.shape[1], x.shape[1])
        self.tiles.danlu_weight_gradient(gradient.data_ptr(), gradient.shape[1], x.data_ptr(), x.shape[1], len(x), out.data_ptr())
        return out
