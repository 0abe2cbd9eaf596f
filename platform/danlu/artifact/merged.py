"""Weights that an adapter was merged into, under the storage URI, for whoever goes on from them; `danlu jobs delete` lets go of those that
nothing needs any more."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import PurePosixPath

from fsspec.implementations.local import LocalFileSystem

from danlu.artifact.bundle import FILE
from danlu.artifact.runs import SPEC
from danlu.artifact.uris import filesystem_of

MERGED, MERGED_FROM = "merged", "merged_from.json"
"""A folder under the storage, where every worker reads merged weights, and whoever serves an adapter that was trained on them; and the file
in each of them that says whose they are, written last and taken away first."""
REST_S = 3600.0
"""How long merged weights stay that nothing names: the run that is to start from them may be reading its rows still."""


def is_whole(uri: str) -> bool:
    """Whether merged weights are there; if so they are as if written now."""
    filesystem, path = filesystem_of(f"{uri}/{MERGED_FROM}")
    if not filesystem.exists(path):
        return False
    if isinstance(filesystem, LocalFileSystem):
        os.utime(path)
    else:
        filesystem.pipe_file(path, filesystem.cat_file(path))
    return True


def let_go(storage: str, *, rest_s: float = REST_S) -> list[str]:
    """Delete merged weights that no run under the storage starts from and no adapter's bundle there stands on; their names."""
    filesystem, root = filesystem_of(f"{storage.rstrip('/')}/{MERGED}")
    there = [PurePosixPath(entry).name for entry in filesystem.ls(root, detail=False)] if filesystem.exists(root) else []
    if not there:
        return []
    said = "\n".join(_said_of_models(storage.rstrip("/")))
    gone = []
    for name in sorted(there):
        folder = f"{root}/{name}"
        written = max((filesystem.modified(file) for file in filesystem.find(folder)), default=datetime.min.replace(tzinfo=UTC))
        if name in said or (datetime.now(UTC) - written).total_seconds() < rest_s:
            continue
        if filesystem.exists(f"{folder}/{MERGED_FROM}"):
            filesystem.rm_file(f"{folder}/{MERGED_FROM}")
        filesystem.rm(folder, recursive=True)
        gone.append(name)
    return gone


def _said_of_models(storage: str) -> Iterator[str]:
    """The specs of all runs, and the base of every bundle: whoever needs a folder names it there."""
    filesystem, root = filesystem_of(storage)
    for spec in filesystem.glob(f"{root}/runs/*/*/{SPEC}"):
        yield filesystem.cat_file(spec).decode()
    for file in filesystem.glob(f"{root}/bundles/*/*/{FILE}"):
        text = filesystem.cat_file(file).decode()
        try:
            yield str(json.loads(text).get("base_model"))
        except ValueError:  # it is damaged: what it stood on may be in what is left
            yield text
