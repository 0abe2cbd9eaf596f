"""The gateway: one ASGI application around an engine. Limits, refusals, errors in OpenAI's shape, metering. Pure ASGI, no Ray."""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from danlu.errors import RequestError
from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.serve.encoder_wire import Request, read_json, routes_of
from danlu.serve.engine import Engine
from danlu.serve.openai import error_response, models_response
from danlu.serve.openapi import docs_page, openapi
from danlu.spec.serve import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Meter = Callable[..., None]

ROUTES = {
    "/v1/models": "GET",
    "/healthz": "GET",
    "/readyz": "GET",
    "/openapi.json": "GET",
    "/docs": "GET",
}


class Gateway:
    """The ASGI application of a replica. `model` is the name it answers to; `meter(metric, value, **labels)` counts.

    `sends_request_id` is False behind Ray Serve, which puts the x-request-id on every answer itself.
    """

    def __init__(self, engine: Engine, model: str, limits: Limits, meter: Meter, *, sends_request_id: bool = True) -> None:
        self.engine, self.model, self.limits, self.meter = engine, model, limits, meter
        self.sends_request_id = sends_request_id
        self.in_flight, self.ready, self.draining = 0, False, False
        self.recent_seconds = 0.05
        self.created = int(time.time())
        self.wires = routes_of(engine.task)
        self.routes = dict.fromkeys(self.wires, "POST") | ROUTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._lifespan(receive, send)
            case "http":
                await self._http(scope, receive, send)

    async def start(self) -> None:
        """Start the engine; ready once it has answered its probes."""
        await self.engine.start()
        self.ready = True

    async def drain(self) -> None:
        """Take nothing new, finish what has begun, stop the engine."""
        self.draining = True
        deadline = time.monotonic() + self.limits.drain_timeout_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await self.engine.stop()
        self.ready = False

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"].rstrip("/") or "/"
        extra: dict[str, str] = {}
        content_type = "application/json"
        body: object
        try:
            status, body, content_type = await self._answer(scope["method"], path, headers, receive)
        except RequestError as error:
            status, body = error.status, error_response(error)
            if error.retry_after_s is not None:
                extra["retry-after"] = str(error.retry_after_s)
            if error.status == 405:
                extra["allow"] = self.routes[path]
            self._count(catalog.SERVE_REFUSALS, 1, reason=error.kind if error.status == 400 else str(error.status))
        except asyncio.CancelledError:
            self._count(catalog.SERVE_REFUSALS, 1, reason="client_gone")
            raise
        except Exception as error:  # noqa: BLE001  # a client gets an answer whatever broke; health says the rest
            status, body = 500, error_response(RequestError(f"the engine failed: {type(error).__name__}", status=500, kind="server_error"))
        route = path if path in self.routes else "other"
        self._count(catalog.SERVE_REQUESTS, 1, route=route, status=str(status))
        self._count(catalog.SERVE_SECONDS, time.perf_counter() - began, route=route)
        raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        extra |= {"content-type": content_type, "content-length": str(len(raw))}
        if self.sends_request_id:
            extra["x-request-id"] = headers.get("x-request-id", "")[:128] or uuid.uuid4().hex
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.encode(), v.encode("latin-1", "replace")) for k, v in extra.items()],
        }
        await send(start)
        await send({"type": "http.response.body", "body": raw})

    async def _answer(self, method: str, path: str, headers: dict[str, str], receive: Receive) -> tuple[int, object, str]:
        if path not in self.routes:
            raise RequestError(f"there is no {path} here", status=404, kind="not_found_error", fix=", ".join(self.routes))
        takes = self.routes[path]
        if method != takes and not (method == "HEAD" and takes == "GET"):
            raise RequestError(f"{path} takes {takes}, not {method}", status=405, fix=f"{takes} {path}")
        if path in self.wires:
            return 200, await self._predict(path, headers, receive), "application/json"
        match path:
            case "/v1/models":
                return 200, models_response([self.model], self.created), "application/json"
            case "/healthz":
                self._check(self.engine.check_health)
                return 200, {"status": "ok"}, "application/json"
            case "/readyz":
                if not self.ready or self.draining:
                    raise RequestError("draining" if self.draining else "still starting", status=503, kind="server_error", retry_after_s=1)
                self._check(self.engine.check_health)
                return 200, {"status": "ready", "model": self.model}, "application/json"
            case "/openapi.json":
                return 200, openapi(self.model, self.wires, self.engine.labels, self.limits), "application/json"
        return 200, docs_page(self.model, self.wires).encode(), "text/html; charset=utf-8"

    async def _predict(self, path: str, headers: dict[str, str], receive: Receive) -> object:
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise RequestError(
                f"the content type is {content_type or 'not given'}", status=415, param="content-type", fix="content-type: application/json"
            )
        body = await self._body(headers, receive)
        request: Request = self.wires[path].parse(read_json(body, self.wires[path].example), self.limits.max_inputs)
        if request.model not in (None, self.model):
            raise RequestError(
                f"there is no model {request.model!r} here", status=404, kind="not_found_error", param="model", fix=repr(self.model)
            )
        room = self.limits.max_ongoing_requests + self.limits.max_queued_requests
        if self.in_flight >= room or self.draining:
            raise RequestError(
                "draining" if self.draining else f"{self.in_flight} requests are being worked on and waiting, no more fit",
                status=503,
                kind="server_error",
                retry_after_s=max(1, math.ceil(self.recent_seconds * self.in_flight / self.limits.max_ongoing_requests)),
                fix="again after Retry-After seconds",
            )
        self.in_flight += 1
        self._count(catalog.SERVE_IN_FLIGHT, self.in_flight)
        began = time.perf_counter()
        try:
            answers = await asyncio.wait_for(self.engine.predict(request.inputs), self.limits.request_timeout_s)
        except TimeoutError as error:
            raise RequestError(
                f"no answer within {self.limits.request_timeout_s:g} s", status=504, kind="server_error", fix="fewer texts, or again later"
            ) from error
        finally:
            self.in_flight -= 1
            self._count(catalog.SERVE_IN_FLIGHT, self.in_flight)
        self.recent_seconds = 0.9 * self.recent_seconds + 0.1 * (time.perf_counter() - began)
        self._count(catalog.SERVE_INPUTS, len(answers))
        self._count(catalog.SERVE_TOKENS, sum(answer.num_tokens for answer in answers))
        return self.wires[path].respond(self.model, request, answers, self.engine.labels)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        limit = self.limits.max_body_bytes
        length = headers.get("content-length", "")
        parts: list[bytes] = []
        size = 0
        too_large = length.isdigit() and int(length) > limit
        while not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            too_large = size > limit
            if not message.get("more_body"):
                break
        if too_large:
            raise RequestError(f"the body is larger than {limit:,} bytes", status=413, fix="fewer or shorter texts in a request")
        return b"".join(parts)

    def _check(self, check_health: Callable[[], None]) -> None:
        try:
            check_health()
        except Exception as error:
            raise RequestError(str(error), status=503, kind="server_error") from error

    def _count(self, metric: Metric, value: float, **labels: str) -> None:
        self.meter(metric, value, model=self.model, **labels)
