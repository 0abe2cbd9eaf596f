"""Jobs and services on a Ray cluster without Kubernetes, through its own door: Ray's jobs API, and Serve's beside it. Only specs travel.

A job is every submission that has its name in its metadata: `resume` adds one. A service's spec is its application's arguments; each
deployment also leaves a record among the jobs, from which `rollback` knows what was there before.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from danlu import traces
from danlu.errors import ClusterError, SpecError
from danlu.k8s.pods import KIND, NAME
from danlu.k8s.rayjob import SPEC_FILE
from danlu.k8s.rayservice import IMPORT_PATH, serve_config
from danlu.k8s.status import ENDED, LAST_LINES, JobStatus, Phase, ServiceStatus, not_there, why_of_log
from danlu.spec.files import dump, parse
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

Answer = TypeVar("Answer")

DASHBOARD_PORT = 8265
SPEC = "danlu.ai/spec"
"""Metadata of a submission: the spec, whole."""
POLL_S = 1.0
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray's client takes them for the better address, whatever it is told."""


@dataclass(frozen=True)
class RayCluster:
    """A connection: what was asked for with --on, and Ray's two clients."""

    on: str
    jobs: Any
    applications: Any


def connect(on: str) -> RayCluster:
    """By `ray://host`, whose dashboard is on its usual port, or by the dashboard's own URL."""
    url = urlsplit(on)
    if not url.hostname or url.path.strip("/") or url.query:
        raise SpecError(f"{on!r} is no Ray cluster", where="--on", fix="ray://HOST, or http://HOST:8265")
    if url.scheme == "ray" and url.port is not None:
        raise SpecError(
            f"port {url.port} is Ray Client's, and jobs go through the dashboard's",
            where="--on",
            fix=f"ray://{url.hostname} for port {DASHBOARD_PORT}, or http://{url.hostname}:PORT for another",
        )
    address = f"http://{url.hostname}:{DASHBOARD_PORT}" if url.scheme == "ray" else f"{url.scheme}://{url.netloc}"
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.job_submission import JobSubmissionClient

    hidden = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        with _said(on):
            return RayCluster(on, JobSubmissionClient(address), ServeSubmissionClient(address))
    finally:
        os.environ.update(hidden)


def submit(at: RayCluster, job: TrainJob) -> None:
    """Hand a job to Ray."""
    _check_reachable({"storage": [job.storage], "model.model_name_or_path": [job.model.model_name_or_path], **_rows(job)})
    if before := _tries(at, job.name):
        raise ClusterError(
            f"there is a job named {job.name!r} already ({_status(at, before).state})",
            where="name",
            fix=f"danlu jobs resume {job.name} --on {at.on} goes on with it; danlu jobs delete makes room; or --set name=...",
        )
    _submit(at, job)


def jobs(at: RayCluster) -> list[JobStatus]:
    """Every job of ours that the cluster knows."""
    names: dict[str, list[Any]] = {}
    for one in _submissions(at, "train"):
        names.setdefault(one.metadata[NAME], []).append(one)
    return [_status(at, tries) for tries in names.values()]


def status(at: RayCluster, name: str) -> JobStatus:
    """A job's state, and why."""
    return _status(at, _job(at, name), explain=True)


def logs(at: RayCluster, name: str, *, follow: bool) -> Iterator[str]:
    """Lines of the driver's log. With `follow`, until the job has ended."""
    for one in _job(at, name):
        if follow and not one.status.is_terminal():
            yield from _tail(at, one.submission_id)
        else:
            yield from _ask(at, at.jobs.get_job_logs, one.submission_id).splitlines()


def wait(at: RayCluster, name: str, *, timeout_s: float | None = None) -> JobStatus | None:
    """A job's state once it has ended; None if that took longer than `timeout_s`."""
    ends = None if timeout_s is None else time.monotonic() + timeout_s
    while (found := status(at, name)).state not in ENDED:
        left = POLL_S if ends is None else ends - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(POLL_S, left))
    return found


def cancel(at: RayCluster, name: str) -> str:
    """End a job's processes; what there is to say."""
    tries = _job(at, name)
    if not _ask(at, at.jobs.stop_job, tries[-1].submission_id):
        return f"{name} has ended already: {_status(at, tries).state}"
    return f"{name} is cancelled; danlu jobs resume {name} --on {at.on} goes on from its last checkpoint"


