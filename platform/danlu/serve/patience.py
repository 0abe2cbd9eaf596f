"""A bound for each of many waits in a row, at the cost of one timer."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Patience:
    """An async context that ends with TimeoutError when one wait inside lasts `seconds`: from `begin` to the next `begin`, or to `end`.

    A stream has thousands of waits, nearly all of them short. asyncio.timeout sets a timer for each; here there is one, which looks how
    long the wait of that moment has lasted and goes off again when it would be too long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.loop = asyncio.get_running_loop()
        self.bound = asyncio.timeout(None)
        self.since: float | None = None
        self.timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self.since = self.loop.time()

    def end(self) -> None:
        self.since = None

    @property
    def is_over(self) -> bool:
        """Whether the TimeoutError is its own, and not one that was raised inside."""
        return self.bound.expired()

    async def __aenter__(self) -> Patience:
        await self.bound.__aenter__()
        self._look_at(self.loop.time() + self.seconds)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        assert self.timer is not None
        self.timer.cancel()
        await self.bound.__aexit__(kind, error, traceback)

    def _look_at(self, when: float) -> None:
        self.timer = self.loop.call_at(when, self._look)

    def _look(self) -> None:
        now = self.loop.time()
        if self.since is None:
            self._look_at(now + self.seconds)
        elif now < self.since + self.seconds:
            self._look_at(self.since + self.seconds)
        else:
            self.bound.reschedule(now)
