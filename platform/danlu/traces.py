"""Spans, where OpenTelemetry's own environment variables ask for them; elsewhere nothing is imported, made or sent.

OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT, or OTEL_TRACES_EXPORTER=otlp or console) turns them on; headers, sampling, batches
and resource attributes are OpenTelemetry's: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal

from danlu.errors import ResourceError, SpecError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
EXPORTER = "OTEL_TRACES_EXPORTER"
PARENT = {"TRACEPARENT": "traceparent", "TRACESTATE": "tracestate"}
"""Environment variables that hand a trace to a process, as its headers hand one to a server:
https://opentelemetry.io/docs/specs/otel/context/env-carriers/"""

Attributes = Mapping[str, Any]
"""By OpenTelemetry's names where it has one; None is left out."""

_OFF: AbstractContextManager[Any] = nullcontext()
_sdk: _Sdk | None = None


def begin(service: str, *, exporter: Any = None, **resource: str) -> None:
    """Make spans from here on if the environment asks for them, or there is an `exporter`. Once in a process; later calls change nothing.

    ResourceError if what is asked for is not installed.
    """
    global _sdk
    if _sdk is not None or (exporter is None and (exporter := asked_exporter()) is None):
        return
    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    _sdk = _Sdk(exporter, {**name, **resource})


def asked_exporter() -> Any:
    """What the environment asks for; None if nothing. SpecError for what we do not have, ResourceError for what is not installed."""
    if not _is_asked():
        return None
    try:
        return _exporter()
    except ImportError as error:
        where = next(name for name in (*ENDPOINTS, EXPORTER) if os.environ.get(name))
        raise ResourceError(
            f"traces are asked for, and {error.name} is not installed", where=where, fix="pip install danlu[otel], or unset it"
        ) from error


def end() -> None:
    """Send what is left; no more spans."""
    global _sdk
    if _sdk is not None:
        _sdk.provider.shutdown()
    _sdk = None


def flush() -> None:
    """Send what there is."""
    if _sdk is not None:
        _sdk.provider.force_flush()


def is_on() -> bool:
    """Whether spans are made."""
    return _sdk is not None


def span(
    name: str,
    attributes: Attributes | None = None,
    *,
    kind: Literal["server", "client", "internal"] = "internal",
    carrier: Mapping[str, str] | None = None,
) -> AbstractContextManager[Any]:
    """A span while the block runs, the current one of what it calls; it goes on with the trace of `carrier` (headers), if that has one.

    An exception marks it as failed by its type alone: messages may quote what a user wrote.
    """
    return _OFF if _sdk is None else _Span(_sdk, name, kind, carrier, attributes or {})


def add(name: str, began: float, ended: float, attributes: Attributes | None = None) -> None:
    """A span that is over, under the current one; none if that is not sampled. Times are time.perf_counter()'s."""
    if _sdk is not None and (parent := _sdk.current()).is_recording():
        _sdk.hand_over(name, parent.get_span_context(), began, ended, _known(attributes or {}))


def note(attributes: Attributes, *, failed: bool = False) -> None:
    """More attributes for the current span."""
    if _sdk is not None and (found := _sdk.current()).is_recording():
        found.set_attributes(_known(attributes))
        if failed:
            found.set_status(_sdk.failed)


def carrier() -> dict[str, str]:
    """The headers that hand the current trace on; none where there is none."""
    found: dict[str, str] = {}
    if _sdk is not None:
        _sdk.propagator.inject(found)
    return found


def trace_id() -> str:
    """Of the current trace, as 32 hexadecimal digits; empty where there is none."""
    if _sdk is None:
        return ""
    context = _sdk.current().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def from_environment() -> dict[str, str]:
    """The headers that stand in this process's environment."""
    return {header: os.environ[name] for name, header in PARENT.items() if os.environ.get(name)}


def to_environment(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers as environment variables of another process."""
    return {name: headers[header] for name, header in PARENT.items() if header in headers}


class _Sdk:
    """OpenTelemetry's SDK, looked up once: a request is short, and a span is made in each."""

    def __init__(self, exporter: Any, resource: Mapping[str, str]) -> None:
        from opentelemetry import context, trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = TracerProvider(resource=Resource.create(resource))
        self.processor = BatchSpanProcessor(exporter)
        self.provider.add_span_processor(self.processor)
        self.tracer = self.provider.get_tracer("danlu")
        # W3C trace context, whatever else somebody has set up in this process.
        self.propagator = TraceContextTextMapPropagator()
        self.current, self.entered = trace.get_current_span, trace.set_span_in_context
        self.attach, self.detach = context.attach, context.detach
        self.kinds = {kind.name.lower(): kind for kind in trace.SpanKind}
        self.failed = trace.StatusCode.ERROR
        self.finished, self.context, self.scope = ReadableSpan, trace.SpanContext, InstrumentationScope("danlu")

    def hand_over(self, name: str, parent: Any, began: float, ended: float, attributes: dict[str, Any]) -> None:
        """A span that is over goes to where spans go that end: what the SDK does for one that is still to begin, nobody needs."""
        # Spans are dated by the clock on the wall.
        offset = time.time_ns() - time.perf_counter_ns()
        number = self.provider.id_generator.generate_span_id()
        its = self.context(parent.trace_id, number, False, parent.trace_flags, parent.trace_state)
        self.processor.on_end(
            self.finished(
                name,
                context=its,
                parent=parent,
                resource=self.provider.resource,
                attributes=attributes,
                instrumentation_scope=self.scope,
                start_time=int(began * 1e9) + offset,
                end_time=int(ended * 1e9) + offset,
            )
        )


class _Span:
    """A span while a block runs."""

    __slots__ = ("attributes", "carrier", "kind", "made", "name", "sdk", "token")

    def __init__(self, sdk: _Sdk, name: str, kind: str, carrier: Mapping[str, str] | None, attributes: Attributes) -> None:
        self.sdk, self.name, self.kind, self.carrier, self.attributes = sdk, name, kind, carrier, attributes

    def __enter__(self) -> Any:
        sdk = self.sdk
        context = sdk.propagator.extract(self.carrier) if self.carrier else None
        self.made = sdk.tracer.start_span(self.name, context, sdk.kinds[self.kind], _known(self.attributes))
        self.token = sdk.attach(sdk.entered(self.made))
        return self.made

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.sdk.detach(self.token)
        if kind is not None:
            self.made.set_attribute("error.type", kind.__name__)
            self.made.set_status(self.sdk.failed)
        self.made.end()


def _is_asked() -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    match os.environ.get(EXPORTER, "").strip().lower():
        case "none":
            return False
        case "":
            return any(os.environ.get(name) for name in ENDPOINTS)
        case "otlp" | "console":
            return True
        case other:
            raise SpecError(f"{other!r} is no exporter here", where=EXPORTER, fix="otlp, console or none")


def _exporter() -> Any:
    if os.environ.get(EXPORTER, "").strip().lower() == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if os.environ.get(name, "http/protobuf") != "http/protobuf":
            raise SpecError(f"{os.environ[name]!r} is not spoken here", where=name, fix="http/protobuf, as a rule on port 4318")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _known(attributes: Attributes) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
