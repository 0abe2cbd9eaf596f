"""A Service as a Ray Serve application: one deployment, each replica ingress, gateway and engine in one. Only this file imports ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.schema import ApplicationStatus

from danlu import logs, traces
from danlu.artifact.bundle import read_bundle
from danlu.artifact.store import Store
from danlu.errors import ResourceError, SpecError
from danlu.local_ray import start_ray
from danlu.metrics import catalog, emit
from danlu.metrics.catalog import Metric
from danlu.metrics.prices import accelerator, usd_per_hour
from danlu.serve.asgi import App
from danlu.serve.cors import open_to
from danlu.serve.engine import make_engine
from danlu.serve.gateway import Gateway
from danlu.serve.generation import TextEngine
from danlu.serve.keys import Authenticated, KeyRing, read_keys
from danlu.serve.wires import wire_of
from danlu.spec.files import dump, load, parse
from danlu.spec.serve import Echo, EchoText, Encoder, EncoderDecoder, Engine, Service
from danlu.spec.task import AnsweredTask, Classification, EncoderTask, Pretrain, Task, engine_kind
from danlu.spec.vllm import Vllm

if TYPE_CHECKING:
    from danlu.serve.engines.encoder import BatchRecord

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
STATS_EVERY_S = 1.0
HEALTH_EVERY_S = 2.0
"""Serve replaces a replica that was unhealthy three times in a row; until then it refuses everybody who is sent to it."""
PROXIES_TIMEOUT_S = 10.0


class Replica:
    """One process of a service. Serve calls it; the ASGI app that it builds answers."""

    async def __init__(self, spec: str) -> None:  # type: ignore[misc]  # Serve awaits it
        began = time.monotonic()
        service = parse(Service, spec, source="the service's spec")
        replica = serve.get_replica_context().replica_id.unique_id
        logs.begin("json", service=service.name, replica=replica)
        traces.begin(service.name, **{"service.instance.id": replica})
        if not isinstance(service.engine, Echo | EchoText):
            import torch

            # OpenMP keeps a team of threads per caller: one here would slow the engine's own down.
            torch.set_num_threads(1)
        bundle = None if service.bundle is None else read_bundle(Store(service.storage).resolve(service.bundle), verify=True)
        engine = make_engine(service, bundle)
        if isinstance(service.engine, Encoder | EncoderDecoder):
            from danlu.serve.engines.encoder import EncoderEngine

            assert isinstance(engine, EncoderEngine)
            engine.on_batch = lambda batch: _meter_batch(service.name, batch)
        self.gateway = Gateway(
            engine, service.name, service.limits, emit.emit, sends_request_id=False, lora_updates=service.allows_lora_updates
        )
        self.entrance: App = self.gateway  # `app` is a name of Serve's own
        self.reading = [asyncio.create_task(_meter_devices(service, began))]
        if service.auth is not None:
            ring = KeyRing(Path(service.auth.keys_file))
            self.entrance = Authenticated(self.gateway, ring, self.gateway.count)
            self.reading.append(asyncio.create_task(_meter_keys(ring, service.name)))
        self.entrance = open_to(self.entrance, service.http.allowed_origins)
        await self.gateway.start()
        if isinstance(engine, TextEngine):
            self.reading.append(asyncio.create_task(_meter_engine(engine, service.name)))

    def __serve_build_asgi_app__(self) -> App:
        return self.entrance

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        self.gateway.engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "gateway"):  # not if the constructor failed
            await self.gateway.drain()
            for task in self.reading:
                task.cancel()
            emit.flush()
            traces.end()


def build(spec: Service | Mapping[str, Any]) -> serve.Application:
    """The Serve application of a service; also KubeRay's import path, with {"spec": "PATH.yaml"} or the fields themselves."""
    service = spec if isinstance(spec, Service) else _from_arguments(spec)
    scaling, limits, engine = service.autoscaling, service.limits, service.engine
    room = limits.max_ongoing_requests + limits.max_queued_requests
    cpus, gpus = _cores_and_gpus(engine)
    deployment = serve.deployment(
        name=service.name,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # The gateway queues and refuses, in OpenAI's shape and with a Retry-After that it has measured; Serve's bound is the net under it.
        max_ongoing_requests=room + 16,
        # A burst waits here while it is handed to replicas that have room: too small a bound would refuse it with Serve's plain text.
        max_queued_requests=max(room, 256),
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_ongoing_requests,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
        ),
        health_check_period_s=HEALTH_EVERY_S,
        graceful_shutdown_timeout_s=limits.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        # A new version starts beside the old one, which serves until the new one has answered its probes.
        max_surge_percent=100,
        max_constructor_retry_count=1,
    )(serve.ingress()(Replica))
    return deployment.bind(dump(service))


