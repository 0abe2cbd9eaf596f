"""What being seen costs. A training step: the stopwatch in the worker, the counting where the job was ordered. A request: its log line, its
spans.

Each is timed alone, thousands of times, and set against a measured step of the demo's model, or what a text takes of its forward in a
full batch, which is the least that a request can cost: as a difference of whole steps or requests they would drown in noise.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import MODEL, Row, compare, finish, interleave, options
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from transformers import AutoModel

from danlu import logs, traces
from danlu.artifact.pretrained import model_folder
from danlu.metrics import emit
from danlu.spec.model import Model
from danlu.spec.train import TrainJob
from danlu.train.phases import Phases
from danlu.train.run import LocalRun, StepRecord, record_to_dict
from danlu.train.worker import work

STEPS = 2000


def in_the_worker() -> float:
    """Seconds a step: begin, six parts, the comparison of ranks every tenth step."""
    run = LocalRun(torch.device("cpu"))
    phases = Phases(run)
    began = time.perf_counter()
    for step in range(1, STEPS + 1):
        phases.begin(step)
        for name in ("data", "wait", "forward", "backward", "optimizer", "wait"):
            phases.end(name)
        phases.compare(step)
    return (time.perf_counter() - began) / STEPS


def where_it_was_ordered() -> float:
    """Seconds a record: counted, gathered, handed to Ray once a hundred steps."""
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    step = StepRecord(1, 100, 0.1, 1.0, 1e-3, 1.0, 500, 500, 1e3, 0.5, 9.0, 32, dict.fromkeys(("data", "wait", "forward", "backward"), 0.1))
    record = record_to_dict(step)
    with emit.training("bench") as hear:
        began = time.perf_counter()
        for number in range(1, STEPS + 1):
            hear(record | {"step": number})
            if number % 100 == 0:
                emit.flush()
        return (time.perf_counter() - began) / STEPS


def a_line() -> float:
    """Seconds of a request's log line, as a replica writes it."""
    facts = {"key": "ada", "inputs": 1, "prompt_tokens": 34}
    log = logging.getLogger("danlu.serve")
    with tempfile.TemporaryFile("w") as file, contextlib.redirect_stderr(file):
        logs.begin("json", service="bench", replica="bench#0")
        token = logs.about.set({"request_id": "a" * 32})
        began = time.perf_counter()
        for _ in range(STEPS):
            told = {"method": "POST", "route": "/v1/classify", "status": "200", "model": "bench"}
            logs.event(log, "request", told | {"seconds": 0.012} | facts)
        seconds = (time.perf_counter() - began) / STEPS
        logs.about.reset(token)
        logs.begin("text", level=logging.WARNING)  # the other contestants say nothing
        return seconds


def some_spans() -> float:
    """Seconds of a request's span and the two of its engine, under whatever there is."""
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    asked = {"http.request.method": "POST", "http.route": "/v1/classify", "danlu.request_id": "a" * 32}
    began = time.perf_counter()
    for _ in range(STEPS):
        with traces.span("POST /v1/classify", asked, kind="server", carrier=parent):
            if traces.is_on():
                traces.add("queue", 1.0, 2.0)
                traces.add("forward", 1.0, 2.0, {"danlu.inputs": 1})
                traces.trace_id()
                traces.note({"http.response.status_code": 200, "gen_ai.usage.input_tokens": 34})
    return (time.perf_counter() - began) / STEPS


def with_traces(sampler: str) -> float:
    """`some_spans` with OpenTelemetry's SDK on, which hands them to an exporter that drops them."""

    class Dropped(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    os.environ["OTEL_TRACES_SAMPLER"] = sampler
    traces.begin("bench", exporter=Dropped())
    try:
        return some_spans()
    finally:
        traces.end()
        del os.environ["OTEL_TRACES_SAMPLER"]


def a_text() -> float:
    """Seconds that a text of 34 tokens takes of a forward of 32, on one thread, in bf16."""
    model = AutoModel.from_pretrained(model_folder(Model(model_name_or_path=MODEL)), dtype=torch.bfloat16).eval()
    ids = torch.randint(1000, 20_000, (32, 34), generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        model(input_ids=ids)
        times = []
        for _ in range(10):
            began = time.perf_counter()
            model(input_ids=ids)
            times.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return statistics.median(times) / len(ids)


def a_step(quick: bool) -> float:
    """Median seconds of a step of the demo's encoder: 32 rows of 64 tokens at most."""
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as name:
        rows = "".join(
            f'{{"text": "{word} {"and so on " * 8}", "label": "{word}"}}\n' for word in ("wheat", "ship", "trade") for _ in range(60)
        )
        (Path(name) / "rows.jsonl").write_text(rows)
        fields: dict[str, Any] = {
            "name": "bench",
            "model": {"model_name_or_path": MODEL, "max_length": 64},
            "data": {"train": f"{name}/rows.jsonl", "cache_dir": f"{name}/cache"},
            "max_steps": 3 if quick else 12,
            "storage": name,
        }
        run = LocalRun(torch.device("cpu"))
        work(TrainJob.model_validate(fields), run, f"{name}/run")
        return statistics.median([record.step_seconds for record in run.records if isinstance(record, StepRecord)][1:])


def main() -> None:
    given = options(__doc__, rounds=3)
    contestants = {
        "worker": in_the_worker,
        "ordered": where_it_was_ordered,
        "step": lambda: a_step(given.quick),
        "line": a_line,
        "off": some_spans,
        "unsampled": lambda: with_traces("always_off"),
        "sampled": lambda: with_traces("always_on"),
        "text": a_text,
    }
    found = interleave(contestants, given.rounds)

    def row(metric: str, unit: str, *names: str) -> Row:
        return compare(metric, unit, [1e6 * sum(times) for times in zip(*(found[name] for name in names), strict=True)])

    def share(metric: str, whole: str, *names: str) -> Row:
        parts = [sum(times) for times in zip(*(found[name] for name in names), strict=True)]
        return compare(metric, "%", [100 * part / all_of_it for part, all_of_it in zip(parts, found[whole], strict=True)])

    rows = [
        row("in the worker, a step", "us", "worker"),
        row("where it was ordered, a record", "us", "ordered"),
        compare("a step of MiniLM, 32 rows", "ms", [1e3 * seconds for seconds in found["step"]]),
        share("both as a share of it", "step", "worker", "ordered"),
        row("a request's log line", "us", "line"),
        row("its spans, traces off", "us", "off"),
        row("its spans, not sampled", "us", "unsampled"),
        row("its spans, sampled", "us", "sampled"),
        row("a text of 34 tokens in a forward of MiniLM", "us", "text"),
        share("line and spans, off, as a share of it", "text", "line", "off"),
        share("line and spans, not sampled", "text", "line", "unsampled"),
        share("line and spans, sampled", "text", "line", "sampled"),
    ]
    notes = [
        "the two halves of training run in different processes when there are several workers: the share is an upper bound",
        "a request costs more than its text's share of a full forward: HTTP, tokenizer, gateway; an answer of a language model far more",
    ]
    finish("metrics", given, rows, notes)


if __name__ == "__main__":
    main()
