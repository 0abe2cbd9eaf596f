"""How much is worked on at once: who gets in, who is told to come back and when."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from danlu.errors import RequestError
from danlu.metrics import catalog
from danlu.serve.keys import Key
from danlu.spec.serve import Limits


class Admission:
    """Counts what is in flight in a replica; `count(metric, value)` shows it."""

    def __init__(self, limits: Limits, count: Callable[..., None]) -> None:
        self.limits, self.count = limits, count
        self.in_flight, self.draining = 0, False
        self.recent_seconds = 0.05
        self.of_key: Counter[str] = Counter()

    @contextmanager
    def room_for(self, number: int, key: Key | None = None) -> Iterator[None]:
        """Room for that many answers while the block runs; RequestError with Retry-After if there is none."""
        self._check(number, key)
        began, name = time.perf_counter(), key.name if key else ""
        self._change(number, name)
        try:
            yield
            self.recent_seconds = 0.9 * self.recent_seconds + 0.1 * (time.perf_counter() - began)
        finally:
            self._change(-number, name)

    def _check(self, number: int, key: Key | None) -> None:
        room = self.limits.max_ongoing_requests + self.limits.max_queued_requests
        if key is not None and key.max_ongoing_requests and number > key.max_ongoing_requests:
            raise RequestError(
                f"{number} answers in one request; the key {key.name!r} may have {key.max_ongoing_requests} at once",
                param="n",
                fix=f"{key.max_ongoing_requests} at a time",
            )
        if key is not None and key.max_ongoing_requests and self.of_key[key.name] + number > key.max_ongoing_requests:
            raise RequestError(
                f"the key {key.name!r} has {self.of_key[key.name]} requests in flight; {key.max_ongoing_requests} are allowed at once",
                status=429,
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=max(1, math.ceil(self.recent_seconds)),
                fix="again after Retry-After seconds",
            )
        if self.in_flight >= room or self.draining:
            raise RequestError(
                "draining" if self.draining else f"{self.in_flight} requests are being worked on and waiting, no more fit",
                status=503,
                kind="server_error",
                retry_after_s=max(1, math.ceil(self.recent_seconds * self.in_flight / self.limits.max_ongoing_requests)),
                fix="again after Retry-After seconds",
            )

    def _change(self, number: int, name: str) -> None:
        self.in_flight += number
        self.of_key[name] += number
        if not self.of_key[name]:
            del self.of_key[name]
        self.count(catalog.SERVE_IN_FLIGHT, self.in_flight)