def _cores_and_gpus(engine: Engine) -> tuple[int, int]:
    """What a replica holds."""
    return (1, 0) if isinstance(engine, Echo | EchoText) else (engine.num_threads, engine.num_gpus)


@dataclass(frozen=True)
class Endpoint:
    """A running service."""

    url: str
    name: str
    route: str
    """Where it answers."""
    asked: str
    """The body of a request that it answers, as JSON; empty where the page of the API shows one better."""
    dashboard_url: str | None
    metrics_url: str | None
    needs_key: bool = False

    def where_to_look(self) -> dict[str, str]:
        """What a person may open."""
        found = {"endpoint": f"{self.url}{self.route}", "OpenAPI page": f"{self.url}/docs"}
        if self.asked:
            key = ' -H "authorization: Bearer $DANLU_API_KEY"' if self.needs_key else ""
            found["try"] = f"curl {self.url}{self.route}{key} -H 'content-type: application/json' -d '{self.asked}'"
        if self.dashboard_url:
            found["Ray dashboard"] = self.dashboard_url
        if self.metrics_url:
            found["metrics"] = self.metrics_url
        return found


def run(service: Service) -> Endpoint:
    """Serve on this machine, on the Ray this process is connected to or one of its own; returns once requests are answered."""
    address = _address_in_use(service) or (service.http.host, _free_port(service.http.host, service.http.port))
    if service.http.haproxy:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    # A bundle that is not there is the user's to hear of now, not a replica's to die of.
    task = None if service.bundle is None else read_bundle(Store(service.storage).resolve(service.bundle)).meta.task
    route, asked = "", ""
    if not service.is_language_model:
        route, asked = _first_example(service, task)
    if service.auth is not None:
        read_keys(Path(service.auth.keys_file))
    traces.asked_exporter()  # replicas inherit the environment: what it asks for in vain is said now
    start_ray()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    host, port = address
    # Of a language model's answer only the gateway knows whether it still moves: a long one is not a late one.
    timeout_s = None if service.is_language_model else service.limits.request_timeout_s + 5
    serve.start(http_options=HTTPOptions(host=host, port=port, request_timeout_s=timeout_s))
    was_there = service.name in serve.status().applications
    try:
        _deploy(service)
    except ResourceError:
        if not was_there:  # else what ran before runs on
            serve.delete(service.name)
        raise
    if service.is_language_model:
        route, body = _first_request(service.name, task)
        asked = json.dumps(body)
    return Endpoint(f"http://{host}:{port}", service.name, route, asked, _dashboard_url(), _metrics_url(), service.auth is not None)


def _first_example(service: Service, task: Task | None) -> tuple[str, str]:
    """Where an engine that answers requests as a whole is asked, and how, unless that is a label's; SpecError if it has no such bundle."""
    if task is None:
        return wire_of(Classification()).path, ""
    if (right := engine_kind(task)) != service.engine.kind or not isinstance(task, AnsweredTask):
        raise SpecError(
            f"{service.bundle} was trained for {task.kind}, which engine.kind={service.engine.kind} does not answer",
            where="engine.kind",
            fix=f"engine: {{kind: {right}}}",
        )
    wire = wire_of(task)
    example = json.loads(wire.example) | {"model": service.name}
    return wire.path, "" if isinstance(task, EncoderTask | Pretrain) else json.dumps(example)


def _first_request(model: str, task: Task | None) -> tuple[str, dict[str, Any]]:
    """Where a language model is asked first, and how: one that has learned plain texts goes on with one."""
    if isinstance(task, Pretrain):
        return "/v1/completions", {"model": model, "prompt": "Once upon a time", "max_tokens": 32}
    return "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hello"}]}


def stop() -> None:
    """End every service of this process's Ray; requests that are being answered get their answers."""
    client = serve.context._get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is None:
        return
    # First the replicas, which drain, while the proxy that carries their answers is still there.
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
        client.delete_all_apps()
        _wait_for_proxies(client)
    # The controller ends itself in this call. Not retried, or Ray tells the terminal that it "failed".
    with contextlib.suppress(ray.exceptions.RayActorError, TimeoutError):
        ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=STOP_TIMEOUT_S)
    serve.shutdown()
    _wait_for_port(client.http_config.host, client.http_config.port)


def _wait_for_port(host: str, port: int) -> None:
    """Until nobody listens there: Serve kills its proxies and does not wait for their end, and who serves next may want the port."""
    deadline = time.monotonic() + PROXIES_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ResourceError):
            _free_port(host, port)
            return
        time.sleep(0.02)


