"""Attention of rows laid end to end: transformers' attention function "danlu_packed", and the backward that it has on a CPU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from danlu.tasks.fused_attention import FusedAttention, can_be_fused

ATTENTION = "danlu_packed"

LONGEST = 1024
"""Rows up to here keep their attention weights for the backward: on a CPU that is two to three times as fast as PyTorch's, which makes
them again, but takes memory by the square of the length."""

STEP = 16
"""Shapes of a row's matrices are multiples of it."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each row only. query, key, value: [1, heads, tokens, head_dim]; returns [1, tokens, heads, head_dim].

    Where nothing is learned, rows of one length that stand next to each other go through one call. Causal where the module
    is; fewer key than query heads are shared out over them.
    """
    causal = bool(getattr(module, "is_causal", False))
    window = sliding_window if causal else None
    lengths = cu_seqlens.diff().tolist()
    if torch.is_autocast_enabled(query.device.type):
        # What autocast would do to each piece.
        query, key, value = (tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in (query, key, value))
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if learns and can_be_fused(query, key, value):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        fused = FusedAttention.apply(query, key, value, cu_seqlens, scaling, causal, window or 0, dropout)  # type: ignore[no-untyped-call]
        return fused, None
    if learns and query.device.type == "cpu" and max(lengths) <= LONGEST:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        kept = _KeptAttention.apply(query, key, value, lengths, scaling, causal, window, dropout)  # type: ignore[no-untyped-call]
        return kept, None
    if (groups := query.shape[1] // key.shape[1]) > 1:
        # enable_gqa does the same and is four times slower in bf16 on CPU.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    pieces, runs = [], _runs(lengths)
    # Split, not sliced: the backward of a slice fills zeros as large as the whole batch, once for each run.
    parts = zip(*(torch.split(tensor, [tokens for tokens, _ in runs], dim=2) for tensor in (query, key, value)), strict=True)
    for (tokens, rows), part in zip(runs, parts, strict=True):
        q, k, v = (_rows(tensor, rows) for tensor in part)
        length = q.shape[2]
        if window is not None and length > window:
            mask = _mask(length, window, torch.bool, q.device)
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        else:
            out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=causal)
        pieces.append(out.transpose(1, 2).reshape(1, tokens, *out.shape[1::2]))
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0], None


def _rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """[1, heads, rows * length, dim] -> [rows, heads, length, dim], without a copy."""
    if rows == 1:
        return tensor
    _, heads, tokens, dim = tensor.shape
    return tensor.view(heads, rows, tokens // rows, dim).transpose(0, 1)


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    """(tokens, rows) of each run of neighbours of one length."""
    counted = ((length, len(list(its))) for length, its in itertools.groupby(lengths))
    return [(length * rows, rows) for length, rows in counted]


def _mask(length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each position of a causal row may look at, [length, length]: as bool, or as numbers to add (0 and -inf)."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return seen if dtype == torch.bool else torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


@functools.lru_cache(maxsize=4)
def _added_mask(window: int | None, dtype: torch.dtype) -> torch.Tensor:
    return _mask(LONGEST, window, dtype, torch.device("cpu"))


class _KeptAttention(torch.autograd.Function):
    """The weights of each row are made by matrix products of its heads and kept for the backward.

    Inside, tensors are [key heads, tokens x query heads of a key head, dim]: query heads that share a key head are more rows of one
    product, which also sums their gradients; and a row's part of each is one that oneDNN takes, and fills, without a copy.

    oneDNN makes a kernel for each new shape, which takes longer than running it: so a row's part ends at a multiple of STEP tokens. What
    of it is the next row's has weights of 0, and gets zeros, until that row's own turn.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: list[int],
        scaling: float,
        causal: bool,
        window: int | None,
        dropout: float,
    ) -> torch.Tensor:
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        q, k, v = (_by_head(tensor.transpose(1, 2), heads) for tensor in (query, key, value))
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        nothing = q.new_empty(1)
        kept: list[torch.Tensor] = []
        factors: list[torch.Tensor] = []
        for length, q_row, k_row, v_row, out_row in _each(lengths, (q, k, v, out)):
            scores = torch.baddbmm(nothing, q_row, k_row.transpose(1, 2), beta=0, alpha=scaling)
            rounded = scores.shape[2]
            if causal:  # masked_fill_ takes eight times as long
                mask = _added_mask(window, scores.dtype)[:rounded, None, :rounded]
                scores.view(heads, rounded, groups, rounded).add_(mask)
            else:
                scores[..., length:] = -torch.inf
            # In bf16 PyTorch's softmax is slow where rows do not fill whole vectors.
            weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
            weights[:, length * groups :] = 0.0
            kept.append(weights)
            if dropout:
                factors.append(torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout))
                weights = weights * factors[-1]
            torch.bmm(weights, v_row, out=out_row)
        ctx.save_for_backward(q, k, v, *kept, *factors)
        ctx.lengths, ctx.scaling = lengths, scaling
        return _by_token(out, query.shape[2], groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        kept, factors = kept[: len(ctx.lengths)], kept[len(ctx.lengths) :] or [None] * len(ctx.lengths)
        of_out = _by_head(gradient, len(k))
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        nothing = q.new_empty(1)
        rows = _each(ctx.lengths, (q, k, v, of_out, of_q, of_k, of_v))
        for (_, q_row, k_row, v_row, of_out_row, of_q_row, of_k_row, of_v_row), weights, factor in zip(rows, kept, factors, strict=True):
            of_weights = torch.bmm(of_out_row, v_row.transpose(1, 2))
            dropped = weights if factor is None else weights * factor
            of_weights = of_weights if factor is None else of_weights.mul_(factor)
            torch.bmm(dropped.transpose(1, 2), of_out_row, out=of_v_row)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            torch.baddbmm(nothing, of_scores, k_row, beta=0, alpha=ctx.scaling, out=of_q_row)
            torch.baddbmm(nothing, of_scores.transpose(1, 2), q_row, beta=0, alpha=ctx.scaling, out=of_k_row)
        tokens, groups = gradient.shape[1], q.shape[1] // k.shape[1]
        found = (_by_token(tensor, tokens, its).transpose(1, 2) for tensor, its in ((of_q, groups), (of_k, 1), (of_v, 1)))
        return *found, None, None, None, None, None


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[1, tokens, heads x groups, dim] -> [heads, (tokens + STEP - 1) x groups, dim], zeros at the end."""
    _, tokens, _, dim = tensor.shape
    by_head = tensor.view(tokens, heads, -1, dim).transpose(0, 1)
    laid_out = tensor.new_empty(heads, tokens + STEP - 1, *by_head.shape[2:])
    laid_out[:, :tokens] = by_head
    laid_out[:, tokens:] = 0.0
    return laid_out.flatten(1, 2)


def _by_token(tensor: torch.Tensor, tokens: int, groups: int) -> torch.Tensor:
    """What `_by_head` gives -> [1, tokens, heads x groups, dim]."""
    heads, _, dim = tensor.shape
    return tensor.view(heads, -1, groups, dim)[:, :tokens].transpose(0, 1).reshape(1, tokens, heads * groups, dim)


def _each(lengths: list[int], tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[Any, ...]]:
    """Each row's length and its parts of tensors that `_by_head` made."""
    whole, start = sum(lengths) + STEP - 1, 0
    groups = [tensor.shape[1] // whole for tensor in tensors]
    for length in lengths:
        rounded = -(-length // STEP) * STEP
        parts = (tensor.narrow(1, start * its, rounded * its) for tensor, its in zip(tensors, groups, strict=True))
        yield length, *parts
        start += length


AttentionInterface.register(ATTENTION, packed_attention)
