"""How long a rank stands still for other ranks' tensors: exposed communication. What passes while it computes is not counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Exchange:
    """A stopwatch that strategies run while there is nothing to compute; `Phases` takes its seconds out of the phase they fell in.

    On a GPU its time is that of the stream which computes, and counts in steps where `measuring` only: the host has to wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.measuring = False
        self.seconds = 0.0
        self.since = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What the block does is waiting, but for what is `computing` in it."""
        self.since = self.now()
        try:
            yield
        finally:
            self.waited_since(self.since)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A part of `waiting` that is none."""
        self.waited_since(self.since)
        try:
            yield
        finally:
            self.since = self.now()

    def waited_since(self, began: float) -> None:
        """All since `began`, a time of `now`, was waiting."""
        self.seconds += self.now() - began

    def take(self) -> float:
        """The seconds since the last call."""
        found, self.seconds = self.seconds, 0.0
        return found

    def now(self) -> float:
        """Seconds of a clock, when what has been given to the device is computed."""
        if self.measuring and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()
