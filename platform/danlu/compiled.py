"""C++ that is compiled for this CPU: built once, with a C++ compiler and nothing else, and kept. Nothing needs it.

An image's pods have no compiler: `python -m danlu.compiled` puts a library for each kind of CPU they may meet beside each source.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
BUILD_TIMEOUT_S = 300
INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


class KernelsUnavailable(Exception):
    """Why there are none; whoever asked does without."""


@dataclass(frozen=True)
class Level:
    """A kind of CPU: what GCC may use of it, and what /proc/cpuinfo calls that."""

    name: str
    options: tuple[str, ...]
    needs: frozenset[str]


_V3 = frozenset(("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"))
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BF16 = _V4 | {"avx512_bf16", "avx512vbmi"}
_BF16_OPTIONS = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi")
LEVELS = (
    Level("amx", (*_BF16_OPTIONS, "-mamx-tile", "-mamx-bf16"), _BF16 | {"amx_tile", "amx_bf16"}),
    Level("avx512-bf16", _BF16_OPTIONS, _BF16),
    Level("avx512", ("-march=x86-64-v4",), _V4),
    Level("avx2", ("-march=x86-64-v3",), _V3),
)
"""The widest first. https://gitlab.com/x86-psABIs/x86-64-ABI says what x86-64-v3 and v4 are."""


def load(source: Path) -> ctypes.CDLL:
    """The library of a source: the one that the image brings, else built, if this CPU, compiler and source have not been seen here before.
    KernelsUnavailable says why not."""
    try:
        return ctypes.CDLL(str(find_prebuilt(source) or build(source, cache_folder())))
    except OSError as error:
        raise KernelsUnavailable(f"they cannot be loaded: {error}") from error


def cache_folder() -> Path:
    """Where the libraries lie: PyTorch's folder of extensions, or the user's cache. KernelsUnavailable where there is neither."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named) / "danlu_kernels"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "danlu" / "kernels"
    except RuntimeError as error:  # a container's user may have no home
        raise KernelsUnavailable(f"there is no folder to keep them in ({error}): set TORCH_EXTENSIONS_DIR") from error


def build(source: Path, folder: Path, *, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library of one source file, named after it: its path in the folder. Processes that come together build it once."""
    compiler = find_compiler()
    try:
        path = folder / f"{source.stem}-{_key(compiler, source, flags)}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.exists():  # else another process has built it meanwhile
                    _compile(compiler, source, flags, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"they cannot be built in {folder}: {error}") from error
    return path


def find_prebuilt(source: Path, flags: frozenset[str] | None = None) -> Path | None:
    """The library of `source` for a CPU with these flags, by default this one; None where there is none for it."""
    flags = frozenset(_cpu_flags().partition(":")[2].split()) if flags is None else flags
    paths = (prebuilt_path(source, level) for level in LEVELS if level.needs <= flags)
    return next((path for path in paths if path.exists()), None)


def prebuilt_path(source: Path, level: Level) -> Path:
    digest = hashlib.sha256(_text(source).encode()).hexdigest()[:16]
    return source.with_name(f"{source.stem}-{level.name}-{digest}.so")


def prebuild(source: Path) -> list[Path]:
    """Compile what `find_prebuilt` finds; nothing on another machine than an x86-64. KernelsUnavailable if there is no compiler."""
    if platform.machine() != "x86_64":
        return []
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for level in LEVELS:
            made.append(prebuilt_path(source, level))
            shutil.copyfile(build(source, Path(folder), flags=(*FLAGS, *level.options)), made[-1])
    return made


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


def _text(source: Path) -> str:
    """Of a source, and of the files beside it that it includes."""
    text = source.read_text(encoding="utf-8")
    return text + "".join(source.with_name(name).read_text(encoding="utf-8") for name in INCLUDE.findall(text))


def _key(compiler: list[str], source: Path, flags: tuple[str, ...]) -> str:
    """What the library depends on: a cache may be shared by machines that differ."""
    asked = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    torch = importlib.metadata.version("torch")
    parts = (_text(source), asked.stdout, *flags, torch, platform.machine(), _cpu_flags())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


if __name__ == "__main__":
    for source in sorted(Path(__file__).parent.rglob("*.cpp")):
        for path in prebuild(source):
            print(path)
