"""Merged weights stay as long as a run starts from them or an adapter stands on them, and go after that."""

from __future__ import annotations

import os
from pathlib import Path

from typer.testing import CliRunner

from danlu.artifact.bundle import FILE, BundleMeta, Lineage, write_bundle
from danlu.artifact.merged import MERGED, MERGED_FROM, is_whole, let_go
from danlu.artifact.runs import SPEC, open_run
from danlu.artifact.store import Store
from danlu.artifact.uris import filesystem_of
from danlu.cli import app
from danlu.spec.files import dump
from danlu.spec.task import Classification
from danlu.spec.train import TrainJob


def merge(storage: str, name: str, *, whole: bool = True) -> str:
    """A model folder of a megabyte's stand-in; where it is."""
    uri = f"{storage}/{MERGED}/{name}"
    filesystem, path = filesystem_of(uri)
    filesystem.makedirs(path, exist_ok=True)
    for file in ("model.safetensors", *([MERGED_FROM] if whole else [])):
        filesystem.pipe_file(f"{path}/{file}", b"{}")
    return uri


def train(storage: str, name: str, model: str) -> None:
    """A run that starts from a model."""
    job = TrainJob.model_validate({"name": name, "model": {"model_name_or_path": model}, "data": {"train": "t.csv"}, "storage": storage})
    run = open_run(storage, name, "digest")
    run.write(SPEC, dump(job))
    run.set_status("finished")


def store(storage: str, name: str, folder: Path, start: str, *, adapter: bool) -> None:
    """A bundle that was trained from a model, and stands on it if it is an adapter."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(name.encode())
    lineage = Lineage(
        spec={"model": {"model_name_or_path": start}},
        spec_digest="",
        data_digests={},
        code_version="",
        library_versions={},
        seed=1,
        created="",
    )
    about = {"weights": "adapter" if adapter else "full", "base_model": start if adapter else None}
    meta = BundleMeta(name=name, task=Classification(), labels=["a", "b"], max_length=8, precision="fp32", lineage=lineage, **about)  # type: ignore[arg-type]
    write_bundle(folder, meta)
    Store(storage).put(folder, name)


def there(storage: str) -> list[str]:
    filesystem, root = filesystem_of(f"{storage}/{MERGED}")
    return sorted(path.rpartition("/")[2] for path in filesystem.ls(root, detail=False))


def test_weights_that_a_run_starts_from_or_an_adapter_stands_on_stay_and_the_rest_goes(any_storage: str, tmp_path: Path) -> None:
    train(any_storage, "second", merge(any_storage, "a-0123456789abcdef"))
    store(any_storage, "on-it", tmp_path / "one", merge(any_storage, "b-0123456789abcdef"), adapter=True)
    store(any_storage, "from-it", tmp_path / "two", merge(any_storage, "c-0123456789abcdef"), adapter=False)
    merge(any_storage, "d-0123456789abcdef")
    merge(any_storage, "e-0123456789abcdef", whole=False)
    merge(any_storage, "f-0123456789abcdef")
    filesystem, damaged = filesystem_of(f"{any_storage}/bundles/half/v0001")
    filesystem.makedirs(damaged, exist_ok=True)
    filesystem.pipe_file(f"{damaged}/{FILE}", b'{"base_model": "f-0123456789abcdef"')
    assert len(there(any_storage)) == 6
    assert let_go(any_storage) == [], "one that is new may belong to a run that is about to begin"
    assert let_go(any_storage, rest_s=0) == ["c-0123456789abcdef", "d-0123456789abcdef", "e-0123456789abcdef"]
    assert there(any_storage) == ["a-0123456789abcdef", "b-0123456789abcdef", "f-0123456789abcdef"]
    assert is_whole(f"{any_storage}/{MERGED}/a-0123456789abcdef")
    assert not is_whole(f"{any_storage}/{MERGED}/e-0123456789abcdef")


def test_a_storage_without_merged_weights_has_none_to_let_go(any_storage: str) -> None:
    assert let_go(any_storage, rest_s=0) == []


def test_a_jobs_merged_weights_go_with_its_runs_but_not_under_one_that_takes_them_up(tmp_path: Path) -> None:
    storage = str(tmp_path)
    start = merge(storage, "a-0123456789abcdef")
    for name in ("first", "second"):
        train(storage, name, start)

    def delete(name: str) -> str:
        for file in Path(start).iterdir():
            os.utime(file, (0, 0))
        if name == "taken-up":
            assert is_whole(start)  # what a training asks before it starts from them
        return CliRunner().invoke(app, ["jobs", "delete", name, "--on", "local", "--storage", storage]).output

    assert delete("first") == "the runs of first are deleted; its bundles stay\n"
    train(storage, "taken-up", start)
    delete("second")
    assert delete("taken-up") == "the runs of taken-up are deleted; its bundles stay\n"
    train(storage, "third", start)
    assert "nothing needs any more are deleted, too: a-0123456789abcdef" in delete("third")
    assert there(storage) == []
