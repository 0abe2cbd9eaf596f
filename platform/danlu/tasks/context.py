"""Context parallelism: the tokens of packed rows shared out over a group of workers, each of which attends with its part of the heads.

https://arxiv.org/abs/2309.14509 (DeepSpeed-Ulysses), over rows laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface

from danlu.tasks.packed_attention import packed_attention

ATTENTION = "danlu_context"


@dataclass(frozen=True)
class Context:
    """The workers that share a pass's tokens, and this one's place among them."""

    group: Any
    rank: int
    size: int
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around each exchange."""

    def share(self, tokens: int) -> slice:
        """The tokens of this worker; all have as many, the last one's may be beyond the end."""
        each = -(-tokens // self.size)
        return slice(self.rank * each, (self.rank + 1) * each)

    def part(self, tensor: torch.Tensor, fill: int) -> torch.Tensor:
        """This worker's part of [tokens], with `fill` behind the end."""
        missing = -len(tensor) % self.size
        return nn.functional.pad(tensor, (0, missing), value=fill)[self.share(len(tensor))]

    def cu_seqlens(self, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Offsets of packed rows, with a row of what stands behind the end."""
        missing = -int(cu_seqlens[-1]) % self.size
        return torch.cat([cu_seqlens, cu_seqlens[-1:] + missing]) if missing else cu_seqlens

    def whole_sum(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum of all workers' parts, with the gradient of this one's, `size` times: workers average gradients, and want the sum."""
        total = mine.detach().clone()
        with self.waiting():
            dist.all_reduce(total, group=self.group)
        scaled = mine * self.size
        return scaled + (total - scaled.detach())


class _AllToAll(torch.autograd.Function):
    """Cut dimension `apart` over the group, and put together dimension `together`, which is cut over it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, context: Context, apart: int, together: int) -> torch.Tensor:
        ctx.context, ctx.apart, ctx.together = context, apart, together
        sent = torch.stack(tensor.chunk(context.size, dim=apart)).contiguous()
        received = torch.empty_like(sent)
        with context.waiting():
            dist.all_to_all_single(received, sent, group=context.group)
        return torch.cat(list(received), dim=together)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = gradients
        back: torch.Tensor = _AllToAll.apply(gradient, ctx.context, ctx.together, ctx.apart)  # type: ignore[no-untyped-call]
        return back, None, None, None


def context_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    context: Context,
    cu_seqlens: torch.Tensor,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """`packed_attention` of tokens that are shared out: query, key, value [1, heads, tokens of this worker, head_dim]."""
    if (repeats := context.size // key.shape[1]) > 1:  # fewer key heads than workers
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    query, key, value = (_AllToAll.apply(tensor, context, 1, 2) for tensor in (query, key, value))  # type: ignore[no-untyped-call]
    out, _ = packed_attention(module, query, key, value, attention_mask, cu_seqlens=cu_seqlens, **named)
    back: torch.Tensor = _AllToAll.apply(out, context, 1, 2)  # type: ignore[no-untyped-call]  # [1, tokens, heads, head_dim]
    return back, None


AttentionInterface.register(ATTENTION, context_attention)