def resume(at: RayCluster, name: str) -> str:
    """Go on with a job that was cancelled, that failed or that has ended, from its last checkpoint: the same spec, submitted once more."""
    tries = _job(at, name)
    found = _status(at, tries)
    if found.state not in ENDED:
        raise ClusterError(f"{name} is {found.state} already", where="jobs resume", fix=f"danlu jobs logs -f {name} --on {at.on}")
    _submit(at, parse(TrainJob, tries[-1].metadata[SPEC], source=f"the spec of {name}"))
    return f"{name} goes on"


def delete(at: RayCluster, name: str) -> str:
    """End a job, and take its submissions from Ray's list. Its runs and bundles stay in the storage."""
    tries = _job(at, name)
    if not tries[-1].status.is_terminal():
        _ask(at, at.jobs.stop_job, tries[-1].submission_id)
        while not _ask(at, at.jobs.get_job_status, tries[-1].submission_id).is_terminal():
            time.sleep(POLL_S)
    for one in tries:
        _ask(at, at.jobs.delete_job, one.submission_id)
    return f"{name} is deleted; what it stored stays"


def deploy(at: RayCluster, service: Service) -> None:
    """Make or change a service; what else Serve runs there stays."""
    _check_reachable({"storage": [service.storage]} if service.bundle else {})
    details = _ask(at, at.applications.get_serve_details)
    config = {**serve_config(service), "http_options": _http(service, details)}
    others = {name: one for name, one in details["applications"].items() if name != service.name}
    taken = next((name for name, one in others.items() if one.get("route_prefix") == "/"), None)
    if taken is not None:
        raise ClusterError(
            f"this Ray cluster serves {taken} already, and a service answers at its root",
            where="name",
            fix=f"danlu services delete {taken} --on {at.on}, or another cluster",
        )
    _ask(at, at.applications.deploy_applications, {**config, "applications": [*config["applications"], *_as_they_are(others)]})
    # Ends at once: what stays is its entry in Ray's list.
    metadata = {KIND: "serve", NAME: service.name, SPEC: dump(service)}
    _ask(at, lambda: at.jobs.submit_job(entrypoint="true", submission_id=_new_id(service.name), metadata=metadata))


def services(at: RayCluster) -> list[ServiceStatus]:
    """Every service of ours that the cluster runs."""
    return [_service_status(at, name, one) for name, one in _applications(at).items()]


def service(at: RayCluster, name: str) -> ServiceStatus:
    """A service's phase, and why."""
    return _service_status(at, name, _application(at, name))


def scale(at: RayCluster, name: str, *, min_replicas: int | None, max_replicas: int | None) -> tuple[Service, str]:
    """Change how many replicas a service has; the spec it has now."""
    changes = {"min_replicas": min_replicas, "max_replicas": max_replicas}
    overrides = [f"autoscaling.{field}={number}" for field, number in changes.items() if number is not None]
    if not overrides:
        raise SpecError("neither --min nor --max is given", where="services scale", fix=f"danlu services scale {name} --on {at.on} --max 8")
    changed = parse(Service, dump(_deployed(at, name)), overrides, source=f"the spec of {name}")
    deploy(at, changed)
    return changed, ""


def rollback(at: RayCluster, name: str) -> tuple[Service, str]:
    """Go back to the spec that was deployed before; again goes forward."""
    now = _deployed(at, name)
    for record in reversed([one for one in _submissions(at, "serve") if one.metadata[NAME] == name]):
        before = parse(Service, record.metadata[SPEC], source=f"the spec of {name}")
        if before.model_copy(update={"cluster": None}) != now:
            deploy(at, before)
            return before, ""
    raise ClusterError(f"{name} was deployed once only: there is nothing before it", where="services", fix=f"danlu serve SPEC --on {at.on}")


def delete_service(at: RayCluster, name: str) -> str:
    """End a service. Its bundles stay in the storage."""
    _application(at, name)
    details = _ask(at, at.applications.get_serve_details)
    others = {other: one for other, one in details["applications"].items() if other != name}
    _ask(at, at.applications.deploy_applications, {"http_options": _running_http(details), "applications": _as_they_are(others)})
    return f"{name} is deleted; what it stored stays"


