"""Checkpoints: saved by all ranks, whole or not there, checked when read, the one before kept."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError

from danlu.artifact.uris import filesystem_of
from danlu.errors import CheckpointError, StorageError
from danlu.train.run import EventRecord, Run
from danlu.train.strategy import State

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What writers say when the disk is full: files, torch.save, safetensors."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: all it needs besides the strategy's state, since batches and dropout follow from the step."""

    step: int = 0
    tokens_total: int = 0
    best_step: int = -1
    best_value: float = 0.0
    evals_without_best: int = 0


class Checkpoints:
    """The checkpoints of one run under one storage URI.

    Each is a folder `step-000123`. Every rank writes its files and their digests; when all have, rank 0 writes the manifest that makes
    it whole. Nothing without a manifest is ever read.
    """

    def __init__(self, run: Run, uri: str, *, shape: str, keep: int) -> None:
        self.run, self.shape, self.keep = run, shape, keep
        self.filesystem, path = filesystem_of(uri)
        self.root = PurePosixPath(path)
        self.is_local = isinstance(self.filesystem, LocalFileSystem)

    def save(self, progress: Progress, write: Callable[[Path], None]) -> int:
        """Let every rank `write` its part; StorageError on all ranks if one of them could not. Its size in bytes, on rank 0.

        `write` may be collective; then it raises after its last collective only.
        """
        step, folder, size = progress.step, self._folder(progress.step), 0
        with self._agreed(step):
            if self.run.rank == 0 and self.filesystem.exists(str(folder)):
                self.filesystem.rm(str(folder), recursive=True)  # left half-written, or damaged
        with self._agreed(step):  # no rank begins to write before all can
            private = self._private(folder)
        with self._agreed(step), private:
            write(Path(private.name))
            self._put(Path(private.name), folder)
        with self._agreed(step):
            if self.run.rank == 0:
                size = self._finish(folder, progress)
        if self.run.rank == 0:
            self._drop_old()
        return size

    def restore(self, state: State) -> Progress | None:
        """Load the newest whole checkpoint, or the one before where that is damaged; None if there is none."""
        for step in self._agreed_steps():
            manifest = self._manifest(step)
            damage = self._damage(step, manifest) if self.run.rank == 0 else None
            if self.run.all_sum(torch.tensor(float(damage is not None))) > 0:
                self.run.report(EventRecord(step, "checkpoint damaged", f"{damage}; going back to the one before"))
                continue
            self._check_shape(step, manifest)
            with _LocalCopy(self, step) as folder:
                state.load(folder)
            return Progress(**manifest["progress"])
        return None

    def steps(self) -> list[int]:
        """Steps of whole checkpoints, newest first."""
        try:
            folders = self.filesystem.ls(str(self.root), detail=False)
        except FileNotFoundError:
            return []
        names = [PurePosixPath(folder).name for folder in folders]
        steps = [int(name.removeprefix("step-")) for name in names if name.startswith("step-")]
        return sorted((step for step in steps if self.filesystem.exists(str(self._folder(step) / MANIFEST))), reverse=True)

    def _folder(self, step: int) -> PurePosixPath:
        return self.root / f"step-{step:06d}"

    @contextmanager
    def _agreed(self, step: int) -> Iterator[None]:
        """A part of saving that all ranks end before one begins the next; where one of them fails, it fails on all."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001  # whatever it is, the other ranks wait for this one
            error = caught
        if self.run.all_sum(torch.tensor(float(error is not None))) == 0:
            return
        if self.run.rank == 0:
            self._discard(self._folder(step))
        if error is not None and not isinstance(error, WRITE_ERRORS):
            raise error
        raise self._not_saved(step, error) from error

    def _discard(self, folder: PurePosixPath) -> None:
        with suppress(OSError):  # what is left has no manifest, so it is never read
            if self.filesystem.exists(str(folder)):
                self.filesystem.rm(str(folder), recursive=True)

    def _private(self, folder: PurePosixPath) -> tempfile.TemporaryDirectory[str]:
        """A folder for this rank's files alone, where they can be renamed into the checkpoint."""
        if self.is_local:
            Path(folder).mkdir(parents=True, exist_ok=True)
        where = str(folder) if self.is_local else None
        return tempfile.TemporaryDirectory(prefix=f".rank-{self.run.rank}-", dir=where, ignore_cleanup_errors=True)

    def _put(self, private: Path, folder: PurePosixPath) -> None:
        digests: dict[str, dict[str, Any]] = {}
        for path in sorted(private.rglob("*")):
            if path.is_file():
                name = path.relative_to(private).as_posix()
                digests[name] = {"size": path.stat().st_size, "sha256": _digest(path)}
                self._move(path, folder / name)
        with self.filesystem.open(str(folder / f"rank-{self.run.rank}.json"), "w") as file:
            json.dump(digests, file)

    def _move(self, path: Path, target: PurePosixPath) -> None:
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        else:
            self.filesystem.put_file(str(path), str(target))

    def _finish(self, folder: PurePosixPath, progress: Progress) -> int:
        files: dict[str, Any] = {}
        for rank in range(self.run.world_size):
            with self.filesystem.open(str(folder / f"rank-{rank}.json")) as file:
                files.update(json.load(file))
        manifest = {"format": 1, "shape": self.shape, "world_size": self.run.world_size, "progress": asdict(progress), "files": files}
        text = json.dumps(manifest, indent=1)
        if self.is_local:
            partial = Path(folder) / f".{MANIFEST}"
            with partial.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, Path(folder) / MANIFEST)
        else:
            self.filesystem.pipe_file(str(folder / MANIFEST), text.encode())
        return sum(file["size"] for file in files.values())

    def _drop_old(self) -> None:
        for step in self.steps()[self.keep :]:
            # The manifest first: a folder that is half gone must not look whole.
            self.filesystem.rm_file(str(self._folder(step) / MANIFEST))
            self.filesystem.rm(str(self._folder(step)), recursive=True)

    def _agreed_steps(self) -> list[int]:
        """Rank 0's list, so that all ranks try the same ones even where a listing lags."""
        steps = self.steps()[:64] if self.run.rank == 0 else []
        table = torch.zeros(65, dtype=torch.float64)
        if self.run.rank == 0:
            table[0] = len(steps)
            table[1 : len(steps) + 1] = torch.tensor(steps, dtype=torch.float64)
        table = self.run.all_sum(table)
        return [int(step) for step in table[1 : int(table[0]) + 1]]

    def _manifest(self, step: int) -> dict[str, Any]:
        with self.filesystem.open(str(self._folder(step) / MANIFEST)) as file:
            manifest: dict[str, Any] = json.load(file)
        return manifest

    def _damage(self, step: int, manifest: dict[str, Any]) -> str | None:
        for name, expected in manifest["files"].items():
            path = str(self._folder(step) / name)
            if not self.filesystem.exists(path):
                return f"{name} is missing"
            if self.filesystem.size(path) != expected["size"]:
                return f"{name} has {self.filesystem.size(path)} bytes instead of {expected['size']}"
            if self.is_local and _digest(Path(path)) != expected["sha256"]:
                return f"{name} does not have the contents it was written with"
        return None

    def _check_shape(self, step: int, manifest: dict[str, Any]) -> None:
        if manifest["shape"] != self.shape:
            raise CheckpointError(
                f"the checkpoint of step {step} was written by {manifest['shape']} on {manifest['world_size']} workers; "
                f"this job is {self.shape} on {self.run.world_size}",
                where=str(self._folder(step)),
                fix="train with the same parallel: (any number of workers will do), or start anew with --fresh",
            )

    def _not_saved(self, step: int, error: Exception | None) -> StorageError:
        kept: list[int] = []
        with suppress(OSError):  # it may be out of reach
            kept = self.steps()
        before = f"the checkpoint of step {kept[0]} is whole and the same command goes on from it" if kept else "there is no earlier one"
        why, fix = error or "another worker failed to write its part", "free some space or set storage: to another place"
        if isinstance(error, StorageError):  # an object store's
            why, fix = error.problem, error.fix
        return StorageError(f"the checkpoint of step {step} could not be saved: {why}; {before}", where=str(self.root), fix=fix)


