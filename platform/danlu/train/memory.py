"""The memory that a step frees stays with its process, for the next step."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
"""malloc.h's names for mallopt."""

KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}
AFTERWARDS = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20, TOP_PAD: 128 << 10}
"""glibc's defaults; for the two thresholds, which it moves by itself until somebody sets one, what it moves them to."""


@contextmanager
def kept_memory() -> Iterator[None]:
    """While it lasts, glibc's malloc gives nothing back to the system; then all that is free.

    By default each tensor of some megabytes is pages of its own, which the system clears when they are touched and takes back when the
    tensor dies: up to a fifth of a step on a CPU. Other allocators and systems are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for name, value in KEPT.items():
        libc.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in AFTERWARDS.items():
            libc.mallopt(name, value)
        libc.malloc_trim(ctypes.c_size_t(0))
