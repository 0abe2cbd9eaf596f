"""The process group that sharding strategies need, even for one process."""

from __future__ import annotations

import torch.distributed as dist

from danlu.train.strategy import Setup


def ensure_process_group(setup: Setup) -> str:
    """The backend of the process group this process is in; one process that is in none gets its own."""
    backend = "nccl" if setup.device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        assert setup.world_size == 1, "several workers come with a process group"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return backend
