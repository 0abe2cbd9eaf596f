"""What this process computes on, and what that is good at."""

from __future__ import annotations

import math
import time

import torch


def pick_device(num_gpus: int) -> torch.device:
    """The process's GPU if it was given one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if num_gpus and torch.cuda.is_available() else torch.device("cpu")


def has_native_bf16(device: torch.device) -> bool:
    """True if the hardware multiplies bf16 itself: a GPU since Ampere, AVX512-BF16, AMX. Elsewhere bf16 is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(probe() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if (probe := getattr(torch.cpu, name, None)))


def matmul_per_second(device: torch.device, *, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of a matrix product (of an encoder's size on a CPU), the best of those that fit into `seconds`."""
    rows, inner, columns = (8192, 4096, 4096) if device.type == "cuda" else (1024, 384, 1536)
    draw = torch.Generator(device).manual_seed(0)  # its own: nothing else that is drawn changes
    left = torch.randn(rows, inner, generator=draw, dtype=dtype, device=device)
    right = torch.randn(inner, columns, generator=draw, dtype=dtype, device=device)
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * columns / best
