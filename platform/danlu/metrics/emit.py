"""Catalogue entries as live metrics on Ray's metrics port. Values are gathered in process and handed to Ray once a second."""

from __future__ import annotations

import atexit
import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import ray
from ray.util import metrics as ray_metrics

from danlu.metrics import catalog
from danlu.metrics.catalog import Metric

FLUSH_S = 1.0


class _Emitter:
    """Ray's own record() takes tens of microseconds, too much for the path of a request: there it is one append."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sums: defaultdict[tuple[Metric, tuple[str, ...]], float] = defaultdict(float)
        self.last: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self.observed: defaultdict[tuple[Metric, tuple[str, ...]], list[float]] = defaultdict(list)
        self.live: dict[str, Any] = {}
        self.thread: threading.Thread | None = None

    def add(self, metric: Metric, value: float, labels: tuple[str, ...]) -> None:
        with self.lock:
            match metric.kind:
                case "counter":
                    if value:  # Ray refuses to count nothing, and the thread that hands over would end with that
                        self.sums[metric, labels] += value
                case "gauge":
                    self.last[metric, labels] = value
                case "histogram":
                    self.observed[metric, labels].append(value)
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="danlu-metrics", daemon=True)
                self.thread.start()
                atexit.register(self.flush)

    def flush(self) -> None:
        with self.lock:
            sums, self.sums = self.sums, defaultdict(float)
            last, self.last = self.last, {}
            observed, self.observed = self.observed, defaultdict(list)
        if not ray.is_initialized():
            return
        for (metric, labels), value in sums.items():
            self._live(metric).inc(value, tags=dict(zip(metric.labels, labels, strict=True)))
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


def emit_training(job: str, record: Mapping[str, Any]) -> None:
    """The metrics of one training record (see danlu.train.run)."""
    match record["kind"]:
        case "step":
            emit(catalog.TRAIN_LOSS, record["loss"], job=job)
            emit(catalog.TRAIN_LEARNING_RATE, record["learning_rate"], job=job)
            emit(catalog.TRAIN_GRAD_NORM, record["grad_norm"], job=job)
            emit(catalog.TRAIN_STEP, record["step"], job=job)
            emit(catalog.TRAIN_TOKENS, record["tokens"], job=job)
            emit(catalog.TRAIN_TOKENS_PER_SECOND, record["tokens_per_second"], job=job)
            emit(catalog.TRAIN_STEP_SECONDS, record["step_seconds"], job=job)
            emit(catalog.TRAIN_ETA, record["eta_s"], job=job)
        case "eval":
            for name, value in record["metrics"].items():
                emit(catalog.TRAIN_EVAL, value, job=job, metric=name)
        case "event" if record["event"] == "checkpoint":
            emit(catalog.TRAIN_CHECKPOINT_SECONDS, record["seconds"], job=job)
        case "event" if record["event"] == "resumed":
            emit(catalog.TRAIN_RESUMED, 1, job=job)
