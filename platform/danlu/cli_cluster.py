"""`danlu jobs ...` and `danlu services ...`: what runs on a cluster. Each command a few lines over danlu.remote."""

from __future__ import annotations

from typing import Annotated

import typer

jobs = typer.Typer(help="Training jobs on Kubernetes. List, show, follow, wait for, cancel, resume, delete.", no_args_is_help=True)
services = typer.Typer(help="Services on Kubernetes. List, show, scale, roll back, delete.", no_args_is_help=True)

FAILED, CANCELLED, TIMED_OUT = 1, 130, 124
"""Exit codes of `danlu jobs wait`, beside 0 for a success; 124 is what timeout(1) has."""

Name = Annotated[str, typer.Argument(help="Its name.", show_default=False)]
Context = Annotated[str | None, typer.Option("--context", help="A context of the kubeconfig; unset: the current one.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Unset: the context's.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, one object a line.")]


@jobs.command("list")
def list_jobs(context: Context = None, namespace: Namespace = None, json_: Json = False) -> None:
    """The jobs of a namespace and their states."""
    from danlu import remote
    from danlu.k8s.client import connect

    for one in remote.jobs(connect(context, namespace)):
        typer.echo(remote.as_json(one) if json_ else f"{one.name:<48} {one.state:<10} {one.created}")


@jobs.command("show")
def show_job(name: Name, context: Context = None, namespace: Namespace = None, json_: Json = False) -> None:
    """A job's state and why. What it waits for, or what ended it, with the last lines of its log."""
    from danlu import remote
    from danlu.k8s.client import connect

    found = remote.status(connect(context, namespace), name)
    typer.echo(remote.as_json(found) if json_ else found.text())


@jobs.command("logs")
def job_logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """What a job prints. Steps, scores, errors."""
    from danlu import remote
    from danlu.k8s.client import connect

    for line in remote.logs(connect(context, namespace), name, follow=follow):
        typer.echo(line)


@jobs.command("wait")
def wait_for_job(
    name: Name,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds to wait at most.")] = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Wait for a job's end. Exits with 0 for a success, 1 for a failure, 130 if it was cancelled, 124 if it runs on."""
    from danlu import remote
    from danlu.k8s.client import connect

    found = remote.wait(connect(context, namespace), name, timeout_s=timeout)
    if found is None:
        typer.echo(f"{name} runs on after {timeout:g} s", err=True)
        raise typer.Exit(TIMED_OUT)
    typer.echo(found.text())
    raise typer.Exit({"succeeded": 0, "cancelled": CANCELLED}.get(found.state, FAILED))


@jobs.command("cancel")
def cancel_job(name: Name, context: Context = None, namespace: Namespace = None) -> None:
    """End a job's pods. Its checkpoints stay, and `resume` goes on from the last."""
    from danlu import remote
    from danlu.k8s.client import connect

    typer.echo(remote.cancel(connect(context, namespace), name))


@jobs.command("resume")
def resume_job(name: Name, context: Context = None, namespace: Namespace = None) -> None:
    """Go on with a job that was cancelled or has failed. From its last checkpoint."""
    from danlu import remote
    from danlu.k8s.client import connect

    typer.echo(remote.resume(connect(context, namespace), name))


@jobs.command("delete")
def delete_job(name: Name, context: Context = None, namespace: Namespace = None) -> None:
    """Delete a job and its pods. Its runs and bundles stay in the storage."""
    from danlu import remote
    from danlu.k8s.client import connect

    typer.echo(remote.delete(connect(context, namespace), "RayJob", name))


@services.command("list")
def list_services(context: Context = None, namespace: Namespace = None, json_: Json = False) -> None:
    """The services of a namespace and whether they answer."""
    from danlu import remote
    from danlu.k8s.client import connect

    for one in remote.services(connect(context, namespace)):
        typer.echo(remote.as_json(one) if json_ else f"{one.name:<48} {one.phase:<10} {one.endpoints}")


@services.command("show")
def show_service(name: Name, context: Context = None, namespace: Namespace = None, json_: Json = False) -> None:
    """A service's phase and why."""
    from danlu import remote
    from danlu.k8s.client import connect

    found = remote.service(connect(context, namespace), name)
    typer.echo(remote.as_json(found) if json_ else found.text())


@services.command("scale")
def scale_service(
    name: Name,
    min_: Annotated[int | None, typer.Option("--min", help="autoscaling.min_replicas")] = None,
    max_: Annotated[int | None, typer.Option("--max", help="autoscaling.max_replicas")] = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Change how many replicas a service has. Checked like the spec it was deployed from."""
    from danlu import remote
    from danlu.k8s.client import connect

    scaling = remote.scale(connect(context, namespace), name, min_replicas=min_, max_replicas=max_).autoscaling
    typer.echo(f"{name} has {scaling.min_replicas} to {scaling.max_replicas} replicas")


@services.command("rollback")
def rollback_service(name: Name, context: Context = None, namespace: Namespace = None) -> None:
    """Go back to the spec that was deployed before. Once more goes forward again."""
    from danlu import remote
    from danlu.k8s.client import connect

    spec = remote.rollback(connect(context, namespace), name)
    typer.echo(f"{name} goes back to {spec.bundle or spec.engine.kind}; danlu services show {name} says when it is there")


@services.command("delete")
def delete_service(name: Name, context: Context = None, namespace: Namespace = None) -> None:
    """Delete a service and its pods. Its bundles stay in the storage."""
    from danlu import remote
    from danlu.k8s.client import connect

    typer.echo(remote.delete(connect(context, namespace), "RayService", name))
