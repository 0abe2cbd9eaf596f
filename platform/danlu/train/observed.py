"""What a training process says of itself: a log line for each event, and spans from its rows to its first step."""

from __future__ import annotations

import logging
import time
from pathlib import PurePosixPath

import torch

from danlu import traces
from danlu.artifact.run_logs import RunLog
from danlu.train.run import EvalRecord, EventRecord, Record, Run, StartRecord, StepRecord

log = logging.getLogger("danlu.train")


class Observed:
    """A run, whose records of rank 0 become lines and spans on their way. A step is no line: the run's records have them all."""

    def __init__(self, run: Run, log: RunLog | None = None) -> None:
        self.run, self.rank, self.world_size, self.device = run, run.rank, run.world_size, run.device
        self.last = time.perf_counter()
        self.stepped = False
        self.log = log

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        return self.run.all_sum(tensor)

    def report(self, record: Record) -> None:
        """Tell the driver; only rank 0 is heard."""
        match record:
            case StepRecord():
                if not self.stepped:
                    self._first(record)
            case StartRecord():
                self._span("model", {"danlu.step": record.step})
                told = {"step": record.step, "num_steps": record.num_steps, "world_size": record.world_size, "device": record.device}
                log.info("training begins", extra={"about": told})
            case EvalRecord() if self.rank == 0:
                log.info("evaluated", extra={"about": {"step": record.step, **record.metrics, "is_best": record.is_best}})
            case EventRecord() if self.rank == 0:
                log.info("%s", record.event, extra={"about": {"step": record.step, "detail": record.detail}})
        if self.log is not None and isinstance(record, EventRecord) and record.event == "checkpoint":
            self.log.keep()
        self.run.report(record)

    def _first(self, record: StepRecord) -> None:
        self.stepped = True
        if self.rank == 0:
            self._span("first step", {"danlu.step": record.step})
            log.info("first step", extra={"about": {"step": record.step, "loss": record.loss}})

    def _span(self, name: str, attributes: traces.Attributes) -> None:
        """What was done since the last one."""
        now = time.perf_counter()
        traces.add(name, self.last, now, attributes)
        self.last = now


def run_id(run_uri: str) -> str:
    """A run's number, as its folder is called."""
    return PurePosixPath(run_uri).name
