"""What is counted of a training job: each second once, replayed work as lost, restarts by their reason."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from danlu.metrics import catalog as c
from danlu.metrics.prices import USD_PER_HOUR, accelerator, usd_per_hour
from danlu.metrics.training import Budget, Sample, TrainingMeter, spent

START: dict[str, Any] = {
    "kind": "start", "step": 0, "num_steps": 100, "save_steps": 10, "world_size": 2, "threads_per_worker": 3, "device": "cpu",
    "flops_per_token": 6e6, "peak_flops": 1e9, "peak_source": "measured",
}  # fmt: skip


def step(number: int, seconds: float = 1.0, loss: float = 1.0) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 50, "tokens_per_second": 100.0,
        "step_seconds": seconds, "eta_s": 9.0, "examples": 8, "loss_scale": None, "skipped": False, "phases": {"forward": seconds / 2},
    }  # fmt: skip


class Job:
    """A meter under a clock of its own."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.meter, self.now = TrainingMeter("a", budget), 100.0
        self.totals: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.take(self.meter.begin(self.now, 0.0))

    def take(self, samples: list[Sample]) -> None:
        for metric, value, labels in samples:
            assert set(labels) == set(metric.labels)
            key = (metric.name, *(labels[name] for name in metric.labels if name != "train_job"))
            self.totals[key] = self.totals[key] + value if metric.kind == "counter" else value

    def hear(self, record: dict[str, Any], after: float) -> None:
        self.now += after
        self.take(self.meter.hear(record, self.now, self.now))

    def spent(self) -> dict[str, float]:
        return {key[1]: value for key, value in self.totals.items() if key[0] == c.TRAIN_WALL_SECONDS.name and value}

    def __getitem__(self, key: tuple[str, ...]) -> float:
        return self.totals[key]


def test_a_restart_costs_its_time_and_the_steps_that_are_done_again() -> None:
    job = Job()
    job.hear(START, after=20.0)
    for number in range(1, 16):
        job.hear(step(number), after=1.0)
        if number == 10:
            job.hear({"kind": "event", "event": "checkpoint", "seconds": 2.0, "bytes": 4096}, after=2.0)
    job.hear({"kind": "event", "event": "failure", "detail": "worker_lost"}, after=3.0)
    job.hear(START | {"step": 10}, after=7.0)
    for number in range(11, 21):
        job.hear(step(number), after=1.0)
    job.take(job.meter.end(job.now))

    assert job.spent() == {"startup": 20.0, "step": 20.0, "checkpoint": 2.0, "restart": 7.0, "replay": 5.0, "other": 3.0}
    assert sum(job.spent().values()) == job.now - 100.0
    assert job[c.TRAIN_GOODPUT.name,] == pytest.approx(20.0 / 57.0)
    assert job[c.TRAIN_TOKENS.name,] == 25 * 50
    assert job[c.TRAIN_TOKENS_LOST.name,] == 5 * 50
    assert job[c.TRAIN_EXAMPLES.name,] == 25 * 8
    assert {key[1]: value for key, value in job.totals.items() if key[0] == c.TRAIN_RESTARTS.name and value} == {"worker_lost": 1}
    assert job[c.TRAIN_CHECKPOINT_TIME.name,] == 100.0 + 20 + 10 + 2
    assert job[c.TRAIN_RUNNING.name,] == 0


def test_a_step_that_stood_still_counts_as_a_stall_and_one_that_is_only_slow_does_not() -> None:
    job = Job()
    job.hear(START, after=1.0)
    for number in range(1, 11):
        job.hear(step(number), after=1.0)
    job.hear(step(11, seconds=4.0), after=4.0)
    job.hear(step(12, seconds=61.0), after=61.0)
    assert job.spent() == {"startup": 1.0, "step": 15.0, "stall": 60.0}


def test_mfu_is_model_flops_over_the_peak_of_all_workers() -> None:
    job = Job()
    job.hear(START, after=1.0)
    job.hear(step(1), after=1.0)
    assert job[c.TRAIN_MFU.name,] == pytest.approx(100.0 * 6e6 / (2 * 1e9))
    assert job[c.TRAIN_CHECKPOINT_INTERVAL.name,] == 10.0


def test_the_slowest_rank_is_told_against_the_median_one() -> None:
    job = Job()
    job.hear({"kind": "ranks", "step": 10, "own_seconds": [1.0, 1.0, 2.5], "memory_bytes": [1, 2, 3]}, after=1.0)
    assert job[c.TRAIN_STRAGGLING.name,] == 2.5
    assert job[c.TRAIN_MEMORY.name, "2"] == 3
    job.hear({"kind": "ranks", "step": 20, "own_seconds": [1.0, 3.0], "memory_bytes": [1, 2]}, after=1.0)
    assert job[c.TRAIN_STRAGGLING.name,] == 3.0, "of two ranks the faster one is the measure"


def test_devices_are_paid_from_the_start_on_whatever_they_do() -> None:
    job = Job()
    job.hear(START, after=50.0)
    job.hear(step(1), after=3600.0)
    seconds = 3650.0 * 2 * 3
    assert job[c.TRAIN_DEVICE_SECONDS.name, "cpu"] == pytest.approx(seconds)
    assert job[c.TRAIN_COST.name,] == pytest.approx(seconds / 3600 * USD_PER_HOUR["cpu"])
    unknown = Job()
    unknown.hear(START | {"device": "Abacus 3000"}, after=10.0)
    assert unknown[c.TRAIN_DEVICE_SECONDS.name, "Abacus 3000"] == 20.0
    assert (c.TRAIN_COST.name,) not in unknown.totals, "a device without a price costs an unknown sum, not nothing"


def test_the_first_failure_of_a_job_is_an_increase() -> None:
    job = Job()
    assert (c.TRAIN_FAILURES.name, "diverged") in job.totals
    job.take(job.meter.end(200.0, "diverged"))
    assert job[c.TRAIN_FAILURES.name, "diverged"] == 1


def test_a_budget_counts_every_attempt_of_a_run() -> None:
    an_hour = 6 * USD_PER_HOUR["cpu"]
    # Half an hour, of which 20 minutes were lost; ten minutes of nobody; a quarter of an hour.
    times = [(START, 0.0), (step(1), 600.0), (step(2), 1800.0), (START | {"step": 1}, 2400.0), (step(2), 3300.0)]
    before = spent([record | {"time": when} for record, when in times])
    assert before == pytest.approx(0.75 * an_hour)
    assert spent([]) == 0.0
    job = Job(Budget(usd=2 * an_hour, spent=before))
    job.hear(START | {"step": 2}, after=60.0)
    job.hear(step(3), after=3600.0)
    # The start record is from the end of the start: its minute is paid as well.
    assert job[c.TRAIN_BUDGET_USED.name,] == pytest.approx((0.75 + 61 / 60) / 2)
    assert job[c.TRAIN_BUDGET.name,] == 2 * an_hour
    unpriced = Job(Budget(1.0))
    unpriced.hear(START | {"device": "abacus"}, after=1.0)
    assert (c.TRAIN_BUDGET_USED.name,) not in unpriced.totals


def test_a_gpu_has_its_price_by_the_name_that_cuda_or_ray_has_for_it() -> None:
    assert (
        usd_per_hour("NVIDIA H100 80GB HBM3") == usd_per_hour(accelerator(["CPU", "accelerator_type:H100", "GPU"])) == USD_PER_HOUR["H100"]
    )
    assert usd_per_hour("A10G") == USD_PER_HOUR["A10"] != usd_per_hour("A100-SXM4-40GB")
    assert accelerator(["CPU", "GPU", "node:10.0.0.1"]) == "gpu"
    assert usd_per_hour("gpu") is None
