"""Log lines in both formats, what the environment asks of logs and traces, and a job as both tell it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from danlu import logs, sdk, traces
from danlu.errors import ResourceError, SpecError
from danlu.spec.train import TrainJob

Lines = Callable[[], list[dict[str, Any]]]
log = logging.getLogger("danlu.some.place")


def test_a_line_is_an_object_with_the_ids_of_its_process_and_its_task(log_lines: Lines) -> None:
    token = logs.about.set({"request_id": "r1"})
    with logs.naming(train_job="reviews"):
        log.info("done %d\nthings", 3, extra={"about": {"seconds": 0.5}})
    logs.about.reset(token)
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed")
    log.debug("not told")
    first, second = log_lines()
    when = datetime.fromisoformat(first.pop("time"))
    assert abs((datetime.now(UTC) - when).total_seconds()) < 60
    assert first == {
        "level": "INFO", "logger": "danlu.some.place", "message": "done 3\nthings", "service": "tests", "train_job": "reviews",
        "request_id": "r1", "seconds": 0.5,
    }  # fmt: skip
    assert second.keys() == {"time", "level", "logger", "message", "service", "stack"}
    assert second["stack"].endswith("ValueError: no")


def test_a_person_gets_text_and_nobody_can_forge_a_line(
    log_lines: Lines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "text")
    logs.begin("json", train_job="a")
    log.warning("careful", extra={"about": {"request_id": "x\n12:00:00 ERROR forged", "seconds": 2.5}})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r' WARNING danlu.some.place: careful  train_job=a  request_id="x\n12:00:00 ERROR forged"  seconds=2.5')


def test_what_the_environment_asks_for_in_vain_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "yaml")
    with pytest.raises(SpecError, match=r"DANLU_LOG_FORMAT: 'yaml' is no format of log lines\n  try: text or json"):
        logs.begin("json")
    for name in [*traces.ENDPOINTS, traces.EXPORTER, "OTEL_SDK_DISABLED"]:
        monkeypatch.delenv(name, raising=False)
    assert traces.asked_exporter() is None
    monkeypatch.setenv(traces.EXPORTER, "zipkin")
    with pytest.raises(SpecError, match="OTEL_TRACES_EXPORTER: 'zipkin' is no exporter here"):
        traces.asked_exporter()
    monkeypatch.setenv(traces.EXPORTER, "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="an extra: pip install danlu[otel]")
    with pytest.raises(SpecError, match="'grpc' is not spoken here"):
        traces.asked_exporter()
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    assert type(traces.asked_exporter()).__name__ == "OTLPSpanExporter"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert traces.asked_exporter() is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(
        ResourceError, match=r"OTEL_TRACES_EXPORTER: traces are asked for, and .* is not installed\n  try: pip install danlu\[otel\]"
    ):
        traces.asked_exporter()


def test_what_is_off_is_not_imported() -> None:
    code = "import sys, danlu.cli, danlu.serve.gateway; sys.exit(bool({name for name in sys.modules if name.startswith('opentelemetry')}))"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "OTEL_TRACES_EXPORTER": "none"}).returncode == 0


def test_a_job_is_followed_from_its_plan_to_its_first_step(
    spans: Callable[[], dict[str, list[Any]]],
    log_lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    topic_files: dict[str, str],
    tmp_path: Path,
) -> None:
    job = TrainJob.model_validate(
        {
            "name": "topics",
            "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
            "data": {"train": topic_files["train"], "cache_dir": str(tmp_path / "cache")},
            "workers": {"num_workers": 1, "cpus_per_worker": 1},
            "global_batch_size": 16,
            "micro_batch_size": 16,
            "max_steps": 3,
            "storage": str(tmp_path / "runs"),
        }
    )
    monkeypatch.setenv("TRACEPARENT", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    with traces.span("job", carrier=traces.from_environment()):
        handed_on = traces.to_environment(traces.carrier())
        sdk.train(job, prepared=sdk.prepare(job, calibrate=False))
    found = {name: some[0] for name, some in spans().items()}
    assert set(found) == {"job", "plan", "train", "data", "model", "first step"}
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {"0af7651916cd43dd8448eb211c80319c"}
    assert handed_on == {"TRACEPARENT": f"00-{found['job'].context.trace_id:032x}-{found['job'].context.span_id:016x}-01"}
    assert found["plan"].parent.span_id == found["train"].parent.span_id == found["job"].context.span_id
    for name in ("data", "model", "first step"):
        assert found[name].parent.span_id == found["train"].context.span_id
    order = [found[name] for name in ("plan", "data", "model", "first step")]
    assert [span.start_time for span in order] == sorted(span.start_time for span in order)
    assert found["first step"].end_time <= found["train"].end_time
    lines = [line for line in log_lines() if line["logger"] == "danlu.train"]
    assert [line["message"] for line in lines][:2] == ["training begins", "first step"]
    assert {"evaluated", "checkpoint"} <= {line["message"] for line in lines}
    assert {(line["train_job"], line["run"]) for line in lines} == {("topics", "0001")}
    assert json.dumps(lines[0])  # no tensor or path slipped in
