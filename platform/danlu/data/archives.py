"""Files as bytes, unpacked as their names say; what is packed and does not say so is told."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from typing import Any

from danlu.artifact.uris import ObjectStoreError, filesystem_of, open_file
from danlu.errors import DataError

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip it, or give it a name that ends in .gz"),
    b"BZh": ("bzip2", "bunzip2 it, or give it a name that ends in .bz2"),
    b"\xfd7zXZ\0": ("xz", "unxz it, or give it a name that ends in .xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd it"),
    b"PK\x03\x04": ("zip", "unzip it; a spreadsheet (.xlsx) is one too: save its rows as csv"),
}
"""First bytes -> what packs so, and what to do where the name does not say it."""


def opened(path: str, where: str) -> Any:
    """A file to read from. DataError if it cannot be opened, or is an archive of several files."""
    try:
        if path.endswith(".zip"):
            filesystem, inside = filesystem_of(path)
            with filesystem.open(inside, "rb") as file:
                names = zipfile.ZipFile(file).namelist()
            if len(names) != 1:
                told = f"{path} holds {len(names)} files, not one: {', '.join(names[:3])}"
                raise DataError(told, where=where, fix="unzip it, and name the files that are meant")
        return open_file(path)
    except ObjectStoreError:
        raise
    except UNREADABLE as error:
        raise _unreadable(path, error, where) from error


def read(file: Any, size: int, path: str, where: str) -> bytes:
    """So many bytes of it, or all with -1."""
    try:
        data: bytes = file.read() if size < 0 else file.read(size)  # pyarrow's files take no -1
    except ObjectStoreError:
        raise
    except UNREADABLE as error:
        raise _unreadable(path, error, where) from error
    return data


def refuse_packed(path: str, start: bytes, where: str) -> None:
    """DataError if the first bytes of what was opened are still those of a packed file: they would be read as text in some encoding."""
    for first, (packer, fix) in PACKED.items():
        if start.startswith(first):
            raise DataError(f"{path} is packed with {packer}, which its name does not say", where=where, fix=fix)


def _unreadable(path: str, error: Exception, where: str) -> DataError:
    return DataError(f"{path} cannot be read: {error}", where=where, fix="check its permissions, or copy it again")
