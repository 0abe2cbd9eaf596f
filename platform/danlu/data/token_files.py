"""Token ids on disk: a shard is a file, and all shards end to end are arrays that are mapped into memory, of which what is read is loaded.

<folder>/00000.npz ...      shards, each renamed into place when it is whole; gone once they are joined
         input_ids.npy ...  all of them, in their order
         manifest.json      written last: without it the folder is unfinished
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO
from zipfile import BadZipFile

import numpy as np

from danlu.data.encode import Encoded, ends
from danlu.errors import StorageError

TOKENS = ("input_ids", "token_type_ids", "token_labels")
ROWS = ("truncated", "labels")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids, with their labels where they have some; `num_read`: how many rows were read for them."""

    encoded: Encoded
    labels: np.ndarray | None
    num_read: int


@dataclass(frozen=True)
class TokenFiles:
    """All rows of a folder, mapped. `digest`: of what they are."""

    rows: TokenRows
    digest: str


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard stands."""
    return folder / f"{number:05d}.npz"


def write_shard(path: Path, rows: TokenRows) -> None:
    """One shard: whole in its place, or not there."""
    assert rows.encoded.groups is None, "a row is one sequence"
    assert rows.encoded.spans is None
    arrays = {name: array for name in TOKENS if (array := getattr(rows.encoded, name)) is not None}
    arrays |= {"lengths": rows.encoded.lengths.astype(np.int32), "truncated": rows.encoded.truncated}
    arrays |= {"num_read": np.asarray(rows.num_read)} | ({} if rows.labels is None else {"labels": rows.labels})
    with _written(path) as file:
        np.savez(file, **arrays)


def has_shard(path: Path) -> bool:
    """True for a shard that can be read whole; one that was damaged is made again."""
    try:
        with np.load(path) as arrays:
            return "num_read" in arrays
    except (OSError, ValueError, EOFError, BadZipFile):
        return False


def join(folder: Path, num_shards: int) -> TokenFiles:
    """All shards end to end. Memory: one shard, and four bytes a row."""
    shards = [shard_path(folder, number) for number in range(num_shards)]
    with np.load(shards[0]) as first:
        names = [name for name in (*TOKENS, *ROWS) if name in first]
    lengths, num_read = [], 0
    for shard in shards:
        with np.load(shard) as arrays:
            lengths.append(arrays["lengths"])
            num_read += int(arrays["num_read"])
    offsets = ends(np.concatenate(lengths))
    digest = sha256(offsets.tobytes())
    for name in names:
        size = int(offsets[-1]) if name in TOKENS else len(offsets) - 1
        with _written(folder / f"{name}.npy") as file:
            for number, shard in enumerate(shards):
                with np.load(shard) as arrays:
                    array = np.ascontiguousarray(arrays[name])
                if not number:
                    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": (size,)}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(array.data)
                digest.update(array.data)
    with _written(folder / "offsets.npy") as file:
        np.save(file, offsets)
    manifest = {"names": names, "num_read": num_read, "digest": digest.hexdigest()}
    with _written(folder / MANIFEST) as file:
        file.write(json.dumps(manifest).encode())
    for shard in shards:
        shard.unlink(missing_ok=True)
    found = open_files(folder)
    assert found is not None
    return found


def open_files(folder: Path) -> TokenFiles | None:
    """What `join` made of a folder, or None if it has not done so."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        # A plain array over the mapping: what is taken out of it is no mapping any more.
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in manifest["names"]}
        offsets = np.load(folder / "offsets.npy")
    except (OSError, ValueError):
        return None
    labels = arrays.pop("labels", None)
    if len(arrays["input_ids"]) != offsets[-1]:
        return None
    return TokenFiles(TokenRows(Encoded(offsets=offsets, **arrays), labels, manifest["num_read"]), manifest["digest"])


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A file that is renamed into place when the block is through."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            temporary = file.name
            yield file
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise StorageError(
            f"token ids cannot be written: {error}", where=str(path.parent), fix="free some space, or data.cache_dir: another folder"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
