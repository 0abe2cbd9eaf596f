"""Training on Ray: the losses of one worker, whatever happens to a worker on the way, and errors that say what to do."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from danlu import sdk
from danlu.artifact.run_logs import kept_logs
from danlu.errors import DanluError, ResourceError
from danlu.metrics import catalog
from danlu.spec.train import TrainJob
from danlu.terminal import TrainingView
from danlu.train import driver
from danlu.train.run import EventRecord, LocalRun, Record, StepRecord
from danlu.train.worker import work

pytestmark = pytest.mark.usefixtures("ray_local")
STEPS = 160


def losses(records: list[Record]) -> dict[int, float]:
    return {record.step: record.loss for record in records if isinstance(record, StepRecord)}


def resumed_at(records: list[Record]) -> list[int]:
    return [record.step for record in records if isinstance(record, EventRecord) and record.event == "resumed"]


@pytest.fixture(scope="module")
def one_worker(make_job: Callable[..., TrainJob], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the job in this process, without Ray."""
    run = LocalRun(torch.device("cpu"))
    work(make_job("alone", workers={"num_workers": 1}, micro_batch_size=16), run, str(tmp_path_factory.mktemp("alone")))
    return losses(run.records)


@pytest.fixture(scope="module")
def long_job(make_job: Callable[..., TrainJob]) -> TrainJob:
    return make_job("long", max_steps=STEPS, checkpoint={"save_steps": 20}, evaluation={"eval_steps": STEPS // 2})


@pytest.fixture(scope="module")
def uninterrupted(long_job: TrainJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Record]]:
    """Outcome and records of two workers whom nothing happens to."""
    records: list[Record] = []
    return driver.fit(long_job, str(tmp_path_factory.mktemp("uninterrupted")), records.append), records


class Killer:
    """A listener that ends a training worker as the kernel would, once a step is reached."""

    def __init__(self, workers: Callable[[str], list[psutil.Process]], step: int, number: int = 0) -> None:
        self.workers, self.step, self.number = workers, step, number
        self.records: list[Record] = []
        self.killed: psutil.Process | None = None

    def __call__(self, record: Record) -> None:
        self.records.append(record)
        if self.killed is None and record.step >= self.step:
            self.killed = self.workers("ray::RayTrainWorker")[self.number]
            self.killed.send_signal(signal.SIGKILL)


def test_two_workers_give_the_losses_of_one(
    one_worker: dict[int, float], uninterrupted: tuple[dict[str, Any], list[Record]], metrics_port: Any, wait_for: Any
) -> None:
    outcome, records = uninterrupted
    heard = [record.step for record in records if isinstance(record, StepRecord)]
    assert heard == list(range(1, STEPS + 1))
    assert {step: losses(records)[step] for step in one_worker} == pytest.approx(one_worker, abs=5e-6)
    assert one_worker[8] < one_worker[1]
    assert outcome["steps"] == STEPS
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C is ours again

    # The last numbers reach the metrics port although the workers are gone by now.
    tokens = sum(record.tokens for record in records if isinstance(record, StepRecord))
    wait_for("all tokens on the metrics port", lambda: metrics_port.total(catalog.TRAIN_TOKENS.exported, train_job="long") == tokens)
    last = next(record for record in reversed(records) if isinstance(record, StepRecord))
    assert metrics_port.total(catalog.TRAIN_STEP.exported, train_job="long") == STEPS
    assert metrics_port.total(catalog.TRAIN_LOSS.exported, train_job="long") == pytest.approx(last.loss)
    assert metrics_port.total(f"{catalog.TRAIN_STEP_SECONDS.exported}_count", train_job="long") == STEPS


def test_zero2_through_the_sdk_gives_the_losses_of_one_and_a_stored_bundle(
    one_worker: dict[int, float], make_job: Callable[..., TrainJob]
) -> None:
    records: list[Record] = []
    job = make_job("zero2", parallel={"kind": "deepspeed", "zero_stage": 2})
    trained = sdk.train(job, listener=records.append, prepared=sdk.prepare(job, calibrate=False))
    assert losses(records) == pytest.approx(one_worker, abs=5e-6)
    kept = {values["step"]: values["loss"] for values in trained.run.records() if values["kind"] == "step"}
    assert kept == losses(records)
    assert trained.run.status()["state"] == "finished"
    assert sdk.open_bundle("zero2@production", job.storage).meta.digest == trained.bundle.meta.digest


def test_a_killed_worker_restarts_the_job_to_the_losses_of_the_uninterrupted_one(
    long_job: TrainJob,
    uninterrupted: tuple[dict[str, Any], list[Record]],
    processes_named: Callable[[str], list[psutil.Process]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killer = Killer(processes_named, step=50)
    outcome = driver.fit(long_job.model_copy(update={"max_failures": 1}), str(tmp_path), killer)
    assert killer.killed is not None
    view = TrainingView()
    for record in killer.records:
        view(record)
    assert ": a worker was lost; while max_failures allows it, training goes on from its last checkpoint" in capsys.readouterr().out
    (step,) = resumed_at(killer.records)
    assert step % 20 == 0
    assert 40 <= step < STEPS
    expected_outcome, expected = uninterrupted
    assert losses(killer.records) == pytest.approx(losses(expected), abs=1e-6)
    assert outcome == expected_outcome
    # Each worker of both attempts has left what it wrote.
    logs = {name: (tmp_path / "logs" / name).read_text() for name in kept_logs(str(tmp_path))}
    assert sorted(name.rpartition("-rank")[2] for name in logs) == ["-0.log", "-0.log", "-1.log", "-1.log"]
    assert all('"message": "worker starts"' in text for text in logs.values())
    assert [name for name, text in logs.items() if "resumed" in text] == [max(name for name in logs if "rank-0" in name)]


def test_without_max_failures_a_killed_worker_is_an_error_that_says_how_to_go_on(
    long_job: TrainJob,
    processes_named: Callable[[str], list[psutil.Process]],
    log_of_ray: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    killer = Killer(processes_named, step=5, number=1)
    with pytest.raises(ResourceError, match="a training worker was lost") as raised:
        driver.fit(long_job, str(tmp_path), killer)
    assert "max_failures" in str(raised.value)
    assert "Traceback" not in str(raised.value)
    lines = log_of_ray(train_job="long", run=tmp_path.name)
    assert sorted(line["rank"] for line in lines if line["message"] == "worker starts") == [0, 1]
    assert [line["rank"] for line in lines if line["message"] in ("training begins", "first step")] == [0, 0]


def test_a_users_mistake_in_a_worker_is_raised_as_it_is_and_not_tried_again(make_job: Callable[..., TrainJob], tmp_path: Path) -> None:
    optim = {"learning_rate": 1e30, "max_grad_norm": None, "schedule": {"kind": "constant", "warmup_ratio": 0.0}}
    records: list[Record] = []
    with pytest.raises(DanluError, match=r"^optim.learning_rate: the loss of step \d+ is .* has diverged\n  try: a lower learning rate"):
        driver.fit(make_job("diverged", workers={"num_workers": 1}, optim=optim, max_failures=1), str(tmp_path), records.append)
    assert [record.step for record in records if isinstance(record, StepRecord)] == [1]


def test_more_workers_than_the_cluster_has_cores_are_refused_before_any_starts(
    make_job: Callable[..., TrainJob], processes_named: Callable[[str], list[psutil.Process]], tmp_path: Path
) -> None:
    job = make_job("many", workers={"num_workers": 64}, micro_batch_size=1, global_batch_size=64)
    before = [process.pid for process in processes_named("ray::")]
    with pytest.raises(ResourceError, match=r"64 workers with 1 CPU each need 64; the Ray cluster has \d+\n  try: workers.num_workers="):
        driver.fit(job, str(tmp_path), lambda record: None)
    assert [process.pid for process in processes_named("ray::")] == before
    assert not list(tmp_path.iterdir())
