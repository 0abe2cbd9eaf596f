"""A job on two workers whose storage is a bucket, as a user starts it: Ray Train's files, checkpoints, the bundle; killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import stores
import torch

from danlu.artifact.bundle import BundleMeta, Lineage, read_bundle, write_bundle
from danlu.artifact.runs import latest_run, open_run, run_numbers
from danlu.artifact.store import Store, ensure_writable
from danlu.artifact.uris import filesystem_of
from danlu.errors import StorageError
from danlu.spec.task import Classification
from danlu.train.checkpoint import Checkpoints, Progress
from danlu.train.run import LocalRun

pytestmark = pytest.mark.soak


def danlu(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "danlu.cli", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_a_killed_job_on_two_workers_goes_on_from_the_bucket(write_spec: Callable[..., Path], s3_uri: str, tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "job.yaml", storage=s3_uri, checkpoint={"save_steps": 10}, compress=None, serve=None, trackers=None)
    first = danlu("train", str(spec), cwd=tmp_path)
    try:
        deadline = time.monotonic() + 300
        while True:  # until a checkpoint is whole
            run = latest_run(s3_uri, "topics")
            filesystem, path = filesystem_of(f"{s3_uri}/runs/topics/0001")
            if run is not None and any(file.endswith("/manifest.json") for file in filesystem.find(path)):
                break
            assert first.poll() is None, first.stdout.read() if first.stdout else ""
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    again = danlu("train", str(spec), cwd=tmp_path)
    told, _ = again.communicate(timeout=400)
    assert again.returncode == 0, told
    assert "stored as topics@v1" in told
    run = latest_run(s3_uri, "topics")
    assert run is not None
    assert run.number == 1
    assert [record["event"] for record in run.records() if record["kind"] == "event"].count("resumed") == 1
    assert Store(s3_uri, cache_dir=tmp_path / "bundles").versions("topics") == [1]
    assert not (tmp_path / "s3:").exists(), "nothing took the URI for a folder"


def test_a_store_that_does_not_answer_is_told_with_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**stores.ENVIRONMENT, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="NETWORK_CONNECTION") as raised:
        ensure_writable("s3://danlu-tests/runs")
    assert raised.value.fix == "a network that reaches it, or another AWS_ENDPOINT_URL than http://127.0.0.1:9"


def test_googles_store_keeps_runs_bundles_and_checkpoints_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcsfs", reason="pip install 'danlu[gcs]'")
    (tmp_path / "bundle" / "model").mkdir(parents=True)
    (tmp_path / "bundle" / "model" / "model.safetensors").write_bytes(b"weights")
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=1, created="")
    meta = BundleMeta(name="topics", task=Classification(), labels=["a", "b"], max_length=8, precision="fp32", lineage=lineage)
    write_bundle(tmp_path / "bundle", meta)
    with stores.google() as endpoint:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        uri = f"gs://{stores.BUCKET}/{tmp_path.name}"
        ensure_writable(uri)
        run = open_run(uri, "topics", "digest")
        run.set_status("running", spec_digest="digest")
        assert open_run(uri, "topics", "digest").resumed
        store = Store(uri, cache_dir=tmp_path / "cache")
        assert str(store.put(tmp_path / "bundle", "topics")) == "topics@v1"
        assert read_bundle(store.resolve("topics"), verify=True).meta.version == 1
        checkpoints = Checkpoints(LocalRun(torch.device("cpu")), f"{uri}/checkpoints", shape="ddp", keep=1)
        for step in (1, 2):
            checkpoints.save(Progress(step=step), a_part)
        assert checkpoints.steps() == [2]
        filesystem, path = filesystem_of(run.uri)
        filesystem.rm(path, recursive=True)
        assert run_numbers(uri, "topics") == []


def a_part(folder: Path) -> None:
    (folder / "part").write_bytes(b"whole")
