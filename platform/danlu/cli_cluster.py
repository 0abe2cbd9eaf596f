"""`danlu jobs ...` and `danlu services ...`: what runs, and where. Each command a few lines over the place that --on names."""

from __future__ import annotations

from typing import Annotated

import typer

jobs = typer.Typer(
    help="Training jobs on Kubernetes, on a Ray cluster, or here. List, show, follow, wait for, cancel, resume, delete.",
    no_args_is_help=True,
)
services = typer.Typer(help="Services on Kubernetes or on a Ray cluster. List, show, scale, roll back, delete.", no_args_is_help=True)

FAILED, CANCELLED, TIMED_OUT = 1, 130, 124
"""Exit codes of `danlu jobs wait`, beside 0 for a success; 124 is what timeout(1) has."""

Name = Annotated[str, typer.Argument(help="Its name.", show_default=False)]
On = Annotated[str, typer.Option("--on", metavar="WHERE", help="k8s; ray://HOST or http://HOST:8265, a Ray cluster; local.")]
Storage = Annotated[str | None, typer.Option("--storage", help="With --on local: the storage URI of the runs; unset: runs.")]
Context = Annotated[str | None, typer.Option("--context", help="A context of the kubeconfig; unset: the current one.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Unset: the context's.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, one object a line.")]


@jobs.command("list")
def list_jobs(on: On = "k8s", storage: Storage = None, context: Context = None, namespace: Namespace = None, json_: Json = False) -> None:
    """The jobs of a place and their states."""
    from danlu import places
    from danlu.k8s.status import as_json

    verbs, at = places.jobs_at(on, context=context, namespace=namespace, storage=storage)
    found = verbs.jobs(at)
    for one in found:
        typer.echo(as_json(one) if json_ else f"{one.name:<48} {one.state:<10} {one.created}")
    if not found and not json_:
        typer.echo(f"there are none in {places.name_of(at)}", err=True)


@jobs.command("show")
def show_job(
    name: Name, on: On = "k8s", storage: Storage = None, context: Context = None, namespace: Namespace = None, json_: Json = False
) -> None:
    """A job's state and why. What it waits for, or what ended it, with the last lines of its log."""
    from danlu import places
    from danlu.k8s.status import as_json

    verbs, at = places.jobs_at(on, context=context, namespace=namespace, storage=storage)
    found = verbs.status(at, name)
    typer.echo(as_json(found) if json_ else found.text())


@jobs.command("logs")
def job_logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="With --on local: what its driver and workers wrote themselves, as kept in the storage.")
    ] = False,
    on: On = "k8s",
    storage: Storage = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """What a job prints. Steps, scores, errors."""
    from danlu import places

    for line in places.log_lines(on, name, follow=follow, raw=raw, context=context, namespace=namespace, storage=storage):
        typer.echo(line)


@jobs.command("wait")
def wait_for_job(
    name: Name,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds to wait at most.")] = None,
    on: On = "k8s",
    storage: Storage = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Wait for a job's end. Exits with 0 for a success, 1 for a failure, 130 if it was cancelled, 124 if it runs on."""
    from danlu import places

    verbs, at = places.jobs_at(on, context=context, namespace=namespace, storage=storage)
    found = verbs.wait(at, name, timeout_s=timeout)
    if found is None:
        typer.echo(f"{name} runs on after {timeout:g} s", err=True)
        raise typer.Exit(TIMED_OUT)
    typer.echo(found.text())
    raise typer.Exit({"succeeded": 0, "cancelled": CANCELLED}.get(found.state, FAILED))


@jobs.command("cancel")
def cancel_job(name: Name, on: On = "k8s", storage: Storage = None, context: Context = None, namespace: Namespace = None) -> None:
    """End a job. Its checkpoints stay, and `resume` goes on from the last."""
    from danlu import places

    verbs, at = places.jobs_at(on, context=context, namespace=namespace, storage=storage)
    typer.echo(verbs.cancel(at, name))


@jobs.command("resume")
def resume_job(name: Name, on: On = "k8s", storage: Storage = None, context: Context = None, namespace: Namespace = None) -> None:
    """Go on with a job that was cancelled or has failed. From its last checkpoint."""
    from danlu import places

    verbs, at = places.jobs_at(on, context=context, namespace=namespace, storage=storage)
    typer.echo(verbs.resume(at, name))


@jobs.command("delete")
def delete_job(name: Name, on: On = "k8s", storage: Storage = None, context: Context = None, namespace: Namespace = None) -> None:
    """Delete a job and its pods. What it stored stays; of a job of this machine, the bundles do."""
    from danlu import places

    verbs, at = places.jobs_at(on, context=context, namespace=namespace, storage=storage)
    typer.echo(verbs.delete(at, name))


@services.command("list")
def list_services(on: On = "k8s", context: Context = None, namespace: Namespace = None, json_: Json = False) -> None:
    """The services of a place and whether they answer."""
    from danlu import places
    from danlu.k8s.status import as_json

    verbs, at = places.services_at(on, context=context, namespace=namespace)
    found = verbs.services(at)
    for one in found:
        typer.echo(as_json(one) if json_ else f"{one.name:<48} {one.phase:<10} {one.endpoints}")
    if not found and not json_:
        typer.echo(f"there are none in {places.name_of(at)}", err=True)


@services.command("show")
def show_service(name: Name, on: On = "k8s", context: Context = None, namespace: Namespace = None, json_: Json = False) -> None:
    """A service's phase and why."""
    from danlu import places
    from danlu.k8s.status import as_json

    verbs, at = places.services_at(on, context=context, namespace=namespace)
    found = verbs.service(at, name)
    typer.echo(as_json(found) if json_ else found.text())


@services.command("scale")
def scale_service(
    name: Name,
    min_: Annotated[int | None, typer.Option("--min", help="autoscaling.min_replicas")] = None,
    max_: Annotated[int | None, typer.Option("--max", help="autoscaling.max_replicas")] = None,
    on: On = "k8s",
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Change how many replicas a service has. Checked like the spec it was deployed from."""
    from danlu import places

    verbs, at = places.services_at(on, context=context, namespace=namespace)
    spec, how = verbs.scale(at, name, min_replicas=min_, max_replicas=max_)
    typer.echo(f"{name} has {spec.autoscaling.min_replicas} to {spec.autoscaling.max_replicas} replicas" + (f"\n  {how}" if how else ""))


@services.command("rollback")
def rollback_service(name: Name, on: On = "k8s", context: Context = None, namespace: Namespace = None) -> None:
    """Go back to the spec that was deployed before. Once more goes forward again."""
    from danlu import places

    verbs, at = places.services_at(on, context=context, namespace=namespace)
    spec, how = verbs.rollback(at, name)
    typer.echo(f"{name} goes back to {spec.bundle or spec.engine.kind}; danlu services show {name} says when it is there")
    if how:
        typer.echo(f"  {how}")


@services.command("delete")
def delete_service(name: Name, on: On = "k8s", context: Context = None, namespace: Namespace = None) -> None:
    """Delete a service and its pods. Its bundles stay in the storage."""
    from danlu import places

    verbs, at = places.services_at(on, context=context, namespace=namespace)
    typer.echo(verbs.delete_service(at, name))
