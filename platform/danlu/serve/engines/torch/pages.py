"""Memory for what every step reads: weights, keys and values, one behind the other in large pages."""

from __future__ import annotations

import math
import mmap

import torch

REGION_BYTES = 64 << 20
LARGE_PAGE_BYTES = 2 << 20
CACHE_LINE_BYTES = 64


class Pages:
    """Tensors one behind the other in regions of large pages: page by small page, looking up where memory is takes as long as reading it.
    A tensor of its own has large pages only where it fills them, and those of a small model's layers fill none. A region is given back
    when its last tensor is."""

    def __init__(self) -> None:
        self.region = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def empty(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """As torch.empty, on the CPU."""
        num_bytes = math.prod(size) * dtype.itemsize
        if self.used + num_bytes > len(self.region):
            # What is left of the last region was never written to, so it takes no memory.
            self.region, self.used = _region(max(num_bytes, REGION_BYTES)), 0
        found = self.region[self.used : self.used + num_bytes]
        self.used += -(-num_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
        return found.view(dtype).view(size)


def _region(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes], in large pages where the operating system has them to give: elsewhere small ones do."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    whole = -(-num_bytes // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
    held = mmap.mmap(-1, whole + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made = torch.frombuffer(held, dtype=torch.uint8)
    first = -made.data_ptr() % LARGE_PAGE_BYTES
    try:
        held.madvise(mmap.MADV_HUGEPAGE, first, whole)  # before it is written to
    except OSError:  # a kernel without them
        return made[:num_bytes]
    return made[first : first + num_bytes]
