"""A request is followed from its answer's header to its log line and its spans, and nothing that was written in it stands there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from lm import engine, write_family
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from danlu import traces
from danlu.serve.engines.echo import EchoEngine, EchoTextEngine
from danlu.serve.gateway import Gateway
from danlu.serve.generation import Generation
from danlu.serve.keys import Authenticated, KeyRing, create_key
from danlu.spec.serve import Echo, EchoText, Limits

Served = Callable[..., AbstractContextManager[str]]
Lines = Callable[[], list[dict[str, Any]]]
Spans = Callable[[], dict[str, list[Any]]]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
"""From https://www.w3.org/TR/trace-context/."""
SECRET = "xyzzy"


class FailingEngine(EchoTextEngine):
    """Breaks at `break`, quoting what it was asked."""

    async def generate(self, generation: Generation) -> Any:
        async for delta in super().generate(generation):
            yield delta
            if "break" in self.detokenize(generation.prompt):  # type: ignore[arg-type]
                raise RuntimeError("it broke")


def nothing(*_: object, **__: object) -> None:
    """A meter."""


def test_a_request_has_one_line_with_the_id_of_its_answers_header_and_nothing_that_was_written(
    served: Served, log_lines: Lines, meter: Any, tmp_path: Path
) -> None:
    gateway = Gateway(FailingEngine(EchoText()), "echo", Limits(max_body_bytes=4000), meter)
    key = create_key(tmp_path / "keys.json", "ada", tenant="research")
    with served(gateway, Authenticated(gateway, KeyRing(tmp_path / "keys.json"), nothing)) as url, httpx.Client(base_url=url) as client:
        say = lambda text, **more: {"messages": [{"role": "user", "content": f"{SECRET} {text}"}], **more}  # noqa: E731
        bearer = {"authorization": f"Bearer {key}"}
        asked: list[tuple[str, dict[str, Any], dict[str, str], int]] = [
            ("/v1/chat/completions", say("hello"), bearer, 200),
            ("/v1/chat/completions", say("hello", stream=True, n=2), bearer, 200),
            ("/v1/chat/completions", say("hello", temperature=SECRET), bearer, 400),
            ("/v1/chat/completions", say("hello", model=f"{SECRET}\n{{}}"), bearer, 404),
            ("/v1/chat/completions", say("break"), bearer, 500),
            ("/v1/completions", {"prompt": SECRET * 2000}, bearer, 413),
            (f"/v1/{SECRET}", say("hello"), bearer, 404),
            ("/v1/completions", {"prompt": SECRET}, {"authorization": f"Bearer {SECRET}"}, 401),
        ]
        for number, (path, body, headers, status) in enumerate(asked):
            given = {"x-request-id": f"mine-{number}"} if number else {}
            response = client.post(path, json=body, headers=headers | given)
            assert response.status_code == status, response.text
            if number == 0:
                first = response
        for path in ("/healthz", "/readyz"):
            assert client.get(path).status_code == 200, "a probe that finds all well has no line"
    written = log_lines()
    told = json.dumps(written)
    assert SECRET not in told
    assert key not in told
    lines = [line for line in written if line["message"] == "request"]
    assert [line["status"] for line in lines] == [str(status) for *_, status in asked]
    assert [line["request_id"] for line in lines] == [first.headers["x-request-id"], *(f"mine-{n}" for n in range(1, len(asked)))]
    whole, streamed, bad, unknown, broken, large, nowhere, keyless = lines
    assert whole["answer_id"] == first.json()["id"]
    usage = first.json()["usage"]
    assert (whole["prompt_tokens"], whole["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert 0 < whole["time_to_first_token_s"] <= whole["seconds"] < 30
    assert (whole["service"], whole["model"], whole["key"], whole["route"]) == ("tests", "echo", "ada", "/v1/chat/completions")
    # The three answers that were made, and the piece of the one that broke off.
    tokens = [sum(line.get(f"{kind}_tokens", 0) for line in lines) for kind in ("prompt", "completion")]
    assert [meter.by_label["danlu_serve_key_tokens", kind] for kind in ("prompt", "completion")] == tokens
    assert meter.by_label["danlu_serve_key_tokens", "research"] == sum(tokens)
    assert meter.sums["danlu_serve_key_request_seconds"] == pytest.approx(sum(line["seconds"] for line in lines[:-1]), abs=1e-3)
    assert {line.get("tenant") for line in lines} == {"research", None}
    assert meter.sums["danlu_serve_key_requests"] == meter.by_label["danlu_serve_key_requests", "ada"] == len(asked) - 1
    assert meter.by_label["danlu_serve_key_requests", "200"] == 2
    assert streamed["completion_tokens"] == 2 * whole["completion_tokens"]
    assert (bad["error"], unknown["error"], large["error"]) == ("invalid_request_error", "model_not_found", "invalid_request_error")
    assert broken["error"] == "RuntimeError"
    (stack,) = [line for line in written if "stack" in line]
    assert (stack["request_id"], stack["level"]) == ("mine-4", "ERROR")
    assert "it broke" in stack["stack"]
    assert nowhere["route"] == "other"
    assert "key" not in keyless


def test_a_client_that_leaves_has_a_line(served: Served, log_lines: Lines) -> None:
    gateway = Gateway(EchoTextEngine(EchoText(time_per_output_token_ms=5)), "echo", Limits(), nothing)
    with served(gateway) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a" * 2000, "max_tokens": 1000, "stream": True}) as response:
            next(response.iter_lines())
        deadline = time.monotonic() + 30
        while gateway.in_flight:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    (line,) = log_lines()
    assert (line["status"], line["request_id"]) == ("client_gone", response.headers["x-request-id"])
    assert 0 < line["completion_tokens"] < 1000


@pytest.fixture(scope="module", params=["echo_text", "torch"])
def text_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Makes an engine that answers one sequence after the other, where it can."""
    if request.param == "echo_text":
        return lambda: EchoTextEngine(EchoText(time_to_first_token_ms=20, time_per_output_token_ms=2))
    folder = write_family(tmp_path_factory.mktemp("qwen3"), "qwen3")
    return lambda: engine(folder, max_num_seqs=1)


def test_a_trace_goes_on_from_the_clients_through_queue_and_prefill_to_decode(
    served: Served, spans: Spans, log_lines: Lines, text_engine: Callable[[], Any]
) -> None:
    made = text_engine()
    with served(Gateway(made, "lm", Limits(), nothing)) as url:
        body = {"prompt": "the market", "max_tokens": 6, "n": 2, "temperature": 0, "ignore_eos": True}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        usage = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).json()["usage"]
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60).status_code == 200
    found = spans()
    request, other = found["POST /v1/completions"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.kind.name == "SERVER"
    assert other.context.trace_id != request.context.trace_id
    assert other.parent is None
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 12
    parts = {
        name: [span for span in found[name] if span.context.trace_id == request.context.trace_id] for name in ("queue", "prefill", "decode")
    }
    for number in range(2):
        queue, prefill, decode = (parts[name][number] for name in ("queue", "prefill", "decode"))
        assert {span.parent.span_id for span in (queue, prefill, decode)} == {request.context.span_id}
        assert request.start_time <= queue.start_time <= queue.end_time <= prefill.end_time <= decode.end_time <= request.end_time
        assert (prefill.attributes["gen_ai.usage.input_tokens"], decode.attributes["gen_ai.usage.output_tokens"]) == (
            usage["prompt_tokens"],
            6,
        )
    assert set(found) == {"POST /v1/completions", "queue", "prefill", "decode"}, "there is none for a token"
    lines = [line for line in log_lines() if line["message"] == "request"]
    assert lines[0]["trace_id"] == TRACE
    if not isinstance(made, EchoTextEngine):
        assert 0 <= lines[0]["queue_s"] < (request.end_time - request.start_time) / 1e9


def test_a_failing_and_a_refused_request_are_seen_as_that(served: Served, spans: Spans) -> None:
    with served(Gateway(FailingEngine(EchoText()), "echo", Limits(), nothing)) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": f"break {SECRET}"}).status_code == 500
        assert httpx.post(f"{url}/v1/completions", json={"prompt": ""}).status_code == 400
    broken, refused = spans()["POST /v1/completions"]
    assert (broken.status.status_code.name, broken.attributes["error.type"]) == ("ERROR", "RuntimeError")
    assert (refused.status.status_code.name, refused.attributes["error.type"]) == ("UNSET", "invalid_request_error")
    assert SECRET not in "".join(span.to_json() for some in spans().values() for span in some)


def test_a_text_classified_is_traced_to_its_forward(served: Served, spans: Spans) -> None:
    with served(Gateway(EchoEngine(Echo(latency_ms=5)), "parity", Limits(), nothing)) as url:
        assert httpx.post(f"{url}/v1/classify", json={"input": ["a", "b"]}).status_code == 200
    (request,), (forward,) = spans()["POST /v1/classify"], spans()["forward"]
    assert forward.parent.span_id == request.context.span_id
    assert forward.attributes["danlu.inputs"] == 2
    assert forward.end_time - forward.start_time >= 5e6


def test_a_span_is_the_one_that_opentelemetrys_tracer_makes(spans: Spans) -> None:
    given, attributes = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}, {"number": 1, "names": ["x", "y"]}
    with pytest.raises(KeyError), traces.span("made", attributes | {"nothing": None}, kind="server", carrier=given):
        raise KeyError
    memory, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    above = TraceContextTextMapPropagator().extract(given)
    with provider.get_tracer("danlu").start_as_current_span("made", above, SpanKind.SERVER, attributes) as reference:
        reference.set_attribute("error.type", "KeyError")
        reference.set_status(StatusCode.ERROR)
    told = [json.loads(span.to_json()) for span in (spans()["made"][0], memory.get_finished_spans()[0])]
    for span in told:
        assert span["start_time"] <= span.pop("end_time")
        for own in ("start_time", "resource"):
            del span[own]
        assert int(span["context"].pop("span_id"), 16)
    assert told[0] == told[1]


@pytest.mark.parametrize(("sampler", "flag"), [("always_off", "01"), ("parentbased_always_on", "00")])
def test_what_is_not_sampled_is_handed_on_as_that_and_makes_no_span(sampler: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    memory = InMemorySpanExporter()
    traces.begin("tests", exporter=memory)
    with traces.span("a", carrier={"traceparent": f"00-{TRACE}-{PARENT}-{flag}"}):
        traces.add("b", 1.0, 2.0)
        traces.note({"c": 1})
        handed, number = traces.carrier()["traceparent"].split("-"), traces.trace_id()
    traces.end()
    assert (handed[1], handed[3], number) == (TRACE, "00", TRACE)
    assert handed[2] != PARENT
    assert memory.get_finished_spans() == ()


def test_without_traces_nothing_is_made_or_sent_on() -> None:
    assert not traces.is_on()
    with traces.span("a", {"b": 1}) as found:
        assert found is None
        traces.add("c", 0.0, 1.0)
        traces.note({"d": 1})
        assert (traces.carrier(), traces.trace_id()) == ({}, "")
