"""A child process from its start to its end: its log lines, how it ended, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger("danlu.serve.vllm")

KEEPER = Path(__file__).with_name("keeper.py")
GRACE_S = 15.0
"""Between asking the process to end and killing it."""
TOLD_LINES = 12
"""Of its log, in an error."""


class Child:
    """A running process. `command` is made with the private folder that it runs in; `on_end` is called on the event loop's thread."""

    def __init__(
        self,
        command: Callable[[Path], Sequence[str]],
        environment: Mapping[str, str],
        on_end: Callable[[], None],
        *,
        grace_s: float = GRACE_S,
    ) -> None:
        self.loop, self.on_end, self.grace_s = asyncio.get_running_loop(), on_end, grace_s
        self.ended = asyncio.Event()
        self.returncode: int | None = None
        self.lines: deque[str] = deque(maxlen=200)
        self.folder = Path(tempfile.mkdtemp(prefix="danlu-vllm-"))  # 0700
        self.pid_file = self.folder / "pid"
        keeper = [sys.executable, "-I", str(KEEPER), str(grace_s), str(self.pid_file)]
        self.process = subprocess.Popen(
            [*keeper, *command(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=self.folder,
        )
        self.reader = threading.Thread(target=self._read, name="danlu-vllm-log", daemon=True)
        self.reader.start()
        threading.Thread(target=self._wait, name="danlu-vllm-wait", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        return self.returncode is None

    def how_it_ended(self) -> str:
        """In a line, with the last ones of its log."""
        code = self.returncode
        signalled = code is not None and (-code if code < 0 else max(0, code - 128))  # the keeper's own end, or what the keeper says
        how = "runs" if code is None else f"was ended by signal {signalled}" if signalled else f"has ended with code {code}"
        told = " | ".join(list(self.lines)[-TOLD_LINES:])
        return f"vLLM {how}; its last lines: {told}" if told else f"vLLM {how} and has said nothing"

    async def stop(self) -> None:
        """Ask it to end, and see it ended."""
        if self.process.stdin is not None:
            self.process.stdin.close()  # the keeper's sign
        try:
            await asyncio.wait_for(self.ended.wait(), self.grace_s + 10)
        except TimeoutError:
            self.process.kill()
            await self.ended.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode("utf-8", "replace").rstrip()
            if line:
                self.lines.append(line[:500])
                log.info("%s", line)

    def _wait(self) -> None:
        code = self.process.wait()
        # The keeper may have been killed itself: then what it kept is still there.
        with contextlib.suppress(OSError, ValueError):
            os.killpg(int(self.pid_file.read_text()), signal.SIGKILL)
        self.reader.join(5)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self._told, code)

    def _told(self, code: int) -> None:
        self.returncode = code
        self.ended.set()
        self.on_end()
