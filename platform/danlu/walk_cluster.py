"""The commands' bodies that hand a spec to a cluster, or show what it is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from danlu import traces
from danlu.errors import SpecError
from danlu.spec.cluster import JobCluster, ServiceCluster
from danlu.spec.files import load, parse, read, which
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob
from danlu.terminal import show
from danlu.walk import service_of


def render(spec: Path, overrides: Sequence[str]) -> None:
    """Print a spec's Kubernetes objects."""
    from danlu.k8s import manifests

    text = read(spec)
    kind = which((TrainJob, Service), text, source=str(spec))
    found = parse(kind, text, overrides, source=str(spec))
    assert isinstance(found, TrainJob | Service)
    print(manifests.text(manifests.render(found)), end="")


def submit(
    spec: Path, overrides: Sequence[str], *, on: str, dry_run: bool = False, context: str | None = None, namespace: str | None = None
) -> None:
    """Hand a job to a cluster."""
    job = load(TrainJob, spec, overrides)
    if on == "k8s":
        from danlu.k8s.kubeconfig import connect
        from danlu.remote import jobs

        kube = connect(context, _namespace(namespace, job.cluster))
        if dry_run:
            _show_taken(kube.context, jobs.dry_run(kube, job))
            return
        with traces.span("submit", {"danlu.train_job": job.name}, kind="client"):
            jobs.submit(kube, job)
        where, options = f"{kube.context}, namespace {kube.namespace}", _to_it(context, _namespace(namespace, job.cluster))
    else:
        from danlu import on_ray

        with traces.span("submit", {"danlu.train_job": job.name}, kind="client"):
            on_ray.submit(on_ray.connect(on), job)
        where, options = on, f" --on {on}"
    show(f"{job.name} is submitted to {where}")
    show(f"  danlu jobs logs -f {job.name}{options}    follows it; show, wait, cancel, resume, delete are there too")


def deploy(
    spec: Path,
    overrides: Sequence[str],
    *,
    on: str,
    bundle: str | None,
    dry_run: bool = False,
    context: str | None = None,
    namespace: str | None = None,
) -> None:
    """Hand a service to a cluster."""
    service = service_of(spec, overrides, bundle)
    if on == "k8s":
        from danlu.k8s.kubeconfig import connect
        from danlu.remote import services

        kube = connect(context, _namespace(namespace, service.cluster))
        if dry_run:
            _show_taken(kube.context, *services.dry_run(kube, service))
            return
        show(f"  {services.deploy(kube, service)}")
        where, options = f"{kube.context}, namespace {kube.namespace}", _to_it(context, _namespace(namespace, service.cluster))
        port = f"kubectl port-forward service/{service.name}-serve-svc 8000{_to_it(context, kube.namespace)}"
    else:
        from danlu import on_ray

        on_ray.deploy(on_ray.connect(on), service)
        where, options, port = f"{on}, {service.http.host}:{service.http.port} of every node", f" --on {on}", ""
    show(f"{service.name} is deployed to {where}")
    show(f"  danlu services show {service.name}{options}    says whether it answers; scale, rollback, delete are there too")
    if port:
        show(f"  {port}    then brings it to http://127.0.0.1:8000")


def _namespace(asked: str | None, cluster: JobCluster | ServiceCluster | None) -> str | None:
    """Where it goes; SpecError if the command and the spec say two places."""
    said = cluster.namespace if cluster else None
    if asked is not None and said is not None and asked != said:
        raise SpecError(
            f"--namespace {asked} is not the spec's cluster.namespace={said}",
            where="--namespace",
            fix=f"leave it out, or --set cluster.namespace={asked}",
        )
    return asked or said


def _to_it(context: str | None, namespace: str | None) -> str:
    """What the next command needs to find it."""
    options = {"context": context, "namespace": namespace}
    return "".join(f" --{name} {value}" for name, value in options.items() if value)


def _show_taken(context: str, names: Sequence[str], how: str = "") -> None:
    show(f"{context} would take {', '.join(names)}")
    if how:
        show(f"  {how}")
