"""Keys and values of all running sequences: per layer one tensor [slot, key-value head, position, dimension]."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from danlu.errors import ResourceError
from danlu.serve.engines.torch.pages import Pages
from danlu.serve.engines.torch.slots import Copy


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class Cache:
    """Slots of `max_model_len` positions. A batch's sequences stand side by side, so that one attention call reads many without a copy."""

    def __init__(
        self, shapes: Mapping[int, LayerShape], num_slots: int, max_model_len: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_slots, self.max_model_len = num_slots, max_model_len
        pages = Pages()

        def zeros(shape: LayerShape, dim: int) -> torch.Tensor:
            size = num_slots, shape.num_kv_heads, max_model_len, dim
            made = pages.empty(*size, dtype=dtype) if device.type == "cpu" else torch.empty(*size, dtype=dtype, device=device)
            # Not what lay there: attention over neighbours multiplies a masked position by nothing, and nothing times NaN is NaN.
            return made.zero_()

        self.layers = {layer: (zeros(shape, shape.key_dim), zeros(shape, shape.value_dim)) for layer, shape in shapes.items()}

    def copy(self, copies: Sequence[Copy]) -> None:
        """Before a step: prefixes that other slots have."""
        for one in copies:
            for keys, values in self.layers.values():
                keys[one.target, :, : one.length] = keys[one.source, :, : one.length]
                values[one.target, :, : one.length] = values[one.source, :, : one.length]


def num_slots(shapes: Collection[LayerShape], max_model_len: int, budget_bytes: float, dtype: torch.dtype, *, max_num_seqs: int) -> int:
    """As many slots as the budget holds, `max_num_seqs` at most; ResourceError if it does not hold one."""
    per_token = sum(shape.elements_per_token for shape in shapes) * dtype.itemsize
    found = int(budget_bytes // (per_token * max_model_len))
    if found < 1:
        fits = int(budget_bytes // per_token)
        raise ResourceError(
            f"one sequence of {max_model_len} tokens needs {per_token * max_model_len / 2**30:.3g} GiB for its keys and values, "
            f"and kv_cache_memory_gb is {budget_bytes / 2**30:.3g}",
            where="engine.kv_cache_memory_gb",
            fix=f"kv_cache_memory_gb: {per_token * max_model_len / 2**30 * 1.01:.3g}" + (f", or max_model_len: {fits}" if fits else ""),
        )
    return min(found, max_num_seqs)
