"""Attention of packed rows by the compiled kernels: all rows and heads in one call, and their scores made again for the backward."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from danlu.tasks.kernels import AttentionCall, draw_seed, kernels, loaded

STEP = 32
"""What a head's size is a multiple of."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A result in bf16, and what it lost by that, in bf16 too."""


def can_be_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """bf16 [1, heads, tokens, head_dim] on a CPU, where there are kernels for it."""
    dim = query.shape[-1]
    fits = query.dtype == key.dtype == value.dtype == torch.bfloat16 and dim == value.shape[-1] and dim % STEP == 0
    return fits and query.device.type == "cpu" and kernels() is not None


class FusedAttention(torch.autograd.Function):
    """query: bf16 [1, heads, tokens, dim]; key, value: [1, key heads, tokens, dim]; starts: int32 [rows + 1]; window: 0 for none.

    Returns [1, tokens, heads, dim].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        scaling: float,
        causal: bool,
        window: int,
        dropout: float,
    ) -> torch.Tensor:
        q_k_v = [_by_token(tensor) for tensor in (query, key, value)]
        starts = starts.to("cpu", torch.int32).contiguous()
        tokens, heads, _ = q_k_v[0].shape
        out, rest = (query.new_empty(q_k_v[0].shape) for _ in range(2))
        log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(*q_k_v, starts, out, rest, log_sums)
        ctx.fixed = {"causal": causal, "window": window, "scaling": scaling, "dropout": dropout, "seed": draw_seed() if dropout else 0}
        attend(q_k_v, starts, (out, rest), log_sums, ctx.fixed)
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *q_k_v, starts, out, rest, log_sums = ctx.saved_tensors
        gradients = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in q_k_v]
        attend_backward(q_k_v, starts, (out, rest), log_sums, ctx.fixed, gradient[0].to(torch.bfloat16).contiguous(), gradients)
        return *(tensor.transpose(0, 1)[None] for tensor in gradients), None, None, None, None, None


def attend(q_k_v: Sequence[torch.Tensor], starts: torch.Tensor, out: Pair, log_sums: torch.Tensor, fixed: Mapping[str, Any]) -> None:
    """Fill out [tokens, heads, dim], both parts, and log_sums, float32 [heads, tokens].

    q_k_v: bf16 [tokens, heads, dim], a token's heads beside each other; starts: int32 [rows + 1]; fixed: the call's scaling, causal, window
    (0: none), dropout and seed.
    """
    loaded().attention.danlu_attention(ctypes.byref(_call(q_k_v, starts, out, log_sums, fixed)))


def attend_backward(
    q_k_v: Sequence[torch.Tensor],
    starts: torch.Tensor,
    out: Pair,
    log_sums: torch.Tensor,
    fixed: Mapping[str, Any],
    gradient: torch.Tensor,
    of_q_k_v: Sequence[torch.Tensor],
) -> None:
    """Fill of_q_k_v, the shapes of q_k_v. gradient: of `out`, contiguous; the others as `attend` had and left them."""
    call = _call(q_k_v, starts, out, log_sums, fixed)
    of_query, of_key, of_value = of_q_k_v
    assert of_key.stride(0) == of_value.stride(0)
    call.out_gradient = gradient.data_ptr()
    call.query_gradient, call.key_gradient, call.value_gradient = of_query.data_ptr(), of_key.data_ptr(), of_value.data_ptr()
    call.gradient_stride, call.key_gradient_stride = of_query.stride(0), of_key.stride(0)
    loaded().attention.danlu_attention_backward(ctypes.byref(call))


def _by_token(tensor: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, dim] -> [tokens, heads, dim], copied only if a token's heads do not lie beside each other."""
    by_token = tensor[0].transpose(0, 1)
    dim = tensor.shape[-1]
    return by_token if by_token.stride()[1:] == (dim, 1) else by_token.contiguous()


def _call(
    q_k_v: Sequence[torch.Tensor], starts: torch.Tensor, out: Pair, log_sums: torch.Tensor, fixed: Mapping[str, Any]
) -> AttentionCall:
    query, key, value = q_k_v
    tensors = {"query": query, "key": key, "value": value, "starts": starts, "out": out[0], "out_rest": out[1], "log_sums": log_sums}
    return AttentionCall(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        **{f"{name}_stride": tensors[name].stride(0) for name in ("query", "key", "value")},
        rows=len(starts) - 1,
        heads=query.shape[1],
        key_heads=key.shape[1],
        dim=query.shape[2],
        **fixed,
    )
