"""What a coroutine wants done on the engine's thread, between two steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from danlu.errors import DanluError


@dataclass(frozen=True)
class Command:
    """Something to be done between two steps, for a coroutine that waits for it."""

    run: Callable[[], bool]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]

    def has_run(self) -> bool:
        """Try; False if it has to be tried again behind the next step."""
        try:
            if not self.run():
                return False
        except DanluError as error:
            self.fail(error)
            return True
        self._settle(lambda: self.done.set_result(None))
        return True

    def fail(self, error: Exception) -> None:
        self._settle(lambda: self.done.set_exception(error))

    def _settle(self, how: Callable[[], None]) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(lambda: None if self.done.done() else how())
