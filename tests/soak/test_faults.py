"""Faults while training, in every strategy: each ends with the losses of the uninterrupted run, or an error that says why."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from danlu.errors import ResourceError, StorageError
from danlu.spec.train import TrainJob
from danlu.train import driver
from danlu.train.run import EventRecord, Record, StepRecord

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("ray_local")]
STEPS, SAVE_STEPS = 240, 20
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
}


@pytest.fixture(scope="module", params=STRATEGIES)
def job(request: pytest.FixtureRequest, tiny_model: Path, topic_files: dict[str, str]) -> TrainJob:
    return TrainJob.model_validate(
        {
            "name": request.param,
            "model": {"model_name_or_path": str(tiny_model), "max_length": 32, "hidden_dropout": 0.1},
            "data": {"train": topic_files["train"], "cache_dir": str(Path(topic_files["train"]).parent / "cache")},
            "parallel": STRATEGIES[request.param],
            "workers": {"num_workers": 2},
            "optim": {"learning_rate": 2e-3, "schedule": {"kind": "cosine"}},
            "precision": "fp32",
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "max_steps": STEPS,
            "checkpoint": {"save_steps": SAVE_STEPS},
            "evaluation": {"eval_steps": 80},
        }
    )


@pytest.fixture(scope="module")
def uninterrupted(job: TrainJob, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    records: list[Record] = []
    driver.fit(job, str(tmp_path_factory.mktemp("uninterrupted")), records.append)
    return losses(records)


def losses(records: list[Record]) -> dict[int, float]:
    """Step -> loss; of a step that was done twice, the later one."""
    return {record.step: record.loss for record in records if isinstance(record, StepRecord)}


def events(records: list[Record], event: str) -> list[int]:
    return [record.step for record in records if isinstance(record, EventRecord) and record.event == event]


class Killer:
    """A listener that ends one worker at each of some steps."""

    def __init__(self, steps: list[int], draw: random.Random) -> None:
        self.steps, self.draw = sorted(steps), draw
        self.records: list[Record] = []
        self.killed: list[int] = []

    def __call__(self, record: Record) -> None:
        self.records.append(record)
        if self.steps and record.step >= self.steps[0]:
            workers = [process for process in psutil.Process().children(recursive=True) if is_worker(process)]
            victim = self.draw.choice(workers)
            victim.send_signal(signal.SIGKILL)
            victim.wait(10)
            self.killed.append(self.steps.pop(0))


def is_worker(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).startswith("ray::RayTrainWorker")
    except psutil.NoSuchProcess:
        return False


def test_workers_killed_at_random_steps(job: TrainJob, uninterrupted: dict[int, float], tmp_path: Path) -> None:
    draw = random.Random(f"{job.name} {os.environ.get('DANLU_SOAK_SEED', 0)}")
    killer = Killer([draw.randrange(25, 60), draw.randrange(70, 110), draw.randrange(120, 150)], draw)
    outcome = driver.fit(job.model_copy(update={"max_failures": 3}), str(tmp_path), killer)
    assert len(killer.killed) == 3
    assert len(events(killer.records, "resumed")) == 3
    assert outcome["steps"] == STEPS
    assert losses(killer.records) == pytest.approx(uninterrupted, abs=1e-6)


def killed_run(job: TrainJob, folder: Path, step: int) -> list[Path]:
    """A run that is killed once `step` is heard; its whole checkpoints, the newest first."""
    with pytest.raises(ResourceError, match="a training worker was lost"):
        driver.fit(job, str(folder), Killer([step], random.Random(0)))
    manifests = (folder / "checkpoints").glob("step-*/manifest.json")
    return sorted((path.parent for path in manifests), reverse=True)


def damage(checkpoint: Path) -> None:
    """Flip a byte in the middle of the largest file, as a failing disk does."""
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 0xFF
    file.write_bytes(contents)


@pytest.mark.parametrize("number", [1, 2])
def test_checkpoints_damaged_between_two_runs(number: int, job: TrainJob, uninterrupted: dict[int, float], tmp_path: Path) -> None:
    checkpoints = killed_run(job, tmp_path, 70)
    assert len(checkpoints) == job.checkpoint.save_total_limit == 2
    for checkpoint in checkpoints[:number]:
        damage(checkpoint)
    records: list[Record] = []
    driver.fit(job, str(tmp_path), records.append)
    steps = [int(checkpoint.name.removeprefix("step-")) for checkpoint in checkpoints]
    assert events(records, "checkpoint damaged") == steps[:number]
    assert events(records, "resumed") == steps[number:]
    first = steps[number] + 1 if number < 2 else 1
    assert losses(records) == pytest.approx({step: loss for step, loss in uninterrupted.items() if step >= first}, abs=1e-6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], check=False).returncode == 0
    )
    if not mounted:
        pytest.skip("a small file system can only be mounted as root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_while_saving(job: TrainJob, uninterrupted: dict[int, float], small_disk: Path) -> None:
    records: list[Record] = []
    with pytest.raises(StorageError, match=r"the checkpoint of step \d+ could not be saved: .*\n  try: free some space") as raised:
        driver.fit(job, f"{small_disk}/run", records.append)
    whole = events(records, "checkpoint")
    told = f"the checkpoint of step {whole[-1]} is whole" if whole else "there is no earlier one"
    assert told in str(raised.value)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    after: list[Record] = []
    driver.fit(job, f"{small_disk}/run", after.append)
    assert events(after, "resumed") == whole[-1:]
    assert losses(records) | losses(after) == pytest.approx(uninterrupted, abs=1e-6)
