"""The compiled kernels of an image, whose pods have no compiler: beside kernels.cpp lies a library for each kind of CPU they may meet.

`python -m danlu.serve.engines.torch.prebuilt` writes them there, when an image is made.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path


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


def find_prebuilt(source: Path, flags: frozenset[str] | None = None) -> Path | None:
    """The library of `source` for a CPU with these flags, by default this one; None where there is none for it."""
    flags = _cpu_flags() if flags is None else flags
    paths = (_path_of(source, level) for level in LEVELS if level.needs <= flags)
    return next((path for path in paths if path.exists()), None)


def _path_of(source: Path, level: Level) -> Path:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return source.with_name(f"{source.stem}-{level.name}-{digest}.so")


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def prebuild(source: Path) -> list[Path]:
    """Compile what `find_prebuilt` finds; nothing on another machine than an x86-64. KernelsUnavailable if there is no compiler."""
    from danlu.serve.engines.torch.kernels import FLAGS, build_kernels

    if platform.machine() != "x86_64":
        return []
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for level in LEVELS:
            made.append(_path_of(source, level))
            shutil.copyfile(build_kernels(Path(folder), flags=(*FLAGS, *level.options)), made[-1])
    return made


if __name__ == "__main__":
    from danlu.serve.engines.torch.kernels import SOURCE

    for path in prebuild(SOURCE):
        print(path)
