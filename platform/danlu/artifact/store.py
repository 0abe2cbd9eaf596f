"""The store: versions of bundles and names for them, under one storage URI."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from danlu.artifact.bundle import FILE, canonical_json, read_bundle, text_digest
from danlu.artifact.uris import filesystem_of
from danlu.errors import ModelError, StorageError

VERSION = re.compile(r"^v(\d+)$")
ALIAS = re.compile(r"^[a-z][a-z0-9-]{0,46}$")


@dataclass(frozen=True)
class Ref:
    """A stored bundle."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@v{self.version}"


class Store:
    """`<uri>/bundles/<name>/v0001/...` and `<uri>/bundles/<name>/aliases/<alias>.json`."""

    def __init__(self, uri: str, *, cache_dir: str | Path = ".cache/danlu/bundles") -> None:
        self.uri, self.cache_dir = uri.rstrip("/"), Path(cache_dir)
        self.filesystem, path = filesystem_of(f"{self.uri}/bundles")
        self.root = PurePosixPath(path)
        self.is_local = isinstance(self.filesystem, LocalFileSystem)

    def put(self, folder: Path, name: str) -> Ref:
        """Store a bundle as the next version; what is the newest one already is not stored again."""
        meta = read_bundle(folder).meta
        versions = self.versions(name)
        if versions and self._digest(name, versions[-1]) == meta.digest:
            return Ref(name, versions[-1])
        with self._storage_errors():
            version = self._claim(name)
            target = self._folder(name, version)
            try:
                files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FILE]
                for path in files:
                    to = target / path.relative_to(folder).as_posix()
                    self.filesystem.makedirs(str(to.parent), exist_ok=True)
                    self.filesystem.put_file(str(path), str(to))
                # Last: until it stands there, nobody takes the folder for a bundle.
                self._write(target / FILE, meta.model_copy(update={"version": version}).model_dump_json(indent=1))
            except BaseException:
                with suppress(FileNotFoundError):  # object stores have no empty folders
                    self.filesystem.rm(str(target), recursive=True)
                raise
        return Ref(name, version)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Let `name@alias` mean a version from now on."""
        if not ALIAS.match(alias) or VERSION.match(alias):
            raise ModelError(f"{alias!r} cannot name a version", where="alias", fix="lower-case letters, digits and dashes, not v1, v2 ...")
        if version not in self.versions(name):
            raise self._no_version(name, f"v{version}")
        with self._storage_errors():
            self.filesystem.makedirs(str(self.root / name / "aliases"), exist_ok=True)
            self._write(self.root / name / "aliases" / f"{alias}.json", json.dumps({"version": version}))

    def names(self) -> list[str]:
        """Names that have a whole version."""
        return sorted(name for name in self._ls(self.root) if self.versions(name))

    def versions(self, name: str) -> list[int]:
        """Whole versions of a name, ascending."""
        numbers = [int(found[1]) for entry in self._ls(self.root / name) if (found := VERSION.match(entry))]
        return sorted(number for number in numbers if self.filesystem.exists(str(self._folder(name, number) / FILE)))

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version."""
        folder = self.root / name / "aliases"
        entries = [entry for entry in self._ls(folder) if entry.endswith(".json")]
        return {entry.removesuffix(".json"): int(json.loads(self.filesystem.cat_file(str(folder / entry)))["version"]) for entry in entries}

    def resolve(self, reference: str) -> Path:
        """The local folder of `name@alias`, `name@v3`, `name` (its newest), a folder or a URI; remote ones are downloaded once."""
        folder = Path(reference).expanduser()
        if (folder / FILE).exists() or ("/" in reference and folder.exists()):
            return folder
        if "://" in reference:
            filesystem, path = filesystem_of(reference)
            return self._local(filesystem, PurePosixPath(path))
        name, _, which = reference.partition("@")
        versions = self.versions(name)
        if not versions:
            near = difflib.get_close_matches(name, self.names(), n=1)
            there = ", ".join(self.names()) or "none yet"
            raise ModelError(
                f"{self.uri} has no bundle named {name!r}; it has: {there}",
                where="bundle",
                fix=f"did you mean {near[0]}?" if near else "train one first, or check storage:",
            )
        if not which:
            version = versions[-1]
        elif found := VERSION.match(which):
            version = int(found[1])
        else:
            version = self.aliases(name).get(which, -1)
        if version not in versions:
            raise self._no_version(name, which)
        return self._local(self.filesystem, self._folder(name, version))

    def _no_version(self, name: str, which: str) -> ModelError:
        there = [f"v{number}" for number in self.versions(name)] + sorted(self.aliases(name))
        return ModelError(f"{name!r} has no {which!r}", where="bundle", fix=f"{name}@ one of: {', '.join(there)}")

    def _folder(self, name: str, version: int) -> PurePosixPath:
        return self.root / name / f"v{version:04d}"

    def _digest(self, name: str, version: int) -> str:
        document = json.loads(self.filesystem.cat_file(str(self._folder(name, version) / FILE)))
        return str(document["digest"])

    def _claim(self, name: str) -> int:
        """A version number nobody else has: making the folder decides (object stores have no such thing, so there the last one wins)."""
        taken = [int(found[1]) for entry in self._ls(self.root / name) if (found := VERSION.match(entry))]
        version = max(taken, default=0) + 1
        while self.is_local:
            Path(self.root / name).mkdir(parents=True, exist_ok=True)
            try:
                Path(self._folder(name, version)).mkdir()
                break
            except FileExistsError:
                version += 1
        return version

    def _write(self, path: PurePosixPath, text: str) -> None:
        if not self.is_local:
            self.filesystem.pipe_file(str(path), text.encode())
            return
        partial = Path(path.parent) / f".{path.name}.{uuid.uuid4().hex}"
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, Path(path))
        finally:
            partial.unlink(missing_ok=True)

    def _ls(self, folder: PurePosixPath) -> list[str]:
        try:
            return [PurePosixPath(entry).name for entry in self.filesystem.ls(str(folder), detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _local(self, filesystem: fsspec.AbstractFileSystem, folder: PurePosixPath) -> Path:
        if isinstance(filesystem, LocalFileSystem):
            return Path(folder)
        try:
            document = json.loads(filesystem.cat_file(str(folder / FILE)))
        except FileNotFoundError as error:
            raise ModelError(f"{folder} is no bundle: it has no {FILE}", where="bundle") from error
        except ValueError as error:
            raise ModelError(f"{folder / FILE} is damaged: {error}", where="bundle", fix="an earlier version, or train again") from error
        target = self.cache_dir / text_digest(canonical_json(document))[:24]
        with suppress(ModelError):
            return read_bundle(target).path
        with self._storage_errors():
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=self.cache_dir, prefix=".partial-"))
            try:
                for name in [*document.get("files", ()), FILE]:
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    filesystem.get_file(str(folder / name), str(partial / name))
                read_bundle(partial, verify=True)
                with suppress(ModelError):
                    return read_bundle(target).path  # another process was faster
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
            except FileNotFoundError as error:
                raise ModelError(f"{folder} is not whole: {error}", where="bundle", fix="an earlier version, or copy it again") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return target

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _storage_error(self.uri, error) from error


def ensure_writable(uri: str) -> None:
    """StorageError if nothing can be written under a storage URI."""
    try:
        filesystem, path = filesystem_of(uri)
        probe = f"{path.rstrip('/')}/.danlu-{uuid.uuid4().hex}"
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(probe, b"written to see whether it can be")
        filesystem.rm_file(probe)
    except Exception as error:  # other schemes' clients have errors of their own: a hub's, a login's
        raise _storage_error(uri, error) from error


def _storage_error(uri: str, error: Exception) -> StorageError:
    if isinstance(error, StorageError):  # an object store's says it better
        return error
    fixes = {
        errno.ENOSPC: "free some space, or set storage: to another place",
        errno.EACCES: "a folder this user may write to",
        errno.EPERM: "a folder this user may write to",
        errno.EROFS: "a folder on a file system that can be written",
        errno.EEXIST: "a folder: there is a file of this name",
        errno.ENOTDIR: "a folder: a part of this path is a file",
    }
    fix = fixes.get(getattr(error, "errno", None) or 0, "check storage:")
    return StorageError(f"cannot write to {uri}: {error}", where="storage", fix=fix)
