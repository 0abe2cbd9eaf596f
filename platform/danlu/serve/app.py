"""A Service as a Ray Serve application: one deployment, each replica ingress, gateway and engine in one. Only this file imports ray."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.schema import ApplicationStatus

from danlu.artifact.bundle import read_bundle
from danlu.artifact.store import Store
from danlu.errors import ResourceError, SpecError
from danlu.metrics import catalog, emit
from danlu.serve.engine import make_engine
from danlu.serve.engines.encoder import BatchRecord, EncoderEngine
from danlu.serve.gateway import Gateway
from danlu.spec.files import dump, load, parse
from danlu.spec.serve import Encoder, Service

START_TIMEOUT_S = 180.0


class Replica:
    """One process of a service. Serve calls it; the ASGI app that it builds answers."""

    async def __init__(self, spec: str) -> None:  # type: ignore[misc]  # Serve awaits it
        import torch

        # OpenMP keeps a team of threads per caller: one here would slow the engine's own down.
        torch.set_num_threads(1)
        service = parse(Service, spec, source="the service's spec")
        bundle = None if service.bundle is None else read_bundle(Store(service.storage).resolve(service.bundle), verify=True)
        engine = make_engine(service, bundle)
        if isinstance(engine, EncoderEngine):
            engine.on_batch = lambda batch: _meter_batch(service.name, batch)
        self.gateway = Gateway(engine, service.name, service.limits, emit.emit)
        await self.gateway.start()

    def __serve_build_asgi_app__(self) -> Gateway:
        return self.gateway

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        self.gateway.engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "gateway"):  # not if the constructor failed
            await self.gateway.drain()
            emit.flush()


def build(spec: Service | Mapping[str, Any]) -> serve.Application:
    """The Serve application of a service; also KubeRay's import path, with {"spec": "PATH.yaml"} or the fields themselves."""
    service = spec if isinstance(spec, Service) else _from_arguments(spec)
    scaling, limits, engine = service.autoscaling, service.limits, service.engine
    room = limits.max_ongoing_requests + limits.max_queued_requests
    deployment = serve.deployment(
        name=service.name,
        ray_actor_options={
            "num_cpus": engine.num_threads if isinstance(engine, Encoder) else 1,
            "num_gpus": engine.num_gpus if isinstance(engine, Encoder) else 0,
        },
        # The gateway queues and refuses, in OpenAI's shape and with a Retry-After that it has measured; Serve's bound is the net under it.
        max_ongoing_requests=room + 16,
        max_queued_requests=room,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_ongoing_requests,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
        ),
        graceful_shutdown_timeout_s=limits.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,
    )(serve.ingress()(Replica))
    return deployment.bind(dump(service))


@dataclass(frozen=True)
class Endpoint:
    """A running service."""

    url: str
    name: str
    dashboard_url: str | None
    metrics_url: str | None

    def where_to_look(self) -> dict[str, str]:
        """What a person may open."""
        found = {"endpoint": f"{self.url}/v1/classify", "OpenAPI page": f"{self.url}/docs"}
        if self.dashboard_url:
            found["Ray dashboard"] = self.dashboard_url
        if self.metrics_url:
            found["metrics"] = self.metrics_url
        return found


def run(service: Service) -> Endpoint:
    """Serve on this machine, on the Ray this process is connected to or one of its own; returns once requests are answered."""
    port = _free_port(service.http.host, service.http.port)
    if service.http.haproxy:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    if service.bundle is not None:
        # A bundle that is not there is the user's to hear of now, not a replica's to die of.
        read_bundle(Store(service.storage).resolve(service.bundle))
    if not ray.is_initialized():
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=HTTPOptions(host=service.http.host, port=port, request_timeout_s=service.limits.request_timeout_s + 5))
    _deploy(service)
    return Endpoint(f"http://{service.http.host}:{port}", service.name, _dashboard_url(), _metrics_url())


def stop() -> None:
    """End every service of this process's Ray; requests that are being answered get their answers."""
    if ray.is_initialized():
        serve.shutdown()


def _deploy(service: Service) -> None:
    serve._run_many([serve.RunTarget(build(service), service.name, "/")], wait_for_applications_running=False)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        status = serve.status().applications.get(service.name)
        if status is not None and status.status == ApplicationStatus.RUNNING:
            return
        if status is not None and status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ResourceError(f"{service.name} did not start: {_replicas_error(status)}", where="serve")
        time.sleep(0.1)
    raise ResourceError(
        f"{service.name} was not ready within {START_TIMEOUT_S:g} s",
        where="serve",
        fix="fewer engine.num_threads or autoscaling.min_replicas, if the machine has no core left for it",
    )


def _replicas_error(status: Any) -> str:
    """The last line of what a replica raised, without the stacks around it."""
    text = "\n".join([status.message, *(deployment.message for deployment in status.deployments.values())])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("danlu.errors.", "RuntimeError", "ValueError", "ImportError"))]
    return (told or lines or ["no message"])[-1]


def _meter_batch(model: str, batch: BatchRecord) -> None:
    emit.emit(catalog.SERVE_BATCH_ROWS, batch.rows, model=model)
    emit.emit(catalog.SERVE_BATCH_SECONDS, batch.seconds, model=model)
    for waited in batch.waited_s:
        emit.emit(catalog.SERVE_QUEUE_SECONDS, waited, model=model)


def _from_arguments(arguments: Mapping[str, Any]) -> Service:
    if set(arguments) == {"spec"}:
        return load(Service, arguments["spec"])
    if not arguments:
        raise SpecError(
            "the application needs arguments", where="args", fix='args: {spec: "/path/service.yaml"}, or the fields of a Service'
        )
    return Service.model_validate(dict(arguments))


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0; ResourceError if somebody listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"{host}:{port} cannot be listened on: {error.strerror}",
                where="http.port",
                fix="http.port: 0 takes a free one; or stop what listens there",
            ) from error
        return int(probe.getsockname()[1])


def _dashboard_url() -> str | None:
    address = ray._private.worker._global_node.webui_url if ray._private.worker._global_node else None
    return f"http://{address}" if address else None


def _metrics_url() -> str | None:
    for node in ray.nodes():
        if node.get("Alive") and node.get("MetricsExportPort"):
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return None
