"""The gateway: one ASGI application around an engine. Limits, refusals, errors in OpenAI's shape, metering. Pure ASGI, no Ray."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from danlu import logs, traces
from danlu.errors import RequestError
from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.serve.admission import Admission
from danlu.serve.asgi import Call, ClientGone, Receive, Reply, Route, Routes, Scope, Send, Stream, read_body, send_reply, send_stream
from danlu.serve.engine import Engine
from danlu.serve.generation import TextEngine
from danlu.serve.keys import Key
from danlu.serve.openai.common import DONE, ModelCard, error_response, event, model_response, models_response
from danlu.serve.openapi import docs_page, openapi
from danlu.serve.routes.predict import PredictApi, check_model
from danlu.serve.routes.text import TextApi, engine_failed
from danlu.spec.serve import Limits

Meter = Callable[..., None]

logger = logging.getLogger("danlu.serve")

PROBES = ("/healthz", "/readyz")


class Gateway:
    """The ASGI application of a replica. `model` is the name it answers to; `meter(metric, value, **labels)` counts.

    `sends_request_id` is False behind Ray Serve, which puts the x-request-id on every answer itself. `lora_updates` lets clients load
    and unload adapters.
    """

    def __init__(
        self,
        engine: Engine | TextEngine,
        model: str,
        limits: Limits,
        meter: Meter,
        *,
        sends_request_id: bool = True,
        lora_updates: bool = False,
    ) -> None:
        self.engine, self.model, self.limits, self.meter = engine, model, limits, meter
        self.sends_request_id = sends_request_id
        self.ready = False
        self.created = int(time.time())
        self.admission = Admission(limits, self.count)
        self.api: TextApi | PredictApi
        if isinstance(engine, TextEngine):
            self.api = TextApi(engine, model, limits, self.admission, self.count, updates=lora_updates)
        else:
            self.api = PredictApi(engine, model, limits, self.admission, self.count)
        self.routes: Routes = {
            **self.api.routes(),
            "/v1/models": Route("GET", self._models),
            "/v1/models/": Route("GET", self._one_model),
            "/healthz": Route("GET", self._healthz),
            "/readyz": Route("GET", self._readyz),
            "/openapi.json": Route("GET", self._openapi),
            "/docs": Route("GET", self._docs),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._lifespan(receive, send)
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await send({"type": "websocket.close"})  # before it is open: the client's handshake is answered 403

    @property
    def in_flight(self) -> int:
        """Answers that are being worked on or wait."""
        return self.admission.in_flight

    def count(self, metric: Metric, value: float, **labels: str) -> None:
        """Meter under this model's name."""
        self.meter(metric, value, model=self.model, **labels)

    async def start(self) -> None:
        """Start the engine; ready once it has answered its probes."""
        await self.engine.start()
        self.ready = True

    async def drain(self) -> None:
        """Take nothing new, finish what has begun, stop the engine."""
        self.admission.draining = True
        await self._until_idle(self.limits.drain_timeout_s)
        self.api.cut(RequestError("the service is stopping", status=503, kind="server_error", fix="again: another replica answers"))
        await self._until_idle(1.0)  # so that their last events get out
        await self.engine.stop()
        self.ready = False

    async def _until_idle(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

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
        found = next((known for known in self.routes if known == path or (known[-1] == "/" and path.startswith(known))), None)
        request_id = headers.get("x-request-id", "")[:128] or uuid.uuid4().hex
        extra = {"x-request-id": request_id} if self.sends_request_id else {}
        logs.about.set({"request_id": request_id})  # a request is a task, and ends with it
        key: Key | None = scope.get("danlu.key")
        facts: dict[str, object] = {} if key is None else {"key": key.name, "tenant": key.payer}
        asked = {"http.request.method": scope["method"], "http.route": found or "other", "danlu.request_id": request_id}
        status: str | None = None
        with traces.span(f"{scope['method']} {found or 'other'}", asked, kind="server", carrier=headers):
            try:
                status = await self._answer(scope, receive, send, path, found, headers, extra, began, facts)
            finally:
                self._seen(scope["method"], found, status, began, facts)

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        path: str,
        found: str | None,
        headers: Mapping[str, str],
        extra: dict[str, str],
        began: float,
        facts: dict[str, object],
    ) -> str | None:
        """Answer; the status, None if nobody is there any more to be answered."""
        reply: Reply | Stream | None = None
        end = b""
        try:
            async with AsyncExitStack() as stack:
                try:
                    call = await self._call(scope, path, found, headers, receive, began, stack, facts)
                    route = self.routes[found or ""]
                    async with _follow(receive if route.follows_client else None):
                        reply = await route.answer(call)
                        if isinstance(reply, Stream):
                            await send_stream(send, reply, extra, silence_s=self.limits.request_timeout_s)
                except RequestError as error:
                    facts["error"] = error.code or error.kind
                    reply = self._refused(error, extra, found)
                except ClientGone:
                    raise
                except Exception as error:
                    # A client gets an answer whatever broke; health says the rest.
                    logger.exception("%s", found)
                    facts["error"] = type(error).__name__
                    if isinstance(reply, Stream):  # its status is out: the error is its last event
                        end = event(error_response(engine_failed(error))) + DONE
                    else:
                        reply = self._refused(engine_failed(error), extra, found)
        except ClientGone:
            self.count(catalog.SERVE_REFUSALS, 1, reason="client_gone")
            return None
        except asyncio.CancelledError:
            self.count(catalog.SERVE_REFUSALS, 1, reason="client_gone")
            raise
        status = str(getattr(reply, "status", 200))
        self.count(catalog.SERVE_REQUESTS, 1, route=found or "other", status=status)
        self.count(catalog.SERVE_SECONDS, time.perf_counter() - began, route=found or "other")
        if isinstance(reply, Stream):
            await send({"type": "http.response.body", "body": end})
        else:
            await send_reply(send, reply, extra)
        return status

    def _seen(self, method: str, found: str | None, status: str | None, began: float, facts: dict[str, object]) -> None:
        """The request's log line, and what its span says. A probe that finds all well is no news."""
        if found in PROBES and status == "200":
            return
        if "key" in facts:
            self._count_key(status, time.perf_counter() - began, facts)
        if traces.is_on():
            facts["trace_id"] = traces.trace_id()
            traces.note(_attributes(status, facts), failed=status is not None and status >= "500")
        told = {"method": method, "route": found or "other", "status": status or "client_gone", "model": self.model}
        logs.event(logger, "request", told | {"seconds": round(time.perf_counter() - began, 6)} | facts)

    def _count_key(self, status: str | None, seconds: float, facts: Mapping[str, object]) -> None:
        """Who asked, for how much, and how long it took. Keys beyond the first hundreds are counted together (danlu.metrics.emit)."""
        key, tenant = str(facts["key"]), str(facts["tenant"])
        self.count(catalog.SERVE_KEY_REQUESTS, 1, tenant=tenant, key=key, status=status or "client_gone")
        self.count(catalog.SERVE_KEY_SECONDS, seconds, key=key)
        for kind in ("prompt", "completion"):
            if isinstance(tokens := facts.get(f"{kind}_tokens"), int):
                self.count(catalog.SERVE_KEY_TOKENS, tokens, tenant=tenant, key=key, kind=kind)

    async def _call(
        self,
        scope: Scope,
        path: str,
        found: str | None,
        headers: Mapping[str, str],
        receive: Receive,
        began: float,
        stack: AsyncExitStack,
        facts: dict[str, object],
    ) -> Call:
        """The request for its route; RequestError if there is none, or its body cannot be read."""
        if found is None:
            raise RequestError(f"there is no {path}", status=404, kind="not_found_error", fix=", ".join(self.routes))
        method = self.routes[found].method
        if scope["method"] != method and not (scope["method"] == "HEAD" and method == "GET"):
            raise RequestError(f"{path} takes {method}, not {scope['method']}", status=405, fix=f"{method} {path}")
        body = b""
        if method == "POST":
            content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":
                told = content_type or "not given"
                raise RequestError(f"the content type is {told}", status=415, param="content-type", fix="content-type: application/json")
            body = await read_body(headers, receive, limit=self.limits.max_body_bytes)
        key: Key | None = scope.get("danlu.key")
        return Call(body, began, key, path[len(found) :], stack, facts)

    def _refused(self, error: RequestError, extra: dict[str, str], found: str | None) -> Reply:
        if error.retry_after_s is not None:
            extra["retry-after"] = str(error.retry_after_s)
        if error.status == 405 and found:
            extra["allow"] = self.routes[found].method
        if error.status != 500:
            self.count(catalog.SERVE_REFUSALS, 1, reason=error.kind if error.status == 400 else str(error.status))
        return Reply(error_response(error), error.status)

    async def _models(self, call: Call) -> Reply:
        return Reply(models_response(self._cards(call.key), self.created))

    async def _one_model(self, call: Call) -> Reply:
        cards = self._cards(call.key)
        check_model(call.rest, [card.name for card in cards], call.key)
        return Reply(model_response(next(card for card in cards if card.name == call.rest), self.created))

    def _cards(self, key: Key | None) -> list[ModelCard]:
        return [card for card in self.api.models() if key is None or key.may_ask(card.name)]

    async def _healthz(self, call: Call) -> Reply:
        self._check_health()
        return Reply({"status": "ok"})

    async def _readyz(self, call: Call) -> Reply:
        if not self.ready or self.admission.draining:
            told = "draining" if self.admission.draining else "still starting"
            raise RequestError(told, status=503, kind="server_error", retry_after_s=1)
        self._check_health()
        return Reply({"status": "ready", "model": self.model})

    async def _openapi(self, call: Call) -> Reply:
        return Reply(openapi(self.model, *self.api.paths()))

    async def _docs(self, call: Call) -> Reply:
        page = docs_page(self.model, [(route.method, path) for path, route in self.routes.items()], self.api.try_it())
        return Reply(page.encode(), content_type="text/html; charset=utf-8")

    def _check_health(self) -> None:
        try:
            self.engine.check_health()
        except Exception as error:
            raise RequestError(str(error), status=503, kind="server_error") from error


@asynccontextmanager
async def _follow(receive: Receive | None) -> AsyncGenerator[None]:
    """Ends the block with ClientGone as soon as the client has; ASGI servers tell that only to who asks."""
    if receive is None:
        yield
        return
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            continue
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError as error:
        if gone and not task.uncancel():
            raise ClientGone from error
        raise
    finally:
        watcher.cancel()


def _attributes(status: str | None, facts: Mapping[str, object]) -> dict[str, object]:
    """A request's facts by OpenTelemetry's names: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/"""
    return {
        "http.response.status_code": None if status is None else int(status),
        "error.type": facts.get("error") or ("client_gone" if status is None else None),
        "gen_ai.request.model": facts.get("model"),
        "gen_ai.response.id": facts.get("answer_id"),
        "gen_ai.usage.input_tokens": facts.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": facts.get("completion_tokens"),
    }
