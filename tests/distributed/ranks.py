"""Runs training cases on a process group of gloo ranks and writes the losses and gradient norms as JSON; beside them, in OUT.events, what
happened in each, and in OUT.errors what a full disk made of it.

python ranks.py WORLD MODEL TRAIN_CSV OUT CASE.json   (CASE.json: {name: {overrides of the TrainJob}}; "folder" there is another model,
"full_disk_on" the rank that can write nothing after the first checkpoint, "goes_on_from" an earlier case, whose last checkpoint is lost)
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from danlu.errors import StorageError
from danlu.spec.train import TrainJob
from danlu.tasks.task import task_file
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train.loop import train
from danlu.train.run import EventRecord, LocalRun, RayRun, Record, StepRecord

WAIT = timedelta(seconds=90)
"""How long a rank waits for another one: a test that hangs says so."""


def job_of(model: str, train_file: str, overrides: dict[str, Any]) -> TrainJob:
    """A small deterministic float32 job; `overrides` replace its fields."""
    fields: dict[str, Any] = {
        "name": "parity",
        "model": {"model_name_or_path": model, "max_length": 32},
        "data": {"train": train_file, "cache_dir": str(Path(train_file).parent / "cache")},
        "optim": {"learning_rate": 2e-3, "head_learning_rate_multiplier": 3.0, "max_grad_norm": 0.5, "schedule": {"kind": "cosine"}},
        "precision": "fp32",
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "max_steps": 4,
        "evaluation": {"eval_steps": 4},
        "checkpoint": {"save_steps": 2},
        "storage": "unused",
    }
    return TrainJob.model_validate(fields | overrides)


def curve(job: TrainJob, run: LocalRun | RayRun, records: list[Any], run_uri: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    folder = Path(job.model.model_name_or_path)
    tokenizer = load_tokenizer(folder)
    data = task_file(job.task).splits(job.data, job.task, tokenizer, max_length=job.model.max_length, seed=job.seed)
    train(job, data, folder, tokenizer, run, run_uri)
    return [(record.loss, record.grad_norm) for record in records if isinstance(record, StepRecord)]


class FullDisk(RayRun):
    """A rank on a machine where, on the rank `victim`, the system refuses every longer write once a checkpoint is there."""

    def __init__(self, listener: Callable[[Record], None], victim: int) -> None:
        super().__init__(torch.device("cpu"), listener)
        self.victim = victim
        self.since = 0.0

    def report(self, record: Record) -> None:
        if isinstance(record, EventRecord) and record.event == "checkpoint" and not self.since:
            self.since = time.monotonic()
            if self.rank == self.victim:
                limit_files(512)
        super().report(record)


def limit_files(num_bytes: int) -> None:
    """The largest file this process can write; -1 for any. Beyond it every write fails, whoever does it in whatever language."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def on_a_full_disk(job: TrainJob, victim: int, run_uri: str) -> list[tuple[str, float]]:
    """What each rank raised, and the seconds from the disk's being full until then."""
    run = FullDisk([].append, victim)
    raised = "nothing"
    try:
        curve(job, run, [], run_uri)
    except StorageError as error:
        raised = str(error)
    finally:
        limit_files(-1)
    all_raised: list[tuple[str, float]] = [("", 0.0)] * run.world_size
    dist.all_gather_object(all_raised, (raised, time.monotonic() - run.since))
    return all_raised


def _rank(rank: int, world: int, port: int, model: str, train_file: str, out: str, cases: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=WAIT)
    curves, events, errors = {}, {}, {}
    for name, overrides in json.loads(Path(cases).read_text()).items():
        records: list[Any] = []
        run_uri = overrides.pop("run_uri", None) or f"{out}.{name}"
        if before := overrides.pop("goes_on_from", None):
            if rank == 0:
                shutil.copytree(f"{out}.{before}", run_uri)
                (Path(run_uri) / "checkpoints" / "step-000004" / "manifest.json").unlink()
            dist.barrier()
        victim = overrides.pop("full_disk_on", None)
        job = job_of(overrides.pop("folder", model), train_file, overrides)
        if victim is not None:
            errors[name] = on_a_full_disk(job, victim, run_uri)
            continue
        curves[name] = curve(job, RayRun(torch.device("cpu"), records.append), records, run_uri)
        events[name] = [(record.event, record.detail) for record in records if isinstance(record, EventRecord)]
    if rank == 0:
        Path(out).write_text(json.dumps(curves))
        Path(f"{out}.events").write_text(json.dumps(events))
        Path(f"{out}.errors").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    world, arguments = int(sys.argv[1]), sys.argv[2:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    mp.spawn(_rank, (world, free_port, *arguments), nprocs=world)
