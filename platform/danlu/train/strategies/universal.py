"""DeepSpeed checkpoints for another number of workers: shards put together into a universal checkpoint, on each machine once."""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from danlu.errors import CheckpointError
from danlu.spec.optim import AdamW
from danlu.train.strategy import Setup

TAG = "deepspeed"
"""The folder of a checkpoint that is DeepSpeed's."""


def num_writers(folder: Path) -> int:
    """How many workers wrote the shards in `folder`."""
    return len(list(folder.glob("*_optim_states.pt")))


@contextmanager
def converted(folder: Path, setup: Setup) -> Iterator[Path]:
    """A temporary folder whose `TAG` any number of workers can load. Collective; CheckpointError on every rank if one machine failed.

    https://www.deepspeed.ai/tutorials/universal-checkpointing
    """
    optimizer, writers = setup.optim.optimizer, num_writers(folder)
    if not isinstance(optimizer, AdamW):  # state by other names, or in blocks of bytes that another cut would go through
        raise CheckpointError(
            f"it was written by {writers} workers, and DeepSpeed cannot put the state of optim.optimizer.kind={optimizer.kind} together "
            f"for {setup.world_size}",
            where=str(folder),
            fix=f"workers.num_workers={writers}, or start anew with --fresh; optim.optimizer.kind=adamw takes any number",
        )
    hosts: list[str] = [""] * setup.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    leader = hosts.index(hosts[setup.rank])
    made, error = "", ""
    if setup.rank == leader:
        made = tempfile.mkdtemp(prefix="danlu-universal-")
        try:
            _convert(folder, Path(made) / TAG)
        except (OSError, RuntimeError, ValueError, LookupError, AssertionError, pickle.UnpicklingError) as caught:
            error = f"{type(caught).__name__}: {caught}"
    found: list[tuple[str, str]] = [("", "")] * setup.world_size
    dist.all_gather_object(found, (made, error))
    try:
        if problem := next((its for _, its in found if its), ""):
            raise CheckpointError(
                f"the checkpoint of {num_writers(folder)} workers could not be put together for {setup.world_size}: {problem}",
                where=str(folder),
                fix=f"workers.num_workers={num_writers(folder)}, or start anew with --fresh",
            )
        yield Path(found[leader][0])
        dist.barrier()  # the last reader, before it is removed
    finally:
        if setup.rank == leader:
            shutil.rmtree(made, ignore_errors=True)


def _convert(folder: Path, target: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    # One process: the pool that it would start forks, which a process with a running process group must not.
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    talk = io.StringIO()
    with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
        main(SimpleNamespace(input_folder=str(folder), output_folder=str(target), **options))
