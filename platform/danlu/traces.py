"""Spans, where OpenTelemetry's own environment variables ask for them; elsewhere nothing is imported, made or sent.

OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT, or OTEL_TRACES_EXPORTER=otlp or console) turns them on; headers, sampling, batches
and resource attributes are OpenTelemetry's: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
_tracer: Any = None
_provider: Any = None


def begin(service: str, *, exporter: Any = None, **resource: str) -> None:
    """Make spans from here on if the environment asks for them, or there is an `exporter`. Once in a process; later calls change nothing.

    ResourceError if what is asked for is not installed.
    """
    global _tracer, _provider
    if _tracer is not None or (exporter is None and (exporter := asked_exporter()) is None):
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    _provider = TracerProvider(resource=Resource.create({**name, **resource}))
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("danlu")


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
    global _tracer, _provider
    if _provider is not None:
        _provider.shutdown()
    _tracer = _provider = None


def flush() -> None:
    """Send what there is."""
    if _provider is not None:
        _provider.force_flush()


def is_on() -> bool:
    """Whether spans are made."""
    return _tracer is not None


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
    return _OFF if _tracer is None else _span(name, kind, carrier, attributes or {})


def add(name: str, began: float, ended: float, attributes: Attributes | None = None) -> None:
    """A span that is over, under the current one. Times are time.perf_counter()'s."""
    if _tracer is None:
        return
    # Spans are dated by the clock on the wall.
    offset = time.time_ns() - time.perf_counter_ns()
    found = _tracer.start_span(name, start_time=int(began * 1e9) + offset, attributes=_known(attributes or {}))
    found.end(int(ended * 1e9) + offset)


def note(attributes: Attributes, *, failed: bool = False) -> None:
    """More attributes for the current span."""
    if _tracer is not None:
        from opentelemetry import trace

        found = trace.get_current_span()
        found.set_attributes(_known(attributes))
        if failed:
            found.set_status(trace.StatusCode.ERROR)


def carrier() -> dict[str, str]:
    """The headers that hand the current trace on; none where there is none."""
    found: dict[str, str] = {}
    if _tracer is not None:
        _propagator().inject(found)
    return found


def trace_id() -> str:
    """Of the current trace, as 32 hexadecimal digits; empty where there is none."""
    if _tracer is None:
        return ""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def from_environment() -> dict[str, str]:
    """The headers that stand in this process's environment."""
    return {header: os.environ[name] for name, header in PARENT.items() if os.environ.get(name)}


def to_environment(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers as environment variables of another process."""
    return {name: headers[header] for name, header in PARENT.items() if header in headers}


@contextmanager
def _span(name: str, kind: str, carrier: Mapping[str, str] | None, attributes: Attributes) -> Iterator[Any]:
    from opentelemetry.trace import SpanKind, StatusCode

    context = _propagator().extract(carrier) if carrier else None
    with _tracer.start_as_current_span(
        name,
        context=context,
        kind=SpanKind[kind.upper()],
        attributes=_known(attributes),
        record_exception=False,
        set_status_on_exception=False,
    ) as found:
        try:
            yield found
        except BaseException as error:
            found.set_attribute("error.type", type(error).__name__)
            found.set_status(StatusCode.ERROR)
            raise


def _propagator() -> Any:
    """W3C trace context, whatever else somebody has set up in this process."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


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
