"""Runs training cases on a process group of gloo ranks and writes the losses and gradient norms as JSON; beside them, in OUT.events, what
happened in each, in OUT.errors what a full disk made of it, in OUT.phases where rank 0's steps spent their time.

python ranks.py WORLD MODEL TRAIN_CSV OUT CASE.json   (CASE.json: {name: {overrides of the TrainJob}}; "folder" there is another model,
"full_disk_on" the rank that can write nothing after the first checkpoint, "goes_on_from" an earlier case, whose last checkpoint is lost,
"slow_on" the rank whose layers take SLOW_S longer)
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from danlu.errors import StorageError
from danlu.spec.train import TrainJob
from danlu.tasks.task import task_file
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train.loop import train
from danlu.train.run import EventRecord, LocalRun, RayRun, Record, StepRecord

WAIT = timedelta(seconds=90)
"""How long a rank waits for another one: a test that hangs says so."""
SLOW_S = 0.15
LANGUAGE_TASKS = ("pretrain", "chat", "preference", "seq2seq")

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


@dataclass(frozen=True)
class Told:
    """What the ranks of a group wrote, by case."""

    curves: dict[str, Curve]
    events: dict[str, list[tuple[str, str]]]
    errors: dict[str, list[tuple[str, float]]]
    phases: dict[str, list[dict[str, float]]]
    """Seconds of each step by what they went into, and `step`: all of them."""


def on_ranks(world: int, cases: dict[str, dict[str, Any]], folder: Path, *, model: Path | str = "-", train_file: str = "-.csv") -> Told:
    """All cases on one group of processes; runs are written to FOLDER/out.json.CASE."""
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [str(world), str(model), train_file, str(folder / "out.json"), str(folder / "cases.json")]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return Told(*(json.loads((folder / f"out.json{end}").read_text()) for end in ("", ".events", ".errors", ".phases")))


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
    fields |= overrides
    if fields.get("task", {}).get("kind", "classification") in LANGUAGE_TASKS:  # they have no head for a rate of its own
        fields["optim"] = {name: value for name, value in fields["optim"].items() if name != "head_learning_rate_multiplier"}
    return TrainJob.model_validate(fields)


def curve(job: TrainJob, run: LocalRun | RayRun, records: list[Any], run_uri: str) -> Curve:
    """The job's, in this process."""
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


@contextmanager
def slowed() -> Iterator[None]:
    """Each forward of an encoder's layer takes this rank `SLOW_S` longer while it trains."""
    from transformers.models.bert.modeling_bert import BertLayer

    def wait(module: nn.Module, *_: Any) -> None:
        if module.training and isinstance(module, BertLayer):
            time.sleep(SLOW_S)

    handle = register_module_forward_hook(wait)
    try:
        yield
    finally:
        handle.remove()


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


def _rank(rank: int, world: int, listener: socket.socket, model: str, train_file: str, out: str, cases: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    host, port = listener.getsockname()
    listens = {"is_master": True, "master_listen_fd": listener.detach()} if rank == 0 else {}
    store = dist.TCPStore(host, port, world, timeout=WAIT, **listens)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=WAIT)
    curves, events, errors, phases = {}, {}, {}, {}
    for name, overrides in json.loads(Path(cases).read_text()).items():
        records: list[Any] = []
        run_uri = overrides.pop("run_uri", None) or f"{out}.{name}"
        if before := overrides.pop("goes_on_from", None):
            if rank == 0:
                shutil.copytree(f"{out}.{before}", run_uri)
                (Path(run_uri) / "checkpoints" / "step-000004" / "manifest.json").unlink()
            dist.barrier()
        victim, slow = overrides.pop("full_disk_on", None), overrides.pop("slow_on", None)
        job = job_of(overrides.pop("folder", model), train_file, overrides)
        if victim is not None:
            errors[name] = on_a_full_disk(job, victim, run_uri)
            continue
        with nullcontext() if slow != rank else slowed():
            curves[name] = curve(job, RayRun(torch.device("cpu"), records.append), records, run_uri)
        events[name] = [(record.event, record.detail) for record in records if isinstance(record, EventRecord)]
        phases[name] = [record.phases | {"step": record.step_seconds} for record in records if isinstance(record, StepRecord)]
    if rank == 0:
        Path(out).write_text(json.dumps(curves))
        Path(f"{out}.events").write_text(json.dumps(events))
        Path(f"{out}.errors").write_text(json.dumps(errors))
        Path(f"{out}.phases").write_text(json.dumps(phases))
    dist.destroy_process_group()


def _load_libraries() -> None:
    """What the cases need and load late: here once, for all ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.pipelining
    import torch.distributed.tensor.parallel  # noqa: F401
    from transformers import BertForSequenceClassification, Qwen3ForCausalLM, T5ForConditionalGeneration  # noqa: F401

    from danlu.tasks import chat, classification, preference, pretrain, seq2seq  # noqa: F401


if __name__ == "__main__":
    world, arguments = int(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    _load_libraries()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Forked, ranks have the libraries that would take each of them longer than its cases, and a port that nobody else can take.
        mp.start_processes(_rank, (world, listener, *arguments), nprocs=world, start_method="fork")
