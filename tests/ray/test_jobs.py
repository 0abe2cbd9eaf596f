"""`python -m danlu.train` as a Kubernetes job runs it: handed to Ray's own jobs API, which is guarded by a token."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danlu import sdk
from danlu.artifact.runs import latest_run
from danlu.errors import StorageError
from danlu.spec.files import dump
from danlu.spec.train import TrainJob
from danlu.train import driver


@pytest.fixture
def jobs(ray_local: Any) -> Any:
    """Ray's client for its jobs, with the token of this session's Ray."""
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(f"http://{ray_local.address_info['webui_url']}")


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


def entrypoint(spec: Path) -> str:
    return f"{sys.executable} -m danlu.train {spec}"


def test_a_job_runs_on_the_cluster_that_took_it_and_stores_its_bundle(
    jobs: Any, make_job: Callable[..., TrainJob], wait_for: Callable[..., Any], tmp_path: Path
) -> None:
    job = make_job("submitted", workers={"num_workers": 1}, cluster={"image": "i"})
    (tmp_path / "job.yaml").write_text(dump(job))
    (tmp_path / "bad.yaml").write_text(dump(job.model_copy(update={"name": "bad"})).replace("max_steps", "max_step"))

    def submitted(name: str) -> str | None:
        try:
            return str(jobs.submit_job(entrypoint=entrypoint(tmp_path / name), entrypoint_num_cpus=1))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            return None  # Ray's agent of jobs starts after Ray

    ids = [wait_for("an agent", lambda name=name: submitted(name)) for name in ("job.yaml", "bad.yaml")]
    for one in ids:
        wait_for(lambda one=one: jobs.get_job_logs(one), lambda one=one: jobs.get_job_status(one).is_terminal())
    log, bad = map(jobs.get_job_logs, ids)

    assert jobs.get_job_status(ids[0]) == "SUCCEEDED", log
    assert "stored as submitted@v1" in log
    assert sdk.open_bundle("submitted@latest", job.storage).meta.scores["test"]["accuracy"] > 0
    run = latest_run(job.storage, "submitted")
    assert run is not None
    assert run.status()["state"] == "finished"

    assert jobs.get_job_status(ids[1]) == "FAILED"
    assert "max_step (line" in bad
    assert "exit code 2" in jobs.get_job_info(ids[1]).message