def _submit(at: RayCluster, job: TrainJob) -> None:
    workers = job.workers
    # One worker trains in the driver, which is placed where that much is free; several are placed by Ray Train.
    alone = {"entrypoint_num_cpus": workers.cpus_per_worker, "entrypoint_num_gpus": workers.gpus_per_worker}
    with tempfile.TemporaryDirectory(prefix="danlu-submit-") as folder:
        Path(folder, SPEC_FILE).write_text(dump(job), encoding="utf-8")
        _ask(
            at,
            lambda: at.jobs.submit_job(
                entrypoint=f"python -m danlu.train {SPEC_FILE}",
                submission_id=_new_id(job.name),
                runtime_env={"working_dir": folder, "env_vars": traces.to_environment(traces.carrier())},
                metadata={KIND: "train", NAME: job.name, SPEC: dump(job)},
                **(alone if workers.num_workers == 1 else {}),
            ),
        )


def _new_id(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:8]}"  # Ray takes an id once, even after it was deleted


def _check_reachable(paths: dict[str, list[str]]) -> None:
    """SpecError for what only this machine can mean. A whole path may be a mount that the cluster's nodes share."""
    for field, found in paths.items():
        for path in found:
            if "://" in path or path.startswith("/"):
                continue
            if path.startswith((".", "~")) or field == "storage" or Path(path).exists():
                raise SpecError(
                    f"{path} is a place of this machine, and the cluster's nodes are others",
                    where=field,
                    fix="a whole path that every node has, or an object store: s3://bucket/...",
                )


def _rows(job: TrainJob) -> dict[str, list[str]]:
    found = {split: getattr(job.data, split) for split in ("train", "dev", "test")}
    return {f"data.{split}": [paths] if isinstance(paths, str) else list(paths or []) for split, paths in found.items()}


def _submissions(at: RayCluster, kind: str) -> list[Any]:
    """Ours of a kind, the oldest first."""
    every = _ask(at, at.jobs.list_jobs)
    ours = [one for one in every if one.submission_id and (one.metadata or {}).get(KIND) == kind]
    return sorted(ours, key=lambda one: one.start_time or 0)


def _tries(at: RayCluster, name: str) -> list[Any]:
    return [one for one in _submissions(at, "train") if one.metadata[NAME] == name]


def _job(at: RayCluster, name: str) -> list[Any]:
    tries = _tries(at, name)
    if not tries:
        raise _unknown(at, "job", name, sorted({one.metadata[NAME] for one in _submissions(at, "train")}))
    return tries


def _status(at: RayCluster, tries: Sequence[Any], *, explain: bool = False) -> JobStatus:
    last = tries[-1]
    name, message = last.metadata[NAME], (last.message or "").strip()
    resume_it = f"danlu jobs resume {name} --on {at.on}"
    times: dict[str, Any] = {"created": _time(tries[0].start_time), "ended": _time(last.end_time)}
    match str(last.status):
        case "PENDING":
            return JobStatus(name, "starting", message, **times)
        case "RUNNING":
            return JobStatus(name, "running", **times)
        case "SUCCEEDED":
            return JobStatus(name, "succeeded", **times)
        case "STOPPED":
            return JobStatus(name, "cancelled", "it was stopped on its Ray cluster", resume_it, **times)
        case _:
            lines = _ask(at, at.jobs.get_job_logs, last.submission_id).splitlines() if explain else []
            why, fix = why_of_log(lines, message.split(", last available logs")[0])
            return JobStatus(name, "failed", why, fix or resume_it, log=tuple(lines[-LAST_LINES:]), **times)


def _tail(at: RayCluster, submission: str) -> Iterator[str]:
    loop, rest = asyncio.new_event_loop(), ""
    chunks = at.jobs.tail_job_logs(submission)
    try:
        while (chunk := _ask(at, lambda: loop.run_until_complete(anext(chunks, None)))) is not None:
            *lines, rest = (rest + chunk).split("\n")
            yield from lines
        if rest:
            yield rest
    finally:
        loop.run_until_complete(chunks.aclose())
        loop.close()


