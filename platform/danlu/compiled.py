"""C++ that is compiled for this CPU: built once, with a C++ compiler and nothing else, and kept. Nothing needs it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
BUILD_TIMEOUT_S = 300


class KernelsUnavailable(Exception):
    """Why there are none; whoever asked does without."""


def cache_folder() -> Path:
    """Where the libraries lie: PyTorch's folder of extensions, or the user's cache. KernelsUnavailable where there is neither."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named) / "danlu_kernels"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "danlu" / "kernels"
    except RuntimeError as error:  # a container's user may have no home
        raise KernelsUnavailable(f"there is no folder to keep them in ({error}): set TORCH_EXTENSIONS_DIR") from error


def build(name: str, source: Path, folder: Path, *, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library `name` of one source file: its path in the folder. Processes that come together build it once."""
    compiler = find_compiler()
    try:
        path = folder / f"{name}-{_key(compiler, source, flags)}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.exists():  # else another process has built it meanwhile
                    _compile(compiler, source, flags, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"they cannot be built in {folder}: {error}") from error
    return path


def find_compiler() -> list[str]:
    """The command: CXX, or g++. KernelsUnavailable if it is not there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        raise KernelsUnavailable(f"there is no C++ compiler: {compiler[0]} is not on the PATH")
    return compiler


def _compile(compiler: list[str], source: Path, flags: tuple[str, ...], path: Path) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as temporary:
        made = Path(temporary) / path.name
        done = subprocess.run(
            [*compiler, *flags, "-o", str(made), str(source)], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
        if done.returncode or not made.exists():
            said = done.stderr.strip().splitlines() or [f"it ends with status {done.returncode}"]
            raise KernelsUnavailable(f"{compiler[0]} cannot build them: {said[0]}")
        made.replace(path)  # whole or not there
    log.info("built the compiled kernels in %.0f s: %s", time.monotonic() - began, path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The kernel's lock: it ends with the process that holds it, so that none is ever left behind."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(compiler: list[str], source: Path, flags: tuple[str, ...]) -> str:
    """What the library depends on: a cache may be shared by machines that differ."""
    asked = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    torch = importlib.metadata.version("torch")
    parts = (source.read_text(encoding="utf-8"), asked.stdout, *flags, torch, platform.machine(), _cpu_flags())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
