"""What this process computes on, and what that is good at."""

from __future__ import annotations

import os

import torch


def pick_device(num_gpus: int) -> torch.device:
    """The process's GPU if it was given one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if num_gpus and torch.cuda.is_available() else torch.device("cpu")


def has_native_bf16(device: torch.device) -> bool:
    """True if the hardware multiplies bf16 itself: a GPU since Ampere, AVX512-BF16, AMX. Elsewhere bf16 is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(probe() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if (probe := getattr(torch.cpu, name, None)))


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
