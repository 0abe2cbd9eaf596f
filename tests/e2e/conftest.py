"""What the tests of the whole program share: a `danlu` of its own whose every process is known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

DEADLINE_S = 400.0


class Danlu:
    """A running `danlu`, as started from a shell: its output line by line, and every process of its tree."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.mark = f"DANLU_TEST_RUN={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "danlu"), *arguments],
            cwd=cwd,
            env={**os.environ, name: value, "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.tree: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str) -> str:
        """The first line with a text in it."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None and not self.reader.is_alive()
            if found := next((line for line in self.lines if text in line), None):
                return found
            assert not ended, f"ended without {text!r}:\n{self.output}"
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} within {DEADLINE_S:g} s:\n{self.output}")

    def press_ctrl_c(self) -> None:
        """SIGINT to the whole foreground process group, as a terminal sends it."""
        self.look()
        os.killpg(self.process.pid, signal.SIGINT)

    def look(self) -> list[str]:
        """Remember every process there is now; their names."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self.tree[process.pid] = process
        return [_name(process) for process in self.tree.values()]

    def exit_code(self) -> int:
        code = self.process.wait(DEADLINE_S)
        self.reader.join(DEADLINE_S)
        return code

    def left_behind(self) -> list[str]:
        """Processes of this run that live on: those seen in its tree, and whatever carries its mark, wherever it went."""
        alive = [process for process in self.tree.values() if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        for process in psutil.process_iter():
            try:
                marked = self.mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
            except OSError:
                continue
            if marked and process not in alive:
                alive.append(process)
        return [f"{process.pid} {_name(process)}" for process in alive]

    def end(self) -> None:
        """Whatever is still there, when a test has failed."""
        if self.process.poll() is None:
            self.look()
            self.process.kill()
            for process in self.tree.values():
                if process.is_running():
                    process.kill()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return "?"


@pytest.fixture
def danlu(tmp_path: Path) -> Callable[..., Any]:
    """`with danlu("train", "job.yaml") as run:` starts it in the test's folder and ends it at the latest with the block."""

    @contextmanager
    def start(*arguments: str, cwd: Path = tmp_path) -> Iterator[Danlu]:
        run = Danlu(*arguments, cwd=cwd)
        try:
            yield run
        finally:
            run.end()

    return start
