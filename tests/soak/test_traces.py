"""Traces of real processes: a job on two workers and a service, started as a person does, told to an OTLP collector over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="an extra: pip install danlu[otel]")
pytestmark = pytest.mark.soak
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """What a collector was sent: (service, span) by the span's name."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[str, Any]]] = {}
        self.url = ""

    def take(self, raw: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            named = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.setdefault(span.name, []).append((named["service.name"], span))

    def environment(self) -> dict[str, str]:
        return {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "TRACEPARENT": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_a_job_on_two_workers_is_one_trace(collector: Collector, tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    job = {
        "name": "traced",
        "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
        "data": {"train": topic_files["train"], "cache_dir": str(tmp_path / "cache")},
        "workers": {"num_workers": 2},
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "max_steps": 4,
        "storage": str(tmp_path / "runs"),
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    command = [sys.executable, "-m", "danlu.cli", "train", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, env=collector.environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    spans = {name: [span for _, span in found] for name, found in collector.spans.items()}
    assert set(spans) == {"danlu train", "plan", "train", "start workers", "worker", "data", "model", "first step"}
    assert {span.trace_id.hex() for found in spans.values() for span in found} == {TRACE}
    (command_span,), (train,) = spans["danlu train"], spans["train"]
    assert command_span.parent_span_id.hex() == PARENT
    assert train.parent_span_id == command_span.span_id
    workers = {span.span_id for span in spans["worker"]}
    assert {span.parent_span_id for span in spans["worker"]} == {train.span_id}
    assert [len(spans[name]) for name in ("worker", "data", "start workers", "model", "first step")] == [2, 2, 1, 1, 1]
    for name in ("data", "start workers", "model", "first step"):
        assert {span.parent_span_id for span in spans[name]} <= workers
    order = [spans[name][0].start_time_unix_nano for name in ("plan", "start workers", "model", "first step")]
    assert order == sorted(order)


def test_a_request_to_a_service_goes_on_with_its_clients_trace(collector: Collector, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        json.dumps({"kind": "service", "name": "parrot", "engine": {"kind": "echo_text"}, "http": {"port": 0}})
    )
    command = [sys.executable, "-m", "danlu.cli", "serve", str(tmp_path / "s.yaml")]
    environment = {**collector.environment(), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        url = line[line.index("http://") :].split()[0]
        client = "1af7651916cd43dd8448eb211c80319c"
        headers = {"traceparent": f"00-{client}-{PARENT}-01"}
        answer = httpx.post(url, json={"messages": [{"role": "user", "content": "hi"}]}, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        until(lambda: "POST /v1/chat/completions" in collector.spans)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)
    ((service, request),) = collector.spans["POST /v1/chat/completions"]
    assert (service, request.trace_id.hex(), request.parent_span_id.hex()) == ("parrot", client, PARENT)
    attributes = {one.key: one.value for one in request.attributes}
    assert attributes["danlu.request_id"].string_value == answer.headers["x-request-id"]
    for name in ("queue", "prefill", "decode"):
        ((_, span),) = collector.spans[name]
        assert span.parent_span_id == request.span_id