class _LocalCopy:
    """A checkpoint as a local folder: itself, or a temporary download."""

    def __init__(self, checkpoints: Checkpoints, step: int) -> None:
        self.checkpoints, self.folder = checkpoints, checkpoints._folder(step)
        self.temporary: str | None = None

    def __enter__(self) -> Path:
        if self.checkpoints.is_local:
            return Path(self.folder)
        self.temporary = tempfile.mkdtemp(prefix="danlu-restore-")
        self.checkpoints.filesystem.get(f"{self.folder}/", f"{self.temporary}/", recursive=True)
        return Path(self.temporary)

    def __exit__(self, *_: object) -> None:
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def improved(progress: Progress, value: float, *, higher_is_better: bool) -> bool:
    """True if `value` beats the best so far, as any number beats NaN: or one evaluation that overflowed would stay the best for ever."""
    if progress.best_step < 0 or (math.isnan(progress.best_value) and not math.isnan(value)):
        return True
    return value > progress.best_value if higher_is_better else value < progress.best_value


def after_eval(progress: Progress, value: float, *, is_best: bool) -> Progress:
    """Progress with an evaluation counted in."""
    if is_best:
        return replace(progress, best_step=progress.step, best_value=value, evals_without_best=0)
    return replace(progress, evals_without_best=progress.evals_without_best + 1)
