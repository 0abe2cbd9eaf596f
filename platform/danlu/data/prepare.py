"""Rows cleaned and split into shards, streamed: memory does not grow with the files, and a run that was stopped goes on at its last shard.

    <cache_dir>/clean/<key>/train-00000.jsonl ...   shards, each renamed into place when it is whole
                            state.sqlite            how far it came and what was seen, committed with each shard
                            manifest.json           what was done, written last: without it the folder is unfinished

The key is made of the steps, the split and the files (path, size, time), so that other files or steps have another folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from danlu.artifact.uris import filesystem_of
from danlu.data.clean import CHANGES, Cleaned, Step, Values, make_step
from danlu.data.columns import as_label
from danlu.data.near import Seen, database
from danlu.data.row import Broken, Row
from danlu.data.row_texts import roles_of, row_text
from danlu.data.split import draw_split
from danlu.data.stream import Source, find, stream
from danlu.errors import DataError, StorageError
from danlu.spec import data as spec

SHARD_ROWS = 50_000
SHARD_BYTES = 16 << 20
EXAMPLES = 5


def needs_preparing(data: spec.Data) -> bool:
    """True if there are steps to run, rows to hold out or shards to make before a task may read its files."""
    return data.streaming or bool(data.clean) or (data.split is not None and not isinstance(data.split, spec.Given))


def prepare(data: spec.Data, seed: int, *, of_texts: bool = True) -> tuple[spec.Data, Cleaned]:
    """The same data as shards without steps left to do, and what was done; from `cache_dir` if it was done before.

    `of_texts`: a row is one text, or two, and its label; else every text in it counts, or rows that share a question would be duplicates.
    """
    if data.streaming and data.dev is None and data.split is None:
        data = data.model_copy(update={"split": spec.Ratio(dev_size=data.dev_size)})
    sources = {
        name: find(source, format=data.format, where=f"data.{name}")
        for name in ("dev", "test", "train")  # what is held out is seen before training rows are compared with it
        if (source := getattr(data, name)) is not None
    }
    folder = Path(data.cache_dir).expanduser() / "clean" / _key(data, sources, seed, of_texts)
    manifest = _manifest(folder)
    if manifest is None:
        with _alone(folder):  # several workers of one machine may come here at once
            manifest = _manifest(folder) or _prepare(data, sources, folder, seed, of_texts)
    label = manifest["label_column"]
    columns = data.columns if label is None or data.columns.label else data.columns.model_copy(update={"label": label})
    shards = {name: [str(folder / shard) for shard in names] or None for name, names in manifest["shards"].items()}
    if not shards.get("train"):
        raise DataError("data.clean left no training row", where="data.clean", fix="weaker filters; the report says what each removed")
    made = data.model_copy(
        update={"train": shards["train"], "dev": shards.get("dev"), "test": shards.get("test"), "format": "jsonl", "columns": columns}
        | {"clean": [], "split": None, "max_rows": None}
    )
    return made, Cleaned(**manifest["cleaned"])


def prepare_given(
    source: str | Sequence[str], data: spec.Data, seed: int, *, of_texts: bool = True
) -> tuple[str | Sequence[str], spec.Data]:
    """Other files than the job's, with the steps that change texts, as dev and test rows have them."""
    steps = [step for step in data.clean if isinstance(step, (*CHANGES, spec.DropBroken, spec.RepairBroken))]
    if not steps:
        return source, data
    files = [source] if isinstance(source, str) else list(source)
    only = data.model_copy(update={"train": files, "dev": None, "test": None, "clean": steps, "split": None, "streaming": False})
    made, _ = prepare(only, seed, of_texts=of_texts)
    return made.train, made


def _key(data: spec.Data, sources: Mapping[str, Sequence[Source]], seed: int, of_texts: bool) -> str:
    asked = data.model_dump(mode="json", include={"clean", "split", "columns", "max_rows"})
    digest = sha256(json.dumps([2, of_texts, asked, seed if data.split is not None else 0], sort_keys=True).encode())
    for name, found in sources.items():
        for source in found:
            digest.update(json.dumps([name, _absolute(source.path), source.format, *_state_of(source)]).encode())
    return digest.hexdigest()[:24]


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


def _state_of(source: Source) -> list[str]:
    if source.format == "hub":
        return []
    filesystem, path = filesystem_of(source.path)
    info = filesystem.info(path)
    return [str(info.get(name)) for name in ("size", "mtime", "created", "etag", "ETag", "LastModified") if info.get(name) is not None]


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    whole = all((folder / shard).exists() for names in manifest["shards"].values() for shard in names)
    return manifest if whole else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{folder.name}.lock").open("w")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cannot_write(folder: Path, error: Exception) -> StorageError:
    return StorageError(
        f"cleaned rows cannot be written: {error}", where=str(folder), fix="free some space, or data.cache_dir: another folder"
    )


