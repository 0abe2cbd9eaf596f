"""A step that does not come back must not leave everybody waiting: the watch over an engine's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from danlu.errors import ResourceError


class Watchdog:
    """An engine's thread says `begin` when a step begins (and when it has moved on within a long one) and `end` when it has ended."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.began: float | None = None

    def begin(self) -> None:
        self.began = time.monotonic()

    def end(self) -> None:
        self.began = None

    @property
    def is_stuck(self) -> bool:
        began = self.began  # the other thread may take it away
        return began is not None and time.monotonic() - began > self.timeout_s

    def check(self) -> None:
        """ResourceError if a step has not come back."""
        if self.is_stuck:
            raise ResourceError(f"the engine's step has taken longer than step_timeout_s={self.timeout_s:g}")

    async def watch(self, on_stuck: Callable[[BaseException], None]) -> None:
        """Until a step is stuck: then `on_stuck` is told, once."""
        while not self.is_stuck:
            await asyncio.sleep(min(1.0, self.timeout_s / 4))
        on_stuck(TimeoutError(f"a step has taken longer than step_timeout_s={self.timeout_s:g}"))
