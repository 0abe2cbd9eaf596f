"""Spans, where OpenTelemetry's own environment variables ask for them; elsewhere nothing is imported, made or sent.

OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT, or OTEL_TRACES_EXPORTER=otlp or console) turns them on; headers, sampling, batches
and resource attributes are OpenTelemetry's: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
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
_current: ContextVar[_Span | None] = ContextVar("span", default=None)


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
    """A span that is over, under the current one; none where that is not sampled, or there is none. Times are time.perf_counter()'s."""
    if _sdk is not None and (parent := _current.get()) is not None and parent.sampled:
        _sdk.hand_over(name, _sdk.below(parent.context), parent.context, attributes or {}, began, ended)


def note(attributes: Attributes, *, failed: bool = False) -> None:
    """More attributes for the current span."""
    if (found := _current.get()) is not None:
        found.attributes.update(attributes)
        found.failed |= failed


def carrier() -> dict[str, str]:
    """The headers that hand the current trace on; none where there is none."""
    found: dict[str, str] = {}
    if _sdk is not None:
        _sdk.propagator.inject(found)
    return found


def trace_id() -> str:
    """Of the current trace, as 32 hexadecimal digits; empty where there is none."""
    return "" if (found := _current.get()) is None else f"{found.context.trace_id:032x}"


def from_environment() -> dict[str, str]:
    """The headers that stand in this process's environment."""
    return {header: os.environ[name] for name, header in PARENT.items() if os.environ.get(name)}


def to_environment(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers as environment variables of another process."""
    return {name: headers[header] for name, header in PARENT.items() if header in headers}


class _Sdk:
    """OpenTelemetry's SDK, looked up once: a request is short, and spans are made in each."""

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
        self.sampler, self.ids, self.resource = self.provider.sampler, self.provider.id_generator, self.provider.resource
        # W3C trace context, whatever else somebody has set up in this process.
        self.propagator = TraceContextTextMapPropagator()
        self.current, self.entered = trace.get_current_span, trace.set_span_in_context
        self.attach, self.detach = context.attach, context.detach
        self.context, self.placed, self.finished = trace.SpanContext, trace.NonRecordingSpan, ReadableSpan
        flags = trace.TraceFlags
        self.flags = {
            (sampled, random): flags(flags.SAMPLED * sampled | flags.RANDOM_TRACE_ID * random)
            for sampled in (False, True)
            for random in (False, True)
        }
        self.kinds = {kind.name.lower(): kind for kind in trace.SpanKind}
        self.fine, self.failed = trace.Status(trace.StatusCode.UNSET), trace.Status(trace.StatusCode.ERROR)
        self.scope = InstrumentationScope("danlu")

    def below(self, parent: Any) -> Any:
        """The context of a new span under another one's."""
        return self.context(parent.trace_id, self.ids.generate_span_id(), False, parent.trace_flags, parent.trace_state)

    def hand_over(
        self,
        name: str,
        its: Any,
        parent: Any,
        attributes: Attributes,
        began: float,
        ended: float,
        kind: str = "internal",
        failed: bool = False,
    ) -> None:
        """Send a span that is over.

        The SDK's own live spans take a lock, a copy and a check for each attribute and each end, three times the cost; these have one
        writer, and attributes that we chose.
        """
        # Spans are dated by the clock on the wall.
        offset = time.time_ns() - time.perf_counter_ns()
        self.processor.on_end(
            self.finished(
                name,
                context=its,
                parent=parent,
                resource=self.resource,
                attributes={key: value for key, value in attributes.items() if value is not None},
                kind=self.kinds[kind],
                status=self.failed if failed else self.fine,
                instrumentation_scope=self.scope,
                start_time=int(began * 1e9) + offset,
                end_time=int(ended * 1e9) + offset,
            )
        )


class _Span:
    """A span while a block runs. What looks for the current one by OpenTelemetry's means finds its place in the trace."""

    __slots__ = ("attributes", "before", "began", "carrier", "context", "failed", "kind", "name", "parent", "sampled", "sdk", "token")

    def __init__(self, sdk: _Sdk, name: str, kind: str, carrier: Mapping[str, str] | None, attributes: Attributes) -> None:
        self.sdk, self.name, self.kind, self.carrier = sdk, name, kind, carrier
        self.attributes, self.failed = dict(attributes), False

    def __enter__(self) -> _Span:
        sdk = self.sdk
        given = sdk.propagator.extract(self.carrier) if self.carrier else None
        above = sdk.current(given).get_span_context()
        self.parent: Any = above if above.is_valid else None
        trace_id = above.trace_id if above.is_valid else sdk.ids.generate_trace_id()
        random = above.trace_flags.random_trace_id if above.is_valid else sdk.ids.is_trace_id_random()
        drawn: Any = sdk.sampler.should_sample(given, trace_id, self.name, sdk.kinds[self.kind], self.attributes)
        self.sampled: bool = drawn.decision.is_sampled()
        flags = sdk.flags[self.sampled, random]
        self.context = sdk.context(trace_id, sdk.ids.generate_span_id(), False, flags, drawn.trace_state)
        self.token, self.before = sdk.attach(sdk.entered(sdk.placed(self.context))), _current.set(self)
        self.began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _current.reset(self.before)
        self.sdk.detach(self.token)
        if not self.sampled:
            return
        if kind is not None:
            self.attributes["error.type"], self.failed = kind.__name__, True
        ended = time.perf_counter()
        self.sdk.hand_over(self.name, self.context, self.parent, self.attributes, self.began, ended, self.kind, self.failed)


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
