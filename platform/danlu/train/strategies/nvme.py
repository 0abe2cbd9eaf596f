"""What a worker keeps on its machine's NVMe drive: whether it can, and the folder it lies in."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from danlu.errors import ResourceError

WHERE = "parallel.nvme_path"
ALIGNMENT = 1024
"""Bytes: DeepSpeed's swap files are a multiple of it."""
SWAPPED_FROM = 1 << 20
"""Bytes of a worker's shard: DeepSpeed leaves smaller ones in memory."""
NUM_BUFFERS = 4
"""DeepSpeed's, each as large as the largest swapped shard: the weight, its gradient and AdamW's two moments."""


def check_folder(path: str) -> None:
    """ResourceError unless `path` is a folder in which files can be written past the page cache, which is how DeepSpeed does it."""
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise ResourceError(
            f"{path} {what}; it has to be a folder on every worker's machine", where=WHERE, fix=f"mkdir -p {path}, or another"
        )
    probe = os.path.join(path, f".danlu-probe-{os.getpid()}")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except PermissionError as error:
        raise ResourceError(f"{path} cannot be written to", where=WHERE, fix="another folder, or the right to write there") from error
    except OSError as error:
        raise ResourceError(
            f"{path} is on a file system that does not take direct writes (O_DIRECT), which DeepSpeed swaps with: {error.strerror}",
            where=WHERE,
            fix="a folder on a local disk (ext4, xfs); memory (tmpfs) and some network file systems cannot",
        ) from error
    finally:
        if os.path.exists(probe):
            os.remove(probe)


def check_free(path: str, need: int) -> None:
    """ResourceError unless `need` bytes are free there."""
    free = shutil.disk_usage(path).free
    if free < need:
        raise ResourceError(
            f"{path} has {free / 2**30:.1f} GiB free; what the workers keep there takes {need / 2**30:.1f} GiB",
            where=WHERE,
            fix="free some space, another drive, or offload to cpu",
        )


def check_lock(num_bytes: int) -> None:
    """ResourceError unless this process may lock so much memory, as DeepSpeed does for what it swaps through: it would crash."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlock.argtypes = libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    with mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE)) as memory:
        start = ctypes.c_char.from_buffer(memory)
        refused = libc.mlock(ctypes.addressof(start), len(memory)) != 0
        libc.munlock(ctypes.addressof(start), len(memory))
        del start  # or the memory could not be closed
    if refused:
        raise ResourceError(
            f"swapping this model takes {num_bytes / 2**20:.0f} MiB of locked memory a worker, more than it may lock",
            where=WHERE,
            fix="ulimit -l unlimited (a container: the capability IPC_LOCK), more workers, or offload to cpu",
        )


class SwapFolder:
    """A worker's own folder under `nvme_path`. It goes when its owner does, or, where that was killed, when the next worker makes its own.

    The owner holds a lock on it: what nobody holds is left over, from whichever run.
    """

    def __init__(self, nvme_path: str, rank: int) -> None:
        with open(os.path.join(nvme_path, ".danlu-swap.lock"), "w") as all_of_them:
            fcntl.flock(all_of_them, fcntl.LOCK_EX)  # or a new folder would look left over until its owner has locked it
            for folder in Path(nvme_path).glob("danlu-swap-*"):
                _remove_if_left_over(folder)
            self.path = Path(tempfile.mkdtemp(prefix=f"danlu-swap-rank{rank}-", dir=nvme_path))
            self.lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.remove = weakref.finalize(self, _remove, self.path, self.lock)
        """Also called when this object goes, and at exit."""


def reserve_file(path: Path, num_bytes: int) -> None:
    """Take a swap file's space now: a full drive is an OSError here, and would be wrong numbers later, since DeepSpeed does not look."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(file, 0, -(-num_bytes // ALIGNMENT) * ALIGNMENT)
    finally:
        os.close(file)


def check_whole(path: Path, num_bytes: int) -> None:
    """OSError if a swap file has not all of its bytes, since the drive was full when DeepSpeed wrote it. It is written in place later."""
    file = os.open(path, os.O_RDONLY)
    try:
        if os.lseek(file, 0, os.SEEK_HOLE) < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_if_left_over(folder: Path) -> None:
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:  # its owner has just removed it, or it is another user's
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # its owner lives
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(file)
