"""Where a URI's files are. The only place that asks fsspec for a filesystem.

s3:// is read and written by pyarrow, with which Ray Train keeps its own files: one client, one way to find credentials. s3fs cannot be
installed beside the Kubernetes client (botocore needs python-dateutil below 3, kubernetes 3 or newer). Google's store stays gcsfs's:
pyarrow sees no folders there that nobody made.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import fsspec
from fsspec.core import OpenFile, get_compression
from fsspec.implementations.arrow import ArrowFSWrapper

from danlu.errors import StorageError

OTHER_SCHEMES = "a folder, s3://, or gs:// with pip install 'danlu[gcs]'; another scheme needs the package that fsspec knows it by"

_DENIED = (
    "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "UNRECOGNIZED_CLIENT",
    "MISSING_AUTHENTICATION_TOKEN", "HTTP status 403", "HTTP status 401", "credentials",
)  # fmt: skip
_NO_BUCKET = ("NO_SUCH_BUCKET",)
_ELSEWHERE = ("HTTP status 301", "PermanentRedirect", "AuthorizationHeaderMalformed")
_SILENT = ("NETWORK_CONNECTION", "curlCode", "REQUEST_TIMEOUT")


class ObjectStoreError(StorageError, OSError):
    """An object store that refuses or does not answer. An OSError as well: to a checkpoint it is what a full disk is."""

    def __init__(self, problem: str, *, where: str = "", fix: str = "") -> None:
        StorageError.__init__(self, problem, where=where, fix=fix)


class UnknownScheme(StorageError):
    """A URI that there is no client for."""


def filesystem_of(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a folder's or a file's URI, and its path there. UnknownScheme if its package is not installed."""
    if not uri.startswith("s3://"):
        if found := re.match(r"(?!file:)([a-z][a-z0-9]+):/(?!/)", uri):  # else a folder of that name would be made here
            raise UnknownScheme(f"{uri!r} is no URI", where="storage", fix=f"{found[1]}://{uri[found.end() :]}")
        try:
            return fsspec.core.url_to_fs(uri)  # type: ignore[no-any-return]
        except (ImportError, ValueError) as error:
            raise UnknownScheme(f"{uri}: {error}", where="storage", fix=OTHER_SCHEMES) from error
    path = uri.removeprefix("s3://").strip("/")
    bucket = path.partition("/")[0]
    if not bucket:
        raise StorageError(f"{uri!r} names no bucket", where="storage", fix="s3://bucket/runs")
    # What says who asks, and whom: a client is made anew where that changes.
    return _s3(bucket, tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))), path


def open_file(uri: str) -> Any:
    """A file to read bytes from, unpacked where its name says how it is packed."""
    filesystem, path = filesystem_of(uri)
    return OpenFile(filesystem, path, "rb", compression=get_compression(path, "infer")).open()


@lru_cache(maxsize=32)
def _s3(bucket: str, settings: tuple[tuple[str, str], ...]) -> S3:
    from pyarrow.fs import FileSystem

    with _told(f"s3://{bucket}"):
        client, _ = FileSystem.from_uri(f"s3://{bucket}")
    return S3(client)


class S3(ArrowFSWrapper):  # type: ignore[misc]
    """A client of pyarrow's with fsspec's operations, whose refusals say what would work."""

    cachable = False  # fsspec would take two clients for one

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: an object store has no folders."""

    def info(self, path: str, **kwargs: Any) -> Any:
        return self._asked(path, partial(super().info, path, **kwargs))

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        return self._asked(path, partial(super().ls, path, detail=detail, **kwargs))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._asked(path, partial(super().rm, path, recursive=recursive, maxdepth=maxdepth))

    def rm_file(self, path: str) -> None:
        self._asked(path, partial(super().rm_file, path))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        return self._asked(path, partial(super().cat_file, path, start, end, **kwargs))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._asked(path, partial(super().pipe_file, path, value, mode, **kwargs))

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self._asked(rpath, partial(super().put_file, lpath, rpath, **kwargs))

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        self._asked(rpath, partial(super().get_file, rpath, lpath, **kwargs))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return self._asked(path, partial(super()._open, path, mode, **kwargs))

    def _asked(self, path: str, ask: Callable[[], Any]) -> Any:
        with _told(f"s3://{str(path).removeprefix('s3://')}"):
            return ask()


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """What a client says in its own words, as an error that says what would work. A file that is not there stays FileNotFoundError."""
    try:
        yield
    except ObjectStoreError:
        raise
    except OSError as error:
        text = str(error)
        # fsspec takes "the key does not exist in our records" for a file that is not there.
        refused = any(mark in text for mark in (*_NO_BUCKET, *_DENIED))
        of_the_disk = error.errno is not None and error.errno != errno.ENOENT
        if of_the_disk or (isinstance(error, FileNotFoundError) and not refused):
            raise
        raise ObjectStoreError(f"the object store refuses: {text}", where=uri, fix=_fix(uri, text)) from error


def _fix(uri: str, text: str) -> str:
    bucket = uri.removeprefix("s3://").partition("/")[0]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if any(mark in text for mark in _NO_BUCKET):
        return f"make the bucket {bucket}, or name another" + (f"; asked was {endpoint}" if endpoint else "")
    if any(mark in text for mark in _ELSEWHERE):
        return f"AWS_REGION: the region of the bucket {bucket}"
    if any(mark in text for mark in _DENIED):
        rights = f"s3:ListBucket on {bucket}, s3:GetObject, s3:PutObject and s3:DeleteObject in it"
        return f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or in a pod its service account's role; it needs {rights}"
    if any(mark in text for mark in _SILENT):
        return "a network that reaches it" + (f", or another AWS_ENDPOINT_URL than {endpoint}" if endpoint else "")
    return f"aws s3 ls s3://{bucket} says whether it is the store, or this machine's way to it"