def _applications(at: RayCluster) -> dict[str, Any]:
    every = _ask(at, at.applications.get_serve_details)["applications"]
    return {name: one for name, one in every.items() if (one.get("deployed_app_config") or {}).get("import_path") == IMPORT_PATH}


def _application(at: RayCluster, name: str) -> Any:
    found = _applications(at)
    if name not in found:
        raise _unknown(at, "service", name, sorted(found))
    return found[name]


def _deployed(at: RayCluster, name: str) -> Service:
    return Service.model_validate(_application(at, name)["deployed_app_config"]["args"])


def _service_status(at: RayCluster, name: str, one: Any) -> ServiceStatus:
    replicas = [replica["state"] for deployment in one["deployments"].values() for replica in deployment["replicas"]]
    ready = replicas.count("RUNNING")
    told = [deployment["message"] for deployment in one["deployments"].values()] + [one.get("message") or ""]
    why = next((text.strip().splitlines()[-1] for text in told if text.strip()), "")
    phase: Phase = {"RUNNING": "running", "DEPLOY_FAILED": "failing", "UNHEALTHY": "failing"}.get(one["status"], "starting")  # type: ignore[assignment]
    if phase == "starting" and ready:
        phase = "updating"
    fix = f"danlu services rollback {name} --on {at.on}" if phase == "failing" else ""
    return ServiceStatus(name, phase, "" if phase == "running" else why, fix, ready, of="replicas")


def _as_they_are(applications: dict[str, Any]) -> list[Any]:
    """What Serve is told of applications that it is to leave alone: it ends those that it was told of once, and now is not."""
    return [one["deployed_app_config"] for one in applications.values() if one.get("deployed_app_config")]


def _http(service: Service, details: Any) -> dict[str, Any]:
    """Serve's options. It takes them when it starts, and never again."""
    if service.http.haproxy:
        raise SpecError(
            "a Ray cluster has HAProxy when its nodes are started with RAY_SERVE_ENABLE_HA_PROXY=1, and no spec turns it on",
            where="http.haproxy",
            fix="--set http.haproxy=false",
        )
    if service.http.port == 0:
        raise SpecError("on a cluster every node listens on the same port", where="http.port", fix="--set http.port=8000")
    asked = {"host": service.http.host, "port": service.http.port}
    running = _running_http(details)
    if running and {name: running.get(name) for name in asked} != asked:
        raise SpecError(
            f"Serve listens on {running.get('host')}:{running.get('port')} there, not on {service.http.host}:{service.http.port}",
            where="http",
            fix=f"--set http.host={running.get('host')} --set http.port={running.get('port')}",
        )
    # Of a language model's answer only the gateway knows whether it still moves: a long one is not a late one.
    timeout_s = None if service.is_language_model else service.limits.request_timeout_s + 5
    return running or {**asked, "request_timeout_s": timeout_s}


def _running_http(details: Any) -> dict[str, Any]:
    found = details.get("http_options") or {}
    return {name: value for name, value in found.items() if name in ("host", "port", "request_timeout_s")} if found.get("port") else {}


def _unknown(at: RayCluster, what: str, name: str, there: Sequence[str]) -> ClusterError:
    listed = f"danlu {what}s list --on {at.on}"
    return not_there(f"there is no {what} named {name!r} on this Ray cluster", name, there, where=f"--on {at.on}", fix=listed)


def _ask(at: RayCluster, call: Callable[..., Answer], *arguments: Any) -> Answer:
    with _said(at.on):
        return call(*arguments)


@contextmanager
def _said(on: str) -> Iterator[None]:
    """Ray's errors as ours."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            str(error).splitlines()[0],
            where=f"--on {on}",
            fix="export RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or in ~/.ray/auth_token",
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        fix = "the dashboard's port, which a tunnel may have to lead to; ray start --head --include-dashboard=true has one"
        raise ClusterError(f"no answer: {str(error).splitlines()[0]}", where=f"--on {on}", fix=fix) from error
    except RuntimeError as error:
        raise ClusterError(str(error).strip().splitlines()[-1], where=f"--on {on}") from error


def _time(milliseconds: int | None) -> str:
    return "" if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
