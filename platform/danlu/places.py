"""Where a job or a service runs, by what --on says: this machine, a Ray cluster, or Kubernetes. The one place that chooses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

from danlu.errors import SpecError
from danlu.k8s.status import JobStatus, ServiceStatus
from danlu.spec.serve import Service

Place = Literal["local", "ray", "k8s"]


class Jobs(Protocol):
    """remote/jobs.py, on_ray.py and on_local.py: the same functions in each. `at` is what its `connect` gave."""

    def jobs(self, at: Any) -> list[JobStatus]: ...

    def status(self, at: Any, name: str) -> JobStatus: ...

    def logs(self, at: Any, name: str, *, follow: bool) -> Iterator[str]: ...

    def wait(self, at: Any, name: str, *, timeout_s: float | None = None) -> JobStatus | None: ...

    def cancel(self, at: Any, name: str) -> str: ...

    def resume(self, at: Any, name: str) -> str: ...

    def delete(self, at: Any, name: str) -> str: ...


class Services(Protocol):
    """remote/services.py and on_ray.py. A service of this machine lives in its own `danlu serve`."""

    def services(self, at: Any) -> list[ServiceStatus]: ...

    def service(self, at: Any, name: str) -> ServiceStatus: ...

    def scale(self, at: Any, name: str, *, min_replicas: int | None, max_replicas: int | None) -> tuple[Service, str]: ...

    def rollback(self, at: Any, name: str) -> tuple[Service, str]: ...

    def delete_service(self, at: Any, name: str) -> str: ...


def place(on: str, **options: object) -> Place:
    """Which place --on means; SpecError if it means none, and for an option that has no effect there."""
    if on not in ("local", "k8s") and not on.startswith(("ray://", "http://", "https://")):
        raise SpecError(f"{on!r} is no place to run", where="--on", fix="local, k8s, ray://HOST or http://HOST:8265 (its dashboard)")
    found: Place = "local" if on == "local" else "k8s" if on == "k8s" else "ray"
    of: dict[str, Place] = {"dry_run": "k8s", "context": "k8s", "namespace": "k8s", "fresh": "local", "storage": "local", "raw": "local"}
    for name, value in options.items():
        if value and of[name] != found:
            raise SpecError(
                f"it has no effect with --on {on}", where=f"--{name.replace('_', '-')}", fix=f"leave it out, or --on {of[name]}"
            )
    if (asked := options.get("dry_run")) not in (None, "server"):
        fix = "--dry-run=server; `danlu render` prints without asking a server"
        raise SpecError(f"{asked!r} is no dry run", where="--dry-run", fix=fix)
    return found


def jobs_at(on: str, *, context: str | None, namespace: str | None, storage: str | None) -> tuple[Jobs, Any]:
    """The functions for jobs, and what they are given first."""
    match place(on, context=context, namespace=namespace, storage=storage):
        case "local":
            from danlu import on_local

            return on_local, on_local.connect(storage or "runs")
        case "ray":
            from danlu import on_ray

            return on_ray, on_ray.connect(on)
        case "k8s":
            from danlu.k8s.kubeconfig import connect
            from danlu.remote import jobs as on_k8s

            return on_k8s, connect(context, namespace)


def log_lines(
    on: str, name: str, *, follow: bool, raw: bool, context: str | None, namespace: str | None, storage: str | None
) -> Iterator[str]:
    """What a job prints; `raw` is what its processes wrote, of a run in a storage."""
    place(on, raw=raw)
    verbs, at = jobs_at(on, context=context, namespace=namespace, storage=storage)
    if not raw:
        return verbs.logs(at, name, follow=follow)
    if follow:
        raise SpecError("what is kept is not followed", where="--follow", fix="without --raw")
    from danlu import on_local

    return on_local.raw_logs(at, name)


def services_at(on: str, *, context: str | None, namespace: str | None) -> tuple[Services, Any]:
    """The functions for services, and what they are given first."""
    match place(on, context=context, namespace=namespace):
        case "local":
            raise SpecError(
                "a service of this machine lives as long as its `danlu serve`", where="--on", fix="Ctrl-C ends it; `danlu top` shows it"
            )
        case "ray":
            from danlu import on_ray

            return on_ray, on_ray.connect(on)
        case "k8s":
            from danlu.k8s.kubeconfig import connect
            from danlu.remote import services as on_k8s

            return on_k8s, connect(context, namespace)


def name_of(at: Any) -> str:
    """Where that is, for a person who may have meant another place."""
    return f"namespace {at.namespace} of context {at.context}" if hasattr(at, "namespace") else str(getattr(at, "on", at))
