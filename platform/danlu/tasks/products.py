"""The matrix products of a layer's step in bf16, with what follows them: on a CPU with AMX by the compiled kernels, else by PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK = 32
"""What a matrix has to be a multiple of on both sides."""


@dataclass(frozen=True)
class Products:
    """Of weights W [outs, ins] that are laid out once for a pass."""

    tiles: ctypes.CDLL | None
    """products.cpp, where it is used."""
    layers: ctypes.CDLL

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

    def product_and_gelu(self, x: torch.Tensor, laid_out: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`product`, and its GELU."""
        if self.tiles is None:
            out = self.product(x, laid_out, bias)
            active = torch.empty_like(out)
            self.layers.danlu_gelu(out.data_ptr(), active.data_ptr(), *out.shape)
            return out, active
        out, active = (x.new_empty(len(x), len(laid_out)) for _ in range(2))
        self.tiles.danlu_product_gelu(
            x.data_ptr(), *x.shape, laid_out.data_ptr(), out.shape[1], bias.data_ptr(), out.data_ptr(), active.data_ptr()
        )
        return out, active

    def of_input(self, gradient: torch.Tensor, laid_out: torch.Tensor) -> torch.Tensor:
        """gradient @ W, bf16 [tokens, ins]. gradient: bf16 [tokens, outs], contiguous."""
        if self.tiles is None:
            return torch.mm(gradient, laid_out)
        out = gradient.new_empty(len(gradient), laid_out.shape[1])
        self.tiles.danlu_product(gradient.data_ptr(), *gradient.shape, laid_out.data_ptr(), out.shape[1], None, out.data_ptr())
        return out

    def added_of_input(self, gradient: torch.Tensor, laid_out: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """to (float32 [tokens, ins], in place) + gradient @ W."""
        if self.tiles is None:
            return to.add_(torch.mm(gradient, laid_out))
        self.tiles.danlu_product_add(gradient.data_ptr(), *gradient.shape, laid_out.data_ptr(), to.shape[1], to.data_ptr())
        return to

    def of_gelus_input(self, gradient: torch.Tensor, laid_out: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of `at`, bf16 [tokens, ins], whose GELU was multiplied; and its sum over tokens, float32."""
        sums = torch.empty(at.shape[1])
        if self.tiles is None:
            out = self.of_input(gradient, laid_out)
            self.layers.danlu_gelu_backward(at.data_ptr(), out.data_ptr(), sums.data_ptr(), *at.shape)
            return out, sums
        out = torch.empty_like(at)
        self.tiles.danlu_product_gelu_backward(
            gradient.data_ptr(), *gradient.shape, laid_out.data_ptr(), at.shape[1], at.data_ptr(), out.data_ptr(), sums.data_ptr()
        )
        return out, sums

    def of_weight(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """gradient.T @ x, float32 [outs, ins]. Both bf16 [tokens, ...], contiguous."""
        if self.tiles is None:
            return torch.mm(gradient.t(), x).float()
        out = torch.empty(gradient.shape[1], x.shape[1])
        self.tiles.danlu_weight_gradient(gradient.data_ptr(), gradient.shape[1], x.data_ptr(), x.shape[1], len(x), out.data_ptr())
        return out
