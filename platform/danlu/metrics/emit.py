"""Catalogue entries as live metrics on Ray's metrics port. Values are gathered in process and handed to Ray once a second."""

from __future__ import annotations

import atexit
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.util import metrics as ray_metrics

from danlu.errors import DivergedError, ResourceError
from danlu.metrics.catalog import Metric
from danlu.metrics.training import Budget, Sample, TrainingMeter

FLUSH_S = 1.0
REFRESH_S = 5.0
"""Ray forgets a gauge that is not set again within seconds: a job that stands still would vanish instead of alarming somebody."""
OTHER = "other"
ZERO = 1e-12
"""Ray's counters refuse 0, and a counter that begins with its first event shows Prometheus no increase."""


class _Emitter:
    """Ray's own record() takes tens of microseconds, too much for the path of a request: there it is one append."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sums: defaultdict[tuple[Metric, tuple[str, ...]], float] = defaultdict(float)
        self.last: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self.observed: defaultdict[tuple[Metric, tuple[str, ...]], list[float]] = defaultdict(list)
        self.current: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self.refreshed = 0.0
        self.live: dict[str, Any] = {}
        self.begun: set[tuple[Metric, tuple[str, ...]]] = set()
        self.values: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self.known: set[tuple[Metric, tuple[str, ...]]] = set()
        self.thread: threading.Thread | None = None

    def add(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        with self.lock:
            if (metric, labels) not in self.known:
                labels = self._bounded(metric, labels)
            if metric.kind == "gauge" and OTHER in labels:
                return  # the last of many values would stand for all of them
            match metric.kind:
                case "counter":
                    self.sums[metric, labels] += value
                case "gauge":
                    self.last[metric, labels] = value
                case "histogram":
                    self.observed[metric, labels].append(value)
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="danlu-metrics", daemon=True)
                self.thread.start()
                atexit.register(self.flush)

    def _bounded(self, metric: Metric, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The labels with OTHER for values that are too many."""
        found = tuple(self._value(metric, name, value) for name, value in zip(metric.labels, labels, strict=True))
        if found == labels:
            self.known.add((metric, labels))
        return found

    def _value(self, metric: Metric, label: str, value: str) -> str:
        known = self.values[metric.name, label]
        if value in known:
            return value
        if len(known) >= metric.max_values:
            return OTHER
        known.add(value)
        return value

    def flush(self) -> None:
        with self.lock:
            sums, self.sums = self.sums, defaultdict(float)
            last, self.last = self.last, {}
            observed, self.observed = self.observed, defaultdict(list)
        if not ray.is_initialized():
            return
        for (metric, labels), value in sums.items():
            if value == 0 and (metric, labels) in self.begun:
                continue
            self.begun.add((metric, labels))
            self._live(metric).inc(value or ZERO, tags=dict(zip(metric.labels, labels, strict=True)))
        self.current |= last
        if time.monotonic() - self.refreshed > REFRESH_S:
            self.refreshed, last = time.monotonic(), dict(self.current)
        for (metric, labels), value in last.items():
            self._live(metric).set(value, tags=dict(zip(metric.labels, labels, strict=True)))
        for (metric, labels), values in observed.items():
            histogram, tags = self._live(metric), dict(zip(metric.labels, labels, strict=True))
            for value in values:
                histogram.observe(value, tags=tags)

    def _run(self) -> None:
        while True:
            threading.Event().wait(FLUSH_S)
            self.flush()

    def _live(self, metric: Metric) -> Any:
        if metric.name not in self.live:
            match metric.kind:
                case "counter":
                    self.live[metric.name] = ray_metrics.Counter(metric.name, metric.help, metric.labels)
                case "gauge":
                    self.live[metric.name] = ray_metrics.Gauge(metric.name, metric.help, metric.labels)
                case "histogram":
                    self.live[metric.name] = ray_metrics.Histogram(metric.name, metric.help, list(metric.buckets), metric.labels)
        return self.live[metric.name]


_emitter = _Emitter()


def emit(metric: Metric, value: float, /, **labels: str) -> None:
    """Count, set or observe a value. ValueError if the labels are not exactly the catalogue's."""
    if tuple(labels) != metric.labels:
        if set(labels) != set(metric.labels):
            raise ValueError(f"{metric.name} has the labels {metric.labels}, not {tuple(labels)}")
        labels = {name: labels[name] for name in metric.labels}
    _emitter.add(metric, value, tuple(labels.values()))


def flush() -> None:
    """Hand everything gathered so far to Ray now."""
    _emitter.flush()


@contextmanager
def training(train_job: str, budget: Budget | None = None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """While the block trains: give each record (see danlu.train.run) to what this yields, and the job's metrics are there."""
    meter = TrainingMeter(train_job, budget)

    def send(samples: list[Sample]) -> None:
        for metric, value, labels in samples:
            emit(metric, value, **labels)

    send(meter.begin(time.monotonic(), time.time()))
    failure = ""
    try:
        yield lambda record: send(meter.hear(record, time.monotonic(), time.time()))
    except BaseException as error:
        failure = _failure(error)
        raise
    finally:
        send(meter.end(time.monotonic(), failure))
        flush()


def _failure(error: BaseException) -> str:
    match error:
        case DivergedError():
            return "diverged"
        case ResourceError():
            return "worker_lost"
        case KeyboardInterrupt():
            return "interrupted"
    return "error"
