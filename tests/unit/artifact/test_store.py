"""Versions, aliases and references; an interrupted put leaves nothing that looks whole."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from danlu.artifact.bundle import FILE, BundleMeta, Lineage, read_bundle, write_bundle
from danlu.artifact.store import Ref, Store, ensure_writable
from danlu.errors import ModelError, StorageError
from danlu.spec.task import Classification


def make(folder: Path, weights: bytes) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=1, created="")
    write_bundle(
        folder, BundleMeta(name="topics", task=Classification(), labels=["a", "b"], max_length=8, precision="fp32", lineage=lineage)
    )
    return folder


@pytest.fixture
def store(any_storage: str, tmp_path: Path) -> Store:
    return Store(any_storage, cache_dir=tmp_path / "cache")


def weights_of(folder: Path) -> bytes:
    return (read_bundle(folder, verify=True).path / "model" / "model.safetensors").read_bytes()


def test_versions_count_up_and_each_is_found_again(store: Store, tmp_path: Path) -> None:
    refs = [store.put(make(tmp_path / text, text.encode()), "topics") for text in ("one", "two", "three")]
    assert refs == [Ref("topics", 1), Ref("topics", 2), Ref("topics", 3)]
    assert str(refs[1]) == "topics@v2"
    assert (store.names(), store.versions("topics"), store.versions("other")) == (["topics"], [1, 2, 3], [])
    assert weights_of(store.resolve("topics@v2")) == b"two"
    assert weights_of(store.resolve("topics")) == b"three"
    assert read_bundle(store.resolve("topics@v2")).meta.version == 2


def test_the_same_content_is_not_stored_twice(store: Store, tmp_path: Path) -> None:
    first = store.put(make(tmp_path / "a", b"same"), "topics")
    assert store.put(make(tmp_path / "b", b"same"), "topics") == first
    assert store.put(make(tmp_path / "c", b"other"), "topics").version == 2


def test_an_alias_moves_and_is_resolved(store: Store, tmp_path: Path) -> None:
    for text in ("one", "two"):
        store.put(make(tmp_path / text, text.encode()), "topics")
    store.set_alias("topics", "production", 2)
    assert weights_of(store.resolve("topics@production")) == b"two"
    store.set_alias("topics", "production", 1)
    store.set_alias("topics", "latest", 2)
    assert store.aliases("topics") == {"production": 1, "latest": 2}
    assert weights_of(store.resolve("topics@production")) == b"one"


def test_a_folder_or_a_uri_is_a_reference(store: Store, tmp_path: Path) -> None:
    folder = make(tmp_path / "elsewhere", b"mine")
    assert store.resolve(str(folder)) == folder
    assert store.resolve(f"file://{folder}") == folder
    ref = store.put(folder, "topics")
    assert weights_of(store.resolve(f"{store.uri}/bundles/topics/v{ref.version:04d}")) == b"mine"


def test_a_remote_bundle_is_downloaded_once(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}", cache_dir=tmp_path / "cache")
    store.put(make(tmp_path / "a", b"remote"), "topics")
    local = store.resolve("topics@v1")
    assert local.is_relative_to(tmp_path / "cache")
    store.filesystem.pipe_file(f"/{tmp_path.name}/bundles/topics/v0001/model/model.safetensors", b"REMOTE")
    assert weights_of(store.resolve("topics@v1")) == b"remote"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [local.name]


def test_errors_say_what_there_is(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no bundle named 'topics'; it has: none yet"):
        store.resolve("topics")
    store.put(make(tmp_path / "a", b"a"), "topics")
    store.set_alias("topics", "latest", 1)
    with pytest.raises(ModelError, match="has no bundle named 'topic'; it has: topics") as raised:
        store.resolve("topic@latest")
    assert raised.value.fix == "did you mean topics?"
    for wrong in ("v2", "staging"):
        with pytest.raises(ModelError, match=f"'topics' has no '{wrong}'") as raised:
            store.resolve(f"topics@{wrong}")
        assert raised.value.fix == "topics@ one of: v1, latest"
    with pytest.raises(ModelError, match="'topics' has no 'v9'"):
        store.set_alias("topics", "latest", 9)
    for name in ("v2", "Latest", "a/b", ""):
        with pytest.raises(ModelError, match="cannot name a version"):
            store.set_alias("topics", name, 1)


def test_a_folder_that_is_no_bundle_is_said_to_be_none(store: Store, tmp_path: Path) -> None:
    folder = make(tmp_path / "half", b"half")
    (folder / FILE).unlink()
    for reference in (str(folder), f"file://{folder}"):
        with pytest.raises(ModelError, match=r"half is no bundle: it has no bundle\.json"):
            read_bundle(store.resolve(reference))
    with pytest.raises(ModelError, match=r"is no bundle: it has no bundle\.json"):
        store.resolve("memory://nothing/there")
    fsspec.filesystem("memory").pipe_file("/damaged/bundle.json", b'{"format": 1, "dig')
    with pytest.raises(ModelError, match=r"damaged/bundle.json is damaged"):
        store.resolve("memory://damaged")


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_put_leaves_nothing_that_looks_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store.put(make(tmp_path / "a", b"a"), "topics")
    folder = make(tmp_path / "b", b"b")
    (folder / "model" / "config.json").write_text("{}")
    write_bundle(folder, read_bundle(folder).meta)
    put_file, done = type(store.filesystem).put_file, []

    def full(self: Any, *arguments: Any, **options: Any) -> None:
        if len(done) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(arguments)
        put_file(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(store.filesystem), "put_file", full)
        with pytest.raises(StorageError, match="No space left on device") as raised:
            store.put(folder, "topics")
        assert "free some space" in raised.value.fix
    assert store.versions("topics") == [1]
    assert not store.filesystem.exists(str(store.root / "topics" / "v0002"))
    assert weights_of(store.resolve("topics")) == b"a"
    assert weights_of(store.resolve(str(store.put(folder, "topics")))) == b"b"


def test_a_version_without_its_bundle_json_is_no_version_and_its_number_is_not_used_again(store: Store, tmp_path: Path) -> None:
    store.filesystem.makedirs(str(store.root / "topics" / "v0001" / "model"))
    store.filesystem.pipe_file(str(store.root / "topics" / "v0001" / "model" / "model.safetensors"), b"killed in between")
    assert (store.versions("topics"), store.names()) == ([], [])
    assert store.put(make(tmp_path / "a", b"a"), "topics").version == 2
    with pytest.raises(ModelError, match="'topics' has no 'v1'"):
        store.resolve("topics@v1")


def test_puts_at_the_same_time_get_versions_of_their_own(tmp_path: Path) -> None:
    folders = [make(tmp_path / f"bundle-{i}", f"weights {i}".encode()) for i in range(8)]
    gate, refs, failures = threading.Barrier(len(folders)), {}, []

    def put(i: int) -> None:
        try:
            gate.wait(timeout=10)
            refs[i] = Store(str(tmp_path / "runs")).put(folders[i], "topics")
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=put, args=(i,)) for i in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    store = Store(str(tmp_path / "runs"))
    assert not failures
    assert sorted(ref.version for ref in refs.values()) == store.versions("topics") == list(range(1, 9))
    for i, ref in refs.items():
        assert weights_of(store.resolve(str(ref))) == f"weights {i}".encode()


def test_a_damaged_download_is_fetched_again(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}", cache_dir=tmp_path / "cache")
    store.put(make(tmp_path / "a", b"remote"), "topics")
    (store.resolve("topics") / "model" / "model.safetensors").unlink()
    assert weights_of(store.resolve("topics")) == b"remote"


def test_storage_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = make(tmp_path / "a", b"a")
    for uri in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), f"file://{tmp_path}/file"):
        for attempt in (lambda uri=uri: ensure_writable(uri), lambda uri=uri: Store(uri).put(folder, "topics")):
            with pytest.raises(StorageError, match="cannot write to") as raised:
                attempt()
            assert raised.value.where == "storage"
            assert "folder" in raised.value.fix
    with pytest.raises(StorageError, match="nosuchscheme") as raised:
        ensure_writable("nosuchscheme://bucket/runs")
    assert "s3://" in raised.value.fix


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    ensure_writable(str(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []
    ensure_writable(f"memory://{tmp_path.name}/probe")
    assert fsspec.filesystem("memory").find(f"/{tmp_path.name}/probe") == []


def test_an_alias_file_holds_only_a_version(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put(make(tmp_path / "a", b"a"), "topics")
    store.set_alias("topics", "latest", 1)
    assert [path.name for path in (tmp_path / "bundles" / "topics" / "aliases").iterdir()] == ["latest.json"]
    assert json.loads((tmp_path / "bundles" / "topics" / "aliases" / "latest.json").read_text()) == {"version": 1}


def test_an_error_of_a_clients_own_is_a_storage_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        raise EOFError("the login service hung up")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", lost)
    with pytest.raises(StorageError, match="cannot write to memory://x: the login service hung up"):
        ensure_writable("memory://x")
