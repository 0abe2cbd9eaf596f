"""A training job's records -> the numbers that are shown of it. Pure: what is counted can be tested without a cluster.

It lives beside the one who ordered the training, not in a worker: a counter there goes on over restarts, and a gauge of a worker that hangs
or was lost is still there to alarm somebody.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.metrics.prices import usd_per_hour

ACTIVITIES = ("startup", "step", "stall", "replay", "evaluation", "checkpoint", "restart", "other")
RESTART_REASONS = ("worker_lost", "out_of_memory", "error", "started_again")
FAILURE_REASONS = ("diverged", "worker_lost", "error", "interrupted")
STALL = 10.0
"""A step of more than so many times the median of the last ones, and of more than a second over it, stood still in between."""
OTHER_AFTER_S = 2.0
"""Records arrive late by less than this; what is unexplained for longer is `other`."""

Sample = tuple[Metric, float, dict[str, str]]


@dataclass(frozen=True)
class Budget:
    """What a run may cost, and what its earlier attempts have cost."""

    usd: float
    spent: float = 0.0


def spent(records: Iterable[Mapping[str, Any]]) -> float:
    """What a run has cost by its records, in the order of time: its devices from each start to the last that was heard of it."""
    cost, attempt, began, last = 0.0, None, 0.0, 0.0
    for record in [*records, None]:
        if record is None or record["kind"] == "start":
            if attempt is not None:
                cost += (last - began) * _usd_per_second(attempt)
            if record is not None:
                attempt, began = record, record["time"]
        last = 0.0 if record is None else record["time"]
    return cost


@dataclass
class TrainingMeter:
    """`begin`, then `hear` each record (see danlu.train.run), then `end`; each gives what to emit. Times in seconds."""

    train_job: str
    budget: Budget | None = None
    cost: float = 0.0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))
    began: float = 0.0
    heard: float = 0.0
    highest: int = 0
    started: Mapping[str, Any] | None = None
    failure: str = ""
    best: float = float("inf")
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    charged: float = 0.0

    def begin(self, now: float, unix_time: float) -> list[Sample]:
        """Counters start at 0, so that their first increase is one."""
        self.began = self.heard = self.charged = now
        return [
            self._one(catalog.TRAIN_RUNNING, 1),
            self._one(catalog.TRAIN_CHECKPOINT_TIME, unix_time),
            self._one(catalog.TRAIN_TOKENS_LOST, 0),
            *(self._one(catalog.TRAIN_RESTARTS, 0, reason=reason) for reason in RESTART_REASONS),
            *(self._one(catalog.TRAIN_FAILURES, 0, reason=reason) for reason in FAILURE_REASONS),
            *(self._one(catalog.TRAIN_WALL_SECONDS, 0, activity=activity) for activity in ACTIVITIES),
        ]

    def hear(self, record: Mapping[str, Any], now: float, unix_time: float) -> list[Sample]:
        """What a record changes."""
        match record["kind"]:
            case "start":
                found = self._start(record, now)
            case "step":
                found = self._step(record)
            case "ranks":
                found = self._ranks(record)
            case "eval":
                found = [self._one(catalog.TRAIN_EVAL, value, metric=name) for name, value in record["metrics"].items()]
                found += self._spend("evaluation", record["seconds"])
            case "event" if record["event"] == "checkpoint":
                found = [
                    self._one(catalog.TRAIN_CHECKPOINT_SECONDS, record["seconds"]),
                    self._one(catalog.TRAIN_CHECKPOINT_BYTES, record["bytes"]),
                    self._one(catalog.TRAIN_CHECKPOINT_TIME, unix_time),
                    *self._spend("checkpoint", record["seconds"]),
                ]
            case "event" if record["event"] == "failure":
                self.failure, found = record["detail"], []
            case _:
                found = []
        self.heard = now
        return found + self._rest(now) + self._charge(now)

    def end(self, now: float, failure: str = "") -> list[Sample]:
        """The job is over; `failure` is one of FAILURE_REASONS, or empty."""
        failed = [self._one(catalog.TRAIN_FAILURES, 1, reason=failure)] if failure else []
        return [self._one(catalog.TRAIN_RUNNING, 0), *failed, *self._rest(now, after=0.0), *self._charge(now)]

    def _start(self, record: Mapping[str, Any], now: float) -> list[Sample]:
        again = self.started is not None
        waited = now - self.heard if again else now - self.began
        reason = (self.failure or "error") if again else ("started_again" if record["step"] else "")
        if not again:
            self.highest = record["step"]
        self.started, self.failure = record, ""
        self.step_seconds.clear()
        return [
            self._one(catalog.TRAIN_STEP, record["step"]),
            self._one(catalog.TRAIN_NUM_STEPS, record["num_steps"]),
            self._one(catalog.TRAIN_PEAK_FLOPS, record["peak_flops"], source=record["peak_source"]),
            *([self._one(catalog.TRAIN_RESTARTS, 1, reason=reason)] if reason else []),
            *self._spend("restart" if again else "startup", waited),
        ]

    def _step(self, record: Mapping[str, Any]) -> list[Sample]:
        seconds, replayed = record["step_seconds"], record["step"] <= self.highest
        usual = statistics.median(self.step_seconds) if len(self.step_seconds) >= 5 else seconds
        stalled = seconds - usual if seconds > STALL * usual and seconds > usual + 1.0 else 0.0
        self.step_seconds.append(seconds - stalled)
        self.highest = max(self.highest, record["step"])
        self.losses.append(record["loss"])
        if len(self.losses) == self.losses.maxlen:
            self.best = min(self.best, statistics.fmean(self.losses))
        found = [
            self._one(catalog.TRAIN_LOSS, record["loss"]),
            self._one(catalog.TRAIN_BEST_LOSS, min(self.best, max(self.losses))),
            self._one(catalog.TRAIN_LEARNING_RATE, record["learning_rate"]),
            *([] if record["skipped"] else [self._one(catalog.TRAIN_GRAD_NORM, record["grad_norm"])]),
            self._one(catalog.TRAIN_STEP, record["step"]),
            self._one(catalog.TRAIN_TOKENS, record["tokens"]),
            self._one(catalog.TRAIN_EXAMPLES, record["examples"]),
            self._one(catalog.TRAIN_TOKENS_PER_SECOND, record["tokens_per_second"]),
            self._one(catalog.TRAIN_STEP_SECONDS, seconds),
            self._one(catalog.TRAIN_ETA, record["eta_s"]),
            *self._scaled(record),
            *(self._one(catalog.TRAIN_PHASE_SECONDS, spent, phase=phase) for phase, spent in record["phases"].items()),
            *self._spend("replay" if replayed else "step", seconds - stalled),
            *(self._spend("stall", stalled) if stalled else []),
        ]
        if replayed:
            found.append(self._one(catalog.TRAIN_TOKENS_LOST, record["tokens"]))
        if self.started is not None:
            peak = self.started["peak_flops"] * self.started["world_size"]
            found.append(self._one(catalog.TRAIN_MFU, record["tokens_per_second"] * self.started["flops_per_token"] / peak))
            interval = self.started["save_steps"] * statistics.fmean(self.step_seconds)
            found.append(self._one(catalog.TRAIN_CHECKPOINT_INTERVAL, interval))
        return found

    def _scaled(self, record: Mapping[str, Any]) -> list[Sample]:
        if record["loss_scale"] is None:
            return []
        return [
            self._one(catalog.TRAIN_LOSS_SCALE, record["loss_scale"]),
            self._one(catalog.TRAIN_SKIPPED, float(record["skipped"])),
        ]

    def _ranks(self, record: Mapping[str, Any]) -> list[Sample]:
        own, memory = record["own_seconds"], record["memory_bytes"]
        return [
            *(self._one(catalog.TRAIN_RANK_SECONDS, seconds, rank=str(rank)) for rank, seconds in enumerate(own)),
            *(self._one(catalog.TRAIN_MEMORY, held, rank=str(rank)) for rank, held in enumerate(memory)),
            self._one(catalog.TRAIN_STRAGGLING, max(own) / max(statistics.median_low(own), 1e-9)),
        ]

    def _rest(self, now: float, after: float = OTHER_AFTER_S) -> list[Sample]:
        """Wall time that no record explained, and what share of all of it moved the model."""
        wall = now - self.began
        unexplained = wall - sum(self.spent.values())
        found = self._spend("other", unexplained) if self.started is not None and unexplained > after else []
        if wall > 0:
            found.append(self._one(catalog.TRAIN_GOODPUT, self.spent["step"] / max(wall, sum(self.spent.values()))))
        return found

    def _charge(self, now: float) -> list[Sample]:
        """Devices are paid from the first start on, whatever they do."""
        seconds, self.charged = now - self.charged, now
        if self.started is None:
            return []
        price = _usd_per_second(self.started)
        found = [self._one(catalog.TRAIN_DEVICE_SECONDS, seconds * _devices(self.started), device=self.started["device"])]
        if price:
            self.cost += seconds * price
            found.append(self._one(catalog.TRAIN_COST, seconds * price))
            if self.budget is not None:
                found.append(self._one(catalog.TRAIN_BUDGET, self.budget.usd))
                found.append(self._one(catalog.TRAIN_BUDGET_USED, (self.budget.spent + self.cost) / self.budget.usd))
        return found

    def _spend(self, activity: str, seconds: float) -> list[Sample]:
        self.spent[activity] += max(0.0, seconds)
        return [self._one(catalog.TRAIN_WALL_SECONDS, max(0.0, seconds), activity=activity)]

    def _one(self, metric: Metric, value: float, /, **labels: str) -> Sample:
        return metric, value, {"train_job": self.train_job, **labels}


def _devices(started: Mapping[str, Any]) -> int:
    """GPUs, or cores."""
    return int(started["world_size"] * (started["threads_per_worker"] if started["device"] == "cpu" else 1))


def _usd_per_second(started: Mapping[str, Any]) -> float:
    """Of all devices of a start record; 0 where the price table does not have them."""
    return _devices(started) * (usd_per_hour(started["device"]) or 0.0) / 3600