def _prepare(data: spec.Data, sources: Mapping[str, Sequence[Source]], folder: Path, seed: int, of_texts: bool) -> dict[str, Any]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        connection = database(folder / "state.sqlite")
        try:
            connection.execute("create table if not exists done (name text primary key, value text)")
            run = _Run(data, folder, connection, of_texts)
            for name, found in sources.items():
                run.clean(name, found)
            shards = {name: run.shards[name] for name in sources}
            rows_out = dict(run.rows_out)
            if data.split is not None and not isinstance(data.split, spec.Given):
                shards, drawn = _hold_out(data.split, folder, shards, run.roles.get("train", {}), seed)
                rows_out |= drawn
        finally:
            connection.close()
        label = next((source.label_column for found in sources.values() for source in found if source.label_column), None)
        order = [name for name in ("train", "dev", "test") if name in shards]
        manifest = {
            "shards": {name: shards[name] for name in order},
            "label_column": label,
            "cleaned": {
                "rows_in": {name: run.rows_in[name] for name in order if name in sources},
                "rows_out": {name: rows_out[name] for name in order},
                "removed": {name: dict(run.removed[name]) for name in order if name in sources},
                "changed": {name: dict(run.changed[name]) for name in order if name in sources},
                "reasons": {name: run.reasons[name] for name in order if name in sources},
            },
        }
        (folder / ".manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(folder / ".manifest.json", folder / "manifest.json")
        kept = {name for names in shards.values() for name in names}
        for leftover in [*folder.glob("state.sqlite*"), *(shard for shard in folder.glob("*.jsonl") if shard.name not in kept)]:
            leftover.unlink()
    except (OSError, sqlite3.OperationalError) as error:
        raise _cannot_write(folder, error) from error
    return manifest


class _Run:
    """One pass over every split's files."""

    def __init__(self, data: spec.Data, folder: Path, connection: sqlite3.Connection, of_texts: bool) -> None:
        self.of_texts, self.data, self.folder, self.connection = of_texts, data, folder, connection
        self.shards: dict[str, list[str]] = {}
        self.rows_in: Counter[str] = Counter()
        self.rows_out: Counter[str] = Counter()
        self.removed: dict[str, Counter[str]] = {}
        self.changed: dict[str, Counter[str]] = {}
        self.reasons: dict[str, list[str]] = {}
        self.roles: dict[str, dict[str, str]] = {}
        self.total = 0
        """Rows of all splits so far: what `Seen` remembers a row by."""

    def clean(self, name: str, sources: Sequence[Source]) -> None:
        """Every row of a split through its steps, into shards."""
        shards, writer = self._restore(name), None
        done = self.rows_in[name]
        for number, item in enumerate(self._items(name, sources), start=1):
            if number <= done:
                if not self.roles.get(name) and isinstance(item, Row):
                    self.roles[name] = self._roles(item, name, sources)
                continue
            if writer is None:
                writer = _Writer(self.folder, f"{name}-{len(shards):05d}.jsonl")
            self.rows_in[name] += 1
            self.total += 1
            values = self._through(item, name, sources)
            if values is not None:
                self.rows_out[name] += 1
                writer.add(values)
            if writer.is_full:
                shards.append(writer.finish())
                writer = None
                self._commit(name, shards)
        if not self.rows_in[name]:
            raise DataError(f"{sources[0].path} has a header but no rows", where=f"data.{name}", fix="a file with at least one row")
        if writer is not None:
            if writer.rows:
                shards.append(writer.finish())
            else:
                writer.discard()
        self.shards[name] = shards
        self._commit(name, shards)

    def _items(self, name: str, sources: Sequence[Source]) -> Iterator[Row | Broken]:
        left = self.data.max_rows
        for source in sources:
            for item in stream(source, where=f"data.{name}"):
                if left is not None and left <= 0:
                    return
                left = None if left is None else left - 1
                yield item

    def _roles(self, row: Row, name: str, sources: Sequence[Source]) -> dict[str, str]:
        label = next((source.label_column for source in sources if source.path == row.source), None)
        return roles_of(row.values, self.data.columns, label, f"data.{name}", of_texts=self.of_texts)

    def _through(self, item: Row | Broken, name: str, sources: Sequence[Source]) -> Values | None:
        if isinstance(item, Broken):
            kind: str | None = next((one.kind for one in self.data.clean if isinstance(one, spec.DropBroken | spec.RepairBroken)), None)
            if kind is None:
                raise item.refusal(f"data.{name}")
            mends = kind == "repair_broken" and item.repaired is not None
            (self.changed if mends else self.removed)[name][kind] += 1
            if len(self.reasons[name]) < EXAMPLES:
                self.reasons[name].append(
                    f"{Path(item.source).name}, line {item.line}: {item.reason}: {'repaired' if mends else 'dropped'}"
                )
            if not mends or item.repaired is None:
                return None
            item = Row(item.repaired, item.source, item.line)
        if not self.roles.get(name):
            self.roles[name] = self._roles(item, name, sources)
        values: Values | None = item.values
        for (told, act), seen in zip(self._steps(name), self._seen, strict=True):
            assert values is not None
            if act is not None:
                after = act(values, self.total)
                if after is None:
                    self.removed[name][told] += 1
                    return None
                self.changed[name][told] += after != values
                values = after
            elif seen is not None:
                seen.add(row_text(values, self.roles[name]), self.total)  # training rows like it will go
        return values

    def _steps(self, name: str) -> list[tuple[str, Step | None]]:
        """(kind, function) of each step; no function where a step is not for this split."""
        if getattr(self, "_made_for", None) != name:
            self._made_for, self._made, self._seen = name, [], []
            for number, step in enumerate(self.data.clean):
                act, seen = make_step(step, self.roles[name], self.connection, number, where="data.clean")
                applies = name == "train" or isinstance(step, CHANGES)
                told = step.kind if sum(other.kind == step.kind for other in self.data.clean) == 1 else f"{step.kind} ({number + 1})"
                self._made.append((told, act if applies else None))
                self._seen.append(seen if getattr(step, "decontaminate", False) else None)
        return self._made

    _made: list[tuple[str, Step | None]]
    _seen: list[Seen | None]

    def _commit(self, name: str, shards: Sequence[str]) -> None:
        """What was seen and how far it came, at once: rows of a shard that is made again must not meet themselves."""
        state = {
            "shards": list(shards),
            "rows_in": self.rows_in[name],
            "rows_out": self.rows_out[name],
            "removed": self.removed[name],
            "changed": self.changed[name],
            "reasons": self.reasons[name],
            "total": self.total,
        }
        self.connection.execute("insert or replace into done values (?, ?)", (name, json.dumps(state)))
        self.connection.execute("commit")
        self.connection.execute("begin")

    def _restore(self, name: str) -> list[str]:
        found = self.connection.execute("select value from done where name = ?", (name,)).fetchone()
        state = json.loads(found[0]) if found else {}
        if missing := next((shard for shard in state.get("shards", []) if not (self.folder / shard).exists()), None):
            raise StorageError(f"{self.folder / missing} is gone", where=str(self.folder), fix=f"remove the folder: rm -r {self.folder}")
        self.rows_in[name], self.rows_out[name] = state.get("rows_in", 0), state.get("rows_out", 0)
        self.removed[name], self.changed[name] = Counter(state.get("removed", {})), Counter(state.get("changed", {}))
        self.reasons[name] = list(state.get("reasons", []))
        self.total = max(self.total, state.get("total", 0))
        return list(state.get("shards", []))


class _Writer:
    """One shard: whole in its place, or not there."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.rows = folder, name, 0
        self.file = (folder / f".{name}").open("w", encoding="utf-8")

    def add(self, values: Values) -> None:
        self.file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self.rows += 1

    @property
    def is_full(self) -> bool:
        return self.rows >= SHARD_ROWS or self.file.tell() >= SHARD_BYTES

    def finish(self) -> str:
        self.file.close()
        os.replace(self.folder / f".{self.name}", self.folder / self.name)
        return self.name

    def discard(self) -> None:
        self.file.close()
        (self.folder / f".{self.name}").unlink()


def _hold_out(
    split: spec.Ratio | spec.Stratified | spec.Group | spec.Time,
    folder: Path,
    shards: Mapping[str, list[str]],
    roles: Mapping[str, str],
    seed: int,
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The training shards dealt out to train, dev and test. Memory: a key and a byte a row."""
    column = {"stratified": roles.get("label")}.get(split.kind, getattr(split, "column", None))
    if split.kind == "stratified" and column is None:
        raise DataError(
            "rows have no label to keep the share of", where="data.split.kind", fix="data.columns.label: NAME, or split.kind=ratio"
        )
    keys: list[str] = []
    num_rows = 0
    for values in _read(folder, shards["train"]):
        num_rows += 1
        if column is not None:
            if column not in values:
                raise DataError(
                    f"row {num_rows} has no column {column!r}; it has {', '.join(map(repr, values))}",
                    where="data.split.column",
                    fix="a column that every row has",
                )
            keys.append(_interned(as_label(values[column])))
    sides = draw_split(split, num_rows, keys if column is not None else None, seed)
    made = {name: list(names) for name, names in shards.items() if name != "train"}
    names = ("train", "dev", "test")
    writers: dict[str, _Writer] = {}
    counts: Counter[str] = Counter()
    drawn: dict[str, list[str]] = {}
    for side, values in zip(sides, _read(folder, shards["train"]), strict=True):
        name = names[int(side)]
        if name not in writers:
            writers[name] = _Writer(folder, f"split-{name}-{len(drawn.setdefault(name, [])):05d}.jsonl")
        writers[name].add(values)
        counts[name] += 1
        if writers[name].is_full:
            drawn[name].append(writers.pop(name).finish())
    for name, writer in writers.items():
        drawn[name].append(writer.finish())
    return made | drawn, dict(counts)


_known: dict[str, str] = {}


def _interned(key: str) -> str:
    """One object for equal keys: labels and groups repeat."""
    if len(_known) > 100_000:
        _known.clear()
    return _known.setdefault(key, key)


def _read(folder: Path, shards: Sequence[str]) -> Iterator[Values]:
    for shard in shards:
        with (folder / shard).open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield json.loads(line)
