"""The record of a run under the storage URI: its spec, its numbers, how it ended. Outlives the cluster it ran on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from danlu.artifact.uris import filesystem_of
from danlu.errors import ResourceError, StorageError

log = logging.getLogger(__name__)

SPEC, RECORDS, STATUS, REPORT, SCORES = "spec.yaml", "records.jsonl", "status.json", "report.html", "scores.json"
REMOTE_FLUSH_S = 10.0


@dataclass
class RunFolder:
    """`<storage>/runs/<name>/<number>/`."""

    uri: str
    number: int
    resumed: bool = False
    _lines: list[str] = field(default_factory=list)
    _flushed: float = 0.0

    def write(self, name: str, text: str) -> str:
        """Write a small file whole; its URI."""
        filesystem, path = filesystem_of(self.uri)
        try:
            filesystem.makedirs(path, exist_ok=True)
            if not isinstance(filesystem, LocalFileSystem):
                filesystem.pipe_file(f"{path}/{name}", text.encode())
            else:  # beside it first: a full disk or a killed process must not leave half a status
                partial = f"{path}/.{name}.{os.getpid()}"
                try:
                    filesystem.pipe_file(partial, text.encode())
                    os.replace(partial, f"{path}/{name}")
                finally:
                    Path(partial).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.uri, error) from error
        return f"{self.uri}/{name}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the block runs no other process of this machine writes the run; ResourceError if one does already.

        A file is locked, which ends with the process, whatever ends it. Object stores have no such thing.
        """
        filesystem, path = filesystem_of(self.uri)
        if not isinstance(filesystem, LocalFileSystem):
            yield
            return
        try:
            filesystem.makedirs(path, exist_ok=True)
            # One for each machine: a network's file system may hold a lock for a while after a machine has gone.
            lock = os.open(f"{path}/{_lock_name()}", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _cannot_write(self.uri, error) from error
        try:
            self._lock(lock)
            yield
        finally:
            os.close(lock)

    def is_held(self) -> bool:
        """Whether a process of this machine writes it now, by its lock."""
        filesystem, path = filesystem_of(self.uri)
        if not isinstance(filesystem, LocalFileSystem) or not os.path.exists(f"{path}/{_lock_name()}"):
            return False
        with open(f"{path}/{_lock_name()}", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a file system without locks
                return False
        return False

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(
                f"the process {self.status().get('pid', '')} of this machine trains it already",
                where=self.uri,
                fix="wait for its end, or --fresh: a run of its own",
            ) from error
        except OSError as error:  # a file system without locks
            log.debug("%s cannot be locked: %s", self.uri, error)

    def read(self, name: str) -> str | None:
        """A small file's text, or None."""
        filesystem, path = filesystem_of(self.uri)
        file = f"{path}/{name}"
        return filesystem.cat_file(file).decode() if filesystem.exists(file) else None

    def record(self, values: Mapping[str, Any]) -> None:
        """Append a line to the run's records. Object stores cannot append: there the file is written anew every few seconds."""
        filesystem, path = filesystem_of(self.uri)
        line = json.dumps({"time": time.time(), **values})
        if isinstance(filesystem, LocalFileSystem):
            try:
                filesystem.makedirs(path, exist_ok=True)
                with open(f"{path}/{RECORDS}", "ab+") as file:
                    # A process killed while it wrote left half a line, which must not take this one with it.
                    half = file.tell() and file.seek(-1, os.SEEK_END) + 1 and file.read(1) != b"\n"
                    file.write(f"\n{line}\n".encode() if half else f"{line}\n".encode())
            except OSError as error:
                raise _cannot_write(self.uri, error) from error
            return
        if not self._lines and (text := self.read(RECORDS)):
            self._lines = text.splitlines()
        self._lines.append(line)
        if time.monotonic() - self._flushed > REMOTE_FLUSH_S or values.get("kind") != "step":
            self.write(RECORDS, "\n".join(self._lines) + "\n")
            self._flushed = time.monotonic()

    def records(self) -> list[dict[str, Any]]:
        """All records in order. A resumed run repeats steps; the later record of a step stands."""
        kept: dict[tuple[str, object], dict[str, Any]] = {}
        for values in self.written():
            key = (values["kind"], values["step"] if values["kind"] in ("step", "eval") else len(kept))
            kept[key] = values
        return sorted(kept.values(), key=lambda values: (values["step"], values["time"]))

    def written(self) -> list[dict[str, Any]]:
        """All records as they were written: steps that a resumed run repeated stand there again."""
        return list(_json_lines(self.read(RECORDS) or ""))

    def set_status(self, state: str, **details: Any) -> None:
        """`running`, `finished` or `failed`, with what there is to say."""
        self.write(STATUS, json.dumps({"state": state, "time": time.time(), **details}, indent=1))

    def status(self) -> dict[str, Any]:
        """What `set_status` wrote last, or {"state": "unknown"}."""
        try:
            status: dict[str, Any] = json.loads(self.read(STATUS) or "")
        except ValueError:  # none was written, or not all of it
            return {"state": "unknown"}
        return status


def open_run(storage: str, name: str, spec_digest: str, *, fresh: bool = False) -> RunFolder:
    """The unfinished run of the same spec, to go on with; else a new one. `fresh` always gives a new one."""
    numbers = run_numbers(storage, name)
    if numbers and not fresh:
        last = _folder(storage, name, numbers[-1])
        status = last.status()
        if status["state"] in ("running", "failed") and status.get("spec_digest") == spec_digest:
            last.resumed = True
            return last
    return _folder(storage, name, (numbers[-1] if numbers else 0) + 1)


def latest_run(storage: str, name: str) -> RunFolder | None:
    """The run with the highest number, or None."""
    numbers = run_numbers(storage, name)
    return _folder(storage, name, numbers[-1]) if numbers else None


def run_numbers(storage: str, name: str) -> list[int]:
    """Numbers of a job's runs, ascending."""
    filesystem, path = filesystem_of(f"{storage.rstrip('/')}/runs/{name}")
    try:
        folders = filesystem.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(int(number) for number in (PurePosixPath(folder).name for folder in folders) if number.isdigit())


def _folder(storage: str, name: str, number: int) -> RunFolder:
    return RunFolder(f"{storage.rstrip('/')}/runs/{name}/{number:04d}", number)


def _lock_name() -> str:
    return f".lock-{socket.gethostname()}"


def _json_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # the last line of a killed process


def _cannot_write(uri: str, error: OSError) -> StorageError:
    if isinstance(error, StorageError):  # an object store's says it better
        return error
    return StorageError(f"cannot write: {error}", where=uri, fix="free some space or set storage: to a place that can be written")
