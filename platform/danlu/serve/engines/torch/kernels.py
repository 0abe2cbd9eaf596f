"""The compiled kernels (kernels.cpp): built once for this CPU, with a C++ compiler and nothing else, and kept. Nothing needs them."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
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

import torch
from torch import nn

from danlu.errors import ModelError
from danlu.serve.engines.torch.prebuilt import find_prebuilt

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
BUILD_TIMEOUT_S = 300
PANEL = 32
"""Outputs of a panel of weights: kernels.cpp's."""


class KernelsUnavailable(Exception):
    """Why there are none; whoever asked does without."""


class LinearStruct(ctypes.Structure):
    """kernels.cpp's Linear."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("outs", ctypes.c_int64),
        ("ins", ctypes.c_int64),
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
    ]


class Kernels:
    """The library, loaded. Its threads are PyTorch's: `torch.set_num_threads` in the thread that calls counts here too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.danlu_vectors.restype = ctypes.c_char_p
        self.library.danlu_pack.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        self.library.danlu_pack_integers.argtypes = (ctypes.c_int, *self.library.danlu_pack.argtypes)
        self.library.danlu_linear.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        self.library.danlu_step.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        for function in ("danlu_pack", "danlu_pack_integers", "danlu_linear", "danlu_step"):
            getattr(self.library, function).restype = None

    @property
    def vectors(self) -> str:
        """The widest instructions they were built with."""
        found: bytes = self.library.danlu_vectors()
        return found.decode()

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] as they read it: [panels, in, 32] elements in their own order. ModelError: bf16 goes in pairs of inputs."""
        outs, ins = weight.shape
        _check_pairs(weight.dtype, ins)
        packed = weight.new_empty(-(-outs // PANEL), ins, PANEL)
        weight = weight.contiguous()
        self.library.danlu_pack(weight.dtype == torch.bfloat16, weight.data_ptr(), outs, ins, packed.data_ptr())
        return packed

    def pack_integers(self, values: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight of 8 or 4 bits as they multiply activations of `dtype` with it, and its scales. values: int8 [out, in]; scale:
        [out, groups]. ModelError as of `pack`."""
        outs, ins = values.shape
        _check_pairs(dtype, ins)
        packed = torch.empty(-(-outs // PANEL) * PANEL * ins * bits // 8, dtype=torch.uint8)
        values = values.contiguous()
        self.library.danlu_pack_integers(dtype == torch.bfloat16, bits, values.data_ptr(), outs, ins, packed.data_ptr())
        whole = nn.functional.pad(scale.float(), (0, 0, 0, -outs % PANEL))
        if bits == 8:
            return packed, whole[:, 0].contiguous()
        return packed, whole.view(-1, PANEL, whole.shape[1]).transpose(1, 2).contiguous().bfloat16()

    def linear(self, struct: LinearStruct, x: torch.Tensor) -> torch.Tensor:
        """One of a step's products by itself, so that it can be compared. x: [tokens, in]; returns x @ weight.T + bias, [tokens, out]."""
        x = x.contiguous()
        y = x.new_empty(len(x), struct.outs)
        self.library.danlu_linear(x.dtype == torch.bfloat16, ctypes.byref(struct), x.data_ptr(), len(x), y.data_ptr())
        return y


def _check_pairs(dtype: torch.dtype, ins: int) -> None:
    if dtype == torch.bfloat16 and ins % 2:
        raise ModelError(f"a product of {ins} inputs cannot be made in pairs of bf16", where="engine.dtype", fix="dtype: fp32")


def need_kernels(dtype: torch.dtype, *, integers: bool = False) -> None:
    """KernelsUnavailable where PyTorch's own products are the faster ones; it has none to speak of for weights that are integers."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise KernelsUnavailable(f"they are for fp32 and bf16, not for {dtype}")
    if dtype == torch.bfloat16 and not integers and torch.cpu._is_amx_tile_supported():
        raise KernelsUnavailable("this CPU has AMX, which they do not use and PyTorch does")


def load_kernels() -> Kernels:
    """Those that the image brings; else built, if this CPU, compiler and source have not been seen here before. KernelsUnavailable says why
    not; once a process."""
    if isinstance(found := _found(), KernelsUnavailable):
        raise found
    return found


@functools.cache
def _found() -> Kernels | KernelsUnavailable:
    try:
        return Kernels(find_prebuilt(SOURCE) or build_kernels(cache_folder()))
    except KernelsUnavailable as error:
        return error
    except OSError as error:
        return KernelsUnavailable(f"they cannot be loaded: {error}")


def cache_folder() -> Path:
    """Where the libraries lie: PyTorch's folder of extensions, or the user's cache. KernelsUnavailable where there is neither."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named) / "danlu_kernels"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "danlu" / "kernels"
    except RuntimeError as error:  # a container's user may have no home
        raise KernelsUnavailable(f"there is no folder to keep them in ({error}): set TORCH_EXTENSIONS_DIR") from error


def build_kernels(folder: Path, *, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library's path in the folder. Processes that come together build it once."""
    compiler = find_compiler()
    try:
        path = folder / f"kernels-{_key(compiler, flags)}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.exists():  # else another process has built it meanwhile
                    _compile(compiler, flags, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"they cannot be built in {folder}: {error}") from error
    return path


def find_compiler() -> list[str]:
    """The command: CXX, or g++. KernelsUnavailable if it is not there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        raise KernelsUnavailable(f"there is no C++ compiler: {compiler[0]} is not on the PATH")
    return compiler


def _compile(compiler: list[str], flags: tuple[str, ...], path: Path) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as temporary:
        made = Path(temporary) / "kernels.so"
        done = subprocess.run(
            [*compiler, *flags, "-o", str(made), str(SOURCE)], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
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


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    """What the library depends on: a cache may be shared by machines that differ."""
    asked = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    parts = (SOURCE.read_text(encoding="utf-8"), asked.stdout, *flags, torch.__version__, platform.machine(), _cpu_flags())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
