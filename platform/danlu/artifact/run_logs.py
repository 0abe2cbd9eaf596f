"""What a run's processes have written to stdout and stderr, kept with the run: the end of each one's, under `<run>/logs/`.

A pod's files go with it. Kept at checkpoints and at the end: of a process that is killed, what it wrote until its last checkpoint stays.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import PurePosixPath

from danlu.artifact.runs import RunFolder
from danlu.artifact.uris import filesystem_of
from danlu.errors import StorageError

LOGS = "logs"
LIMIT_BYTES = 1 << 20
"""Of one process, its last ones."""
CUT = "... {} bytes before this are not kept\n"
STREAMS = (1, 2)

log = logging.getLogger(__name__)


class RunLog:
    """The log of this process in a run. Only what goes to a file is kept: a terminal's is somebody's who reads it."""

    def __init__(self, run_uri: str, name: str) -> None:
        self.folder = RunFolder(f"{run_uri}/{LOGS}", 0)
        self.name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{name}.log"  # a process that goes on with the run does not write over it
        self.failed = False

    def keep(self) -> None:
        """Write what there is by now. A storage that does not take it is told once, and stops no training."""
        if self.failed or not (text := written(LIMIT_BYTES)):
            return
        try:
            self.folder.write(self.name, text)
        except StorageError as error:
            self.failed = True
            log.warning("the log is not kept: %s", error)


def written(limit_bytes: int) -> str:
    """The end of what this process has written to its streams, as far as they are files."""
    files: dict[tuple[int, int], tuple[int, int]] = {}
    for stream in STREAMS:
        try:
            found = os.fstat(stream)
        except OSError:  # it was started without one
            continue
        # A file without a name is somebody's who keeps it for a moment, as pytest does.
        if stat.S_ISREG(found.st_mode) and found.st_nlink:
            files[found.st_dev, found.st_ino] = stream, found.st_size
    return "".join(_tail(stream, size, limit_bytes // len(files)) for stream, size in files.values())


def kept_logs(run_uri: str) -> list[str]:
    """Names of the logs that a run has, the oldest first."""
    filesystem, path = filesystem_of(f"{run_uri}/{LOGS}")
    try:
        names = [PurePosixPath(file).name for file in filesystem.ls(path, detail=False)]
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name.endswith(".log"))


def kept_lines(run_uri: str) -> Iterator[str]:
    """The lines of all of them, each log under its name, as tail(1) shows several files."""
    folder = RunFolder(f"{run_uri}/{LOGS}", 0)
    for name in kept_logs(run_uri):
        yield f"==> {name} <=="
        yield from (folder.read(name) or "").splitlines()


def _tail(stream: int, size: int, limit_bytes: int) -> str:
    room = limit_bytes - len(CUT) - 20
    # Opened anew: the process goes on writing where it is.
    with open(f"/dev/fd/{stream}", "rb") as file:
        start = max(0, size - room)
        file.seek(start)
        data = file.read(room)
    if start:
        left_out = start + data.find(b"\n") + 1
        data = CUT.format(left_out).encode() + data[left_out - start :]
    text = data.decode(errors="replace")
    return text if not text or text.endswith("\n") else f"{text}\n"
