"""`danlu top`: jobs from their run folders, services from a metrics page, as a person sees them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from danlu import cli, top
from danlu.artifact.runs import open_run
from danlu.metrics import catalog as c


def page(good: int, bad: int, fast: int, slow: int) -> str:
    """A metrics page of two replicas of a model, as Ray writes it, with somebody else's series."""
    lines = ["# TYPE python_gc_total counter", 'python_gc_total{generation="0"} 5']
    lines += [f"# TYPE {c.SERVE_REQUESTS.exported} counter"]
    for worker in ("1", "2"):
        for status, number in (("200", good), ("503", bad)):
            lines.append(f'{c.SERVE_REQUESTS.exported}{{WorkerId="{worker}",model="m",route="/v1/classify",status="{status}"}} {number}')
    name = c.SERVE_SECONDS.exported
    lines += [f"# TYPE {name} histogram"]
    for le, number in (("0.01", fast), ("0.5", fast + slow), ("+Inf", fast + slow)):
        lines.append(f'{name}_bucket{{WorkerId="1",model="m",route="/v1/classify",le="{le}"}} {number}')
    lines += [f"# TYPE {c.SERVE_IN_FLIGHT.exported} gauge", f'{c.SERVE_IN_FLIGHT.exported}{{WorkerId="1",model="m"}} 3']
    return "\n".join(lines) + "\n"


def samples(text: str) -> top.Samples:
    found: top.Samples = {}
    top.read_into(found, text)
    return found


def test_services_are_what_happened_between_two_looks() -> None:
    (served,) = top.services(samples(page(100, 0, 90, 10)), samples(page(190, 10, 150, 50)), seconds=10.0)
    assert served.model == "m"
    assert served.requests_per_second == 2 * (90 + 10) / 10
    assert served.failed == 0.1
    assert served.p95_s == 0.5, "60 of 100 were within 10 ms"
    assert served.in_flight == 3


def test_a_model_that_nobody_asked_has_no_p95() -> None:
    (served,) = top.services(samples(page(1, 0, 1, 0)), samples(page(1, 0, 1, 0)), seconds=1.0)
    assert (served.requests_per_second, served.failed, served.p95_s) == (0.0, 0.0, None)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    step = {"kind": "step", "step": 7, "num_steps": 20, "loss": 0.25, "tokens_per_second": 1234.0, "eta_s": 65.0, "step_seconds": 1.0}
    for name, state in (("done", "finished"), ("going", "running")):
        run = open_run(str(tmp_path), name, "digest")
        run.record(step)
        run.record({"kind": "eval", "step": 7, "metrics": {"accuracy": 0.5, "loss": 1.0}})
        run.set_status(state, spec_digest="digest")
    return str(tmp_path)


def test_jobs_that_run_stand_first_and_one_that_records_nothing_is_called_silent(storage: str) -> None:
    import time

    now = time.time()
    assert [(job.name, job.state, job.step, job.num_steps) for job in top.jobs(storage, now)] == [
        ("going", "running", 7, 20),
        ("done", "finished", 7, 20),
    ]
    assert [job.state for job in top.jobs(storage, now + 300)] == ["silent", "finished"]
    assert top.jobs(f"{storage}/nowhere", now) == []


def test_the_table_says_where_a_job_stands(storage: str) -> None:
    import time

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    served = top.services(samples(page(0, 0, 0, 0)), samples(page(95, 5, 99, 1)), seconds=10.0)
    console.print(top.screen(top.jobs(storage, time.time()), served))
    text = console.export_text()
    for word in ("going", "7/20", "0.2500", "accuracy 0.5000", "1,234", "65 s", "20.0", "5.0%"):
        assert word in text, text


@pytest.fixture
def discovery(tmp_path: Path) -> Iterator[str]:
    """A file as Ray writes it: one node that answers and one that has gone."""

    class Node(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page(1, 0, 1, 0).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Node)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = tmp_path / "discovery.json"
    file.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{server.server_port}", "127.0.0.1:1"]}]))
    yield str(file)
    server.shutdown()


def test_a_node_that_has_gone_does_not_hide_the_others(discovery: str, tmp_path: Path) -> None:
    assert c.SERVE_REQUESTS.exported in top.scrape(discovery)
    assert top.scrape(str(tmp_path / "no-ray.json")) == {}


def test_the_command_prints_it_once(storage: str) -> None:
    result = CliRunner().invoke(cli.app, ["top", "--storage", storage, "--once"])
    assert result.exit_code == 0
    assert "going" in result.output
