"""The same layers of a Hugging Face decoder with a backward written by hand: autograd's own makes several passes for each of theirs.

Weights, names and answers stay; what a layer cannot be shown to equal is left as it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel


@torch.no_grad()
def use_custom_autograd(model: PreTrainedModel) -> None:
    """Put the hand-written backward behind the model's norms and rotary embeddings, in place."""
    for module in model.modules():
        cls = type(module)
        if cls.__name__.endswith("RMSNorm") and not isinstance(module, CustomRMSNorm) and _is_root_mean_square(module):
            # The class, not the bound method: copies of the module are whole.
            module.__class__ = type(cls.__name__, (CustomRMSNorm, cls), {"__module__": cls.__module__})
    modeling = sys.modules[type(model).__module__]
    rotate = getattr(modeling, "rotate_half", None)
    if rotate is not None and rotate is not rotate_half:
        probe = torch.arange(16.0).view(1, 2, 1, 8)
        if torch.equal(rotate(probe), rotate_half(probe)):
            modeling.rotate_half = rotate_half  # type: ignore[attr-defined]


class CustomRMSNorm(nn.Module):
    """A root mean square norm."""

    weight: nn.Parameter

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return root_mean_square_norm(hidden_states, self.weight, _epsilon(self))


def _epsilon(module: nn.Module) -> float:
    found: float = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps  # type: ignore[assignment]
    return found


def _is_root_mean_square(module: nn.Module) -> bool:
    """True if that is what it computes, which its name does not say: Gemma adds one to its weights."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.device.type == "meta" or weight.ndim != 1:
        return False
    if list(module._parameters) != ["weight"] or not (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        return False
    probe = torch.linspace(-2, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
    return torch.allclose(module(probe), root_mean_square_norm(probe, weight, _epsilon(module)), rtol=1e-5, atol=1e-6)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = hidden.float()
        # Not by linalg.vector_norm: autocast has a say in that.
        scale = (x * x).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (x * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        gradient = gradient.float()
        normed = hidden.float() * scale
        of_weight = of_hidden = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normed).sum(tuple(range(gradient.ndim - 1))).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            weighted = gradient * weight
            along = (weighted * normed).mean(-1, keepdim=True)
            of_hidden = weighted.addcmul_(normed, along, value=-1).mul_(scale).to(hidden.dtype)
        return of_hidden, of_weight, None


def root_mean_square_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) over the last dimension in float32, in x's type times the weight."""
    normed: torch.Tensor = _RmsNorm.apply(hidden, weight, epsilon)  # type: ignore[no-untyped-call]
    return normed


class _RotateHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        first, second = gradient.chunk(2, dim=-1)
        return torch.cat((second, -first), dim=-1)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(-x2, x1) of x = (x1, x2): to the bit what transformers' own gives."""
    if x.shape[-1] % 2:
        raise ValueError(f"halves of {x.shape[-1]} numbers")
    rotated: torch.Tensor = _RotateHalf.apply(x)  # type: ignore[no-untyped-call]
    return rotated