def _wait_for_proxies(client: Any) -> None:
    """Until the proxies have passed on the last answers: Serve ends them without asking."""

    # Defined here, it travels by value: the proxy does not import this module.
    def open_requests(proxy: Any) -> int:
        return int(proxy.http_proxy._ongoing_requests) if hasattr(proxy, "http_proxy") else 0

    deadline = time.monotonic() + PROXIES_TIMEOUT_S
    proxies = list(ray.get(client._controller.get_proxies.remote(), timeout=PROXIES_TIMEOUT_S).values())
    while any(ray.get([proxy.__ray_call__.remote(open_requests) for proxy in proxies], timeout=PROXIES_TIMEOUT_S)):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _address_in_use(service: Service) -> tuple[str, int] | None:
    """Where this Ray serves already, so that a new version of a service takes over there; None if it does not."""
    if not ray.is_initialized():
        return None
    client = serve.context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    others = [name for name in serve.status().applications if name != service.name]
    if others:
        raise ResourceError(f"this Ray serves {others[0]} already", where="name", fix=f"stop {others[0]} first, or serve on another Ray")
    host, port = client.http_config.host, client.http_config.port
    if service.http.port not in (0, port):
        raise ResourceError(
            f"this Ray serves {service.name} on port {port} already, not on {service.http.port}",
            where="http.port",
            fix="stop it first, or http.port: 0",
        )
    return host, port


def _deploy(service: Service) -> None:
    serve._run_many([serve.RunTarget(build(service), service.name, "/")], wait_for_applications_running=False)
    timeout_s = START_TIMEOUT_S + (service.engine.start_timeout_s if isinstance(service.engine, Vllm) else 0)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = serve.status().applications.get(service.name)
        if status is not None and status.status == ApplicationStatus.RUNNING:
            return
        if status is not None and status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ResourceError(f"{service.name} did not start: {_replicas_error(status)}", where="serve")
        time.sleep(0.1)
    raise ResourceError(
        f"{service.name} was not ready within {timeout_s:g} s",
        where="serve",
        fix="fewer engine.num_threads or autoscaling.min_replicas, if the machine has no core left for it",
    )


def _replicas_error(status: Any) -> str:
    """The last line of what a replica raised, without the stacks around it."""
    text = "\n".join([status.message, *(deployment.message for deployment in status.deployments.values())])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("danlu.errors.", "RuntimeError", "ValueError", "ImportError"))]
    return (told or lines or ["no message"])[-1]


async def _meter_engine(engine: TextEngine, model: str) -> None:
    before: dict[Metric, float] = {}
    while True:
        now = dict(engine.stats())
        for metric, value in now.items():
            # The engine tells totals; a counter is told what came since.
            emit.emit(metric, value - before.get(metric, 0) if metric.kind == "counter" else value, model=model)
        before = now
        emit.emit(catalog.SERVE_ADAPTERS, len(engine.adapters()), model=model)
        await asyncio.sleep(STATS_EVERY_S)


async def _meter_devices(service: Service, began: float) -> None:
    """What the replica holds, and what that costs, from its first moment on: GPUs, which bring their cores, or cores."""
    cpus, gpus = _cores_and_gpus(service.engine)
    device = _accelerator() if gpus else "cpu"
    price = usd_per_hour(device)
    charged = began
    while True:
        now = time.monotonic()
        held, charged = (now - charged) * (gpus or cpus), now
        emit.emit(catalog.SERVE_DEVICE_SECONDS, held, model=service.name, device=device)
        if price is not None:
            emit.emit(catalog.SERVE_COST, held * price / 3600, model=service.name)
        await asyncio.sleep(STATS_EVERY_S)


def _accelerator() -> str:
    """This node's GPU as Ray has found it: torch would take some of its memory to tell."""
    here = ray.get_runtime_context().get_node_id()
    return accelerator(next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here))


async def _meter_keys(ring: KeyRing, model: str) -> None:
    begun: set[str] = set()
    while True:
        emit.emit(catalog.SERVE_KEY_EXPIRY, ring.next_expiry(), model=model)
        emit.emit(catalog.SERVE_KEYS_UNREADABLE, float(not ring.is_readable), model=model)
        for tenant in ring.tenants():
            emit.emit(catalog.SERVE_TENANT_BUDGET, tenant.budget_usd_per_week, tenant=tenant.name)
        valid = ring.valid()
        if len(valid) <= catalog.SERVE_KEY_TOKENS.max_values:  # else keys that nobody uses would push out those in use
            # Who pays by tokens pays from the first one on: a counter that begins with it shows Prometheus no increase.
            for key in valid:
                if key.name not in begun:
                    begun.add(key.name)
                    for kind in ("prompt", "completion"):
                        emit.emit(catalog.SERVE_KEY_TOKENS, 0, model=model, tenant=key.payer, key=key.name, kind=kind)
        await asyncio.sleep(STATS_EVERY_S)


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
