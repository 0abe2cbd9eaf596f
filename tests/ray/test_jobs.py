"""Jobs and services on a real Ray, whose dashboard is guarded by a token: from the command line to what is stored and answered."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from danlu import on_local, on_ray, sdk
from danlu.cli import app
from danlu.errors import ClusterError, SpecError, StorageError
from danlu.spec.files import dump
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob
from danlu.train import driver


def danlu(*arguments: str, exits: int = 0) -> str:
    done: Result = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == exits, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def on(ray_local: Any) -> str:
    return f"http://{ray_local.address_info['webui_url']}"


def test_a_bundle_is_scored_with_what_a_worker_has(ray_local: Any, make_job: Callable[..., TrainJob]) -> None:
    job = make_job("scored", workers={"num_workers": 2, "cpus_per_worker": 2})

    # Defined here, it travels by value.
    def where(mistake: bool) -> tuple[int, list[int], float]:
        import ray

        if mistake:
            raise StorageError("no room", where="storage", fix="free some")
        context = ray.get_runtime_context()
        return os.getpid(), ray.get_gpu_ids(), context.get_assigned_resources()["CPU"]

    process, gpus, cores = driver.on_a_worker(job, where, False)
    assert process != os.getpid()
    assert (gpus, cores) == ([], 2.0)
    with pytest.raises(StorageError, match="no room") as refused:
        driver.on_a_worker(job, where, True)
    assert refused.value.fix == "free some"


@pytest.mark.soak
def test_a_job_is_submitted_followed_cancelled_resumed_and_deleted(
    on: str, make_job: Callable[..., TrainJob], wait_for: Callable[..., Any], tmp_path: Path
) -> None:
    from ray.job_submission import JobSubmissionClient

    job = make_job("far", workers={"num_workers": 1}, max_steps=100_000, checkpoint={"save_steps": 20})
    (tmp_path / "job.yaml").write_text(dump(job))
    assert f"danlu jobs logs -f far --on {on}" in danlu("train", str(tmp_path / "job.yaml"), "--on", on)
    with pytest.raises(ClusterError, match="there is a job named 'far' already"):
        on_ray.submit(on_ray.connect(on), job)

    at = on_ray.connect(on)
    wait_for(lambda: on_ray.status(at, "far").text(), lambda: any("step 1/" in line for line in on_ray.logs(at, "far", follow=False)))
    assert [one.state for one in on_ray.jobs(at) if one.name == "far"] == ["running"]
    assert danlu("jobs", "wait", "far", "--on", on, "--timeout", "0", exits=124)
    assert "is running already" in str(CliRunner().invoke(app, ["jobs", "resume", "far", "--on", on]).exception)
    assert "jobs resume far --on http" in danlu("jobs", "cancel", "far", "--on", on)
    assert "far: cancelled" in danlu("jobs", "wait", "far", "--on", on, exits=130)

    assert "far goes on" in danlu("jobs", "resume", "far", "--on", on)
    followed = iter(on_ray.logs(at, "far", follow=True))
    assert next(line for line in followed if "going on" in line or "resume" in line.lower() or "step " in line)
    assert "is deleted" in danlu("jobs", "delete", "far", "--on", on)
    assert not [one for one in JobSubmissionClient(on).list_jobs() if (one.metadata or {}).get("danlu.ai/name") == "far"]
    with pytest.raises(ClusterError, match="there is no job named 'far'"):
        on_ray.status(at, "far")


def test_jobs_run_on_the_cluster_that_took_them_and_say_how_they_ended(on: str, make_job: Callable[..., TrainJob], tmp_path: Path) -> None:
    job = make_job("submitted", workers={"num_workers": 1}, cluster={"image": "i"})
    broken = make_job("broken", workers={"num_workers": 1}, data={"train": str(tmp_path / "nowhere.csv")})
    at = on_ray.connect(on)
    for one in (broken, job):
        on_ray.submit(at, one)
    assert on_ray.wait(at, "submitted", timeout_s=0) is None

    found = on_ray.wait(at, "broken", timeout_s=120)
    assert found is not None
    assert (found.state, "nowhere.csv" in found.why, bool(found.fix)) == ("failed", True, True), found.text()
    assert found.log
    assert json.loads(danlu("jobs", "show", "broken", "--on", on, "--json"))["state"] == "failed"
    assert "broken: failed" in danlu("jobs", "wait", "broken", "--on", on, exits=1)
    (submission,) = on_ray._tries(at, "broken")
    assert submission.metadata[on_ray.SPEC] == dump(broken)
    assert submission.runtime_env["working_dir"].startswith("gcs://")  # a folder with the spec, and nothing else
    assert "exit code 2" in submission.message

    assert "submitted: succeeded" in danlu("jobs", "wait", "submitted", "--on", on)
    assert "stored as submitted@v1" in danlu("jobs", "logs", "submitted", "--on", on)
    assert sdk.open_bundle("submitted@latest", job.storage).meta.scores["test"]["accuracy"] > 0
    # What it was is still told by its storage, when nobody asks the cluster.
    assert on_local.status(job.storage, "submitted").state == "succeeded"


@pytest.mark.soak
def test_a_service_is_deployed_scaled_rolled_back_and_deleted(
    on: str, ray_local: object, wait_for: Callable[..., Any], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = Service.model_validate({"name": "far-echo", "engine": {"kind": "echo", "labels": ["a"]}, "http": {"port": port}})
    (tmp_path / "service.yaml").write_text(dump(service))
    at = on_ray.connect(on)
    try:
        assert "is deployed to" in danlu("serve", str(tmp_path / "service.yaml"), "--on", on)

        def labels() -> set[str]:
            if on_ray.service(at, "far-echo").phase != "running":
                return set()
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/classify", json={"model": "far-echo", "input": "text"}, timeout=60)
            return {answer.json()["data"][0]["label"]} if answer.status_code == 200 else set()

        wait_for(lambda: on_ray.service(at, "far-echo").text(), lambda: labels() == {"a"})
        assert "far-echo: running, 1 replicas answer" in danlu("services", "show", "far-echo", "--on", on)
        with pytest.raises(ClusterError, match="serves far-echo already"):
            on_ray.deploy(at, service.model_copy(update={"name": "other"}))
        with pytest.raises(ClusterError, match="deployed once only"):
            on_ray.rollback(at, "far-echo")

        assert "1 to 2 replicas" in danlu("services", "scale", "far-echo", "--max", "2", "--on", on)
        on_ray.deploy(at, service.model_copy(update={"engine": service.engine.model_copy(update={"labels": ["b"]})}))
        wait_for(lambda: on_ray.service(at, "far-echo").text(), lambda: labels() == {"b"})
        assert "goes back" in danlu("services", "rollback", "far-echo", "--on", on)
        wait_for(lambda: on_ray.service(at, "far-echo").text(), lambda: labels() == {"a"})
        assert on_ray._deployed(at, "far-echo").autoscaling.max_replicas == 2
        assert "is deleted" in danlu("services", "delete", "far-echo", "--on", on)
        assert not [one for one in on_ray.services(at) if one.phase != "starting"]
    finally:
        from danlu.serve import app as serving

        serving.stop()


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("ray://head:10001", "port 10001 is Ray Client's"),
        ("http://", "is no Ray cluster"),
        ("ray://head/path", "is no Ray cluster"),
    ],
)
def test_an_address_that_is_none_is_refused(where: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        on_ray.connect(where)


def test_a_cluster_that_is_not_there_or_has_another_token_is_said(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", on)  # which Ray's own client would take instead
    with pytest.raises(ClusterError, match="no answer: Failed to connect"):
        on_ray.connect("http://127.0.0.1:9")
    code = f"from danlu import on_ray; on_ray.connect({on!r})"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ClusterError" in done.stderr
    assert "Authentication failed" in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr
