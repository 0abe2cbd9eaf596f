"""The whole stack as a person sees it: Ray, a job, a service, Prometheus, Alertmanager, a webhook. Nothing in between is made up."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray

from danlu.metrics import catalog, costs, foreign
from danlu.metrics.alerts import ALERTS, RECORDED
from danlu.metrics.dashboards import DASHBOARDS
from danlu.metrics.rules import rule_file
from danlu.monitor import Monitor, monitoring
from danlu.serve import app
from danlu.serve.keys import create_key, set_budget
from danlu.spec.serve import Http, Service
from danlu.spec.train import TrainJob
from danlu.train import driver

pytestmark = [
    pytest.mark.soak,
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("prometheus-alertmanager") is None,
        reason="Prometheus and Alertmanager are not installed: apt-get install prometheus prometheus-alertmanager",
    ),
]


def fast(text: str) -> str:
    """The rule file with three seconds for a minute; Ray shows new numbers every ten."""
    return re.sub(r"\b(\d+)m\b", lambda found: f"{3 * int(found[1])}s", text)


@pytest.fixture(scope="module")
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A URL, and what was posted to it."""
    heard: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()


@pytest.fixture(scope="module")
def stack(ray_local: object, webhook: tuple[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitor]:
    # In the form of Ray's own discovery file, which is the last started Ray's: others may run on this machine.
    node = next(node for node in ray.nodes() if node["Alive"])
    targets = tmp_path_factory.mktemp("targets") / "ray.json"
    targets.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"]}]))
    url, _ = webhook
    with monitoring(
        targets=str(targets),
        port=0,
        alert_port=0,
        page=f"{url}/page",
        tell=f"{url}/tell",
        interval="2s",
        rules=fast(rule_file()),
        group_wait="1s",
    ) as running:
        yield running
    for process in psutil.process_iter(["cmdline"]):
        assert str(running.folder) not in " ".join(process.info["cmdline"] or []), "nothing is left"
    assert not running.folder.exists()


SPOKEN = {
    metric.exported
    for metric in (
        catalog.SERVE_FIRST_TOKEN_SECONDS,
        catalog.SERVE_INTER_TOKEN_SECONDS,
        catalog.SERVE_PROMPT_TOKENS,
        catalog.SERVE_COMPLETION_TOKENS,
        catalog.SERVE_SEQUENCES,
        catalog.SERVE_RUNNING,
        catalog.SERVE_WAITING,
        catalog.SERVE_CACHE_USE,
        catalog.SERVE_PREFIX_QUERIED,
        catalog.SERVE_PREFIX_HIT,
        catalog.SERVE_ADAPTERS,
        catalog.SERVE_ADAPTER_LOADS,
        catalog.SERVE_KEY_REQUESTS,
        catalog.SERVE_KEY_TOKENS,
        catalog.SERVE_KEY_SECONDS,
        catalog.SERVE_TENANT_BUDGET,
        costs.TENANT_USD,
        costs.TENANT_SPENT,
        costs.TENANT_BUDGET_USED,
        catalog.SERVE_KEY_EXPIRY,
        catalog.SERVE_KEYS_UNREADABLE,
    )
}
"""What only a language model has, or a service with keys."""


def ask(stack: Monitor, expression: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{stack.prometheus}/api/v1/query", params={"query": expression}, timeout=30)
    assert answer.status_code == 200, f"{expression}: {answer.text}"
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def filled_in(expression: str) -> str:
    """As Grafana asks with every variable at All."""
    text = expression.replace("$__rate_interval", "30s").replace("$__range", "10m")
    return re.sub(r'"\$\w+"', '".*"', text)


def test_every_panel_of_language_models_and_of_keys_has_data(stack: Monitor, wait_for: Callable[..., Any], tmp_path: Path) -> None:
    panels = [(panel.title, expr) for page in DASHBOARDS for panel in page.panels for expr, _ in panel.queries if expr.reads & SPOKEN]
    assert len(panels) > 10
    engine = {"kind": "echo_text", "time_per_output_token_ms": 5, "allow_runtime_lora_updating": True}
    keys = tmp_path / "keys.json"
    bearer = {"authorization": f"Bearer {create_key(keys, 'ada', lifetime=timedelta(days=3))}"}
    set_budget(keys, "ada", 5.0)
    service = {"name": "text", "engine": engine, "auth": {"keys_file": str(keys)}, "http": {"port": 0}}
    client = httpx.Client(base_url=app.run(Service.model_validate(service)).url, headers=bearer, timeout=60)

    def empty() -> list[str]:
        client.post("/v1/completions", json={"prompt": "wheat", "max_tokens": 5}).raise_for_status()
        client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/nosuch"})
        return [f"{title}: {expr.text}" for title, expr in panels if not ask(stack, filled_in(expr.text))]

    try:
        wait_for(lambda: "these have no data:\n" + "\n".join(empty()), lambda: not empty(), seconds=90)
        wait_for("the alert", lambda: firing(stack, "AdapterLoadFailed"), seconds=60)
        wait_for("that the key expires soon", lambda: firing(stack, "KeyExpiring"), seconds=60)
        whole = keys.read_bytes()
        keys.write_bytes(b"{")
        wait_for("that the keys are lost", lambda: firing(stack, "KeyStoreDown"), seconds=90)
        client.post("/v1/completions", json={"prompt": "wheat", "max_tokens": 5}).raise_for_status()
        keys.write_bytes(whole)
        wait_for("that they are there again", lambda: not firing(stack, "KeyStoreDown"), seconds=90)
    finally:
        client.close()
        app.stop()


def test_every_panel_and_rule_has_data_and_a_stopped_worker_is_told_and_untold(
    stack: Monitor,
    webhook: tuple[str, list[dict[str, Any]]],
    make_job: Callable[..., TrainJob],
    topics: TrainJob,
    processes_named: Callable[[str], list[psutil.Process]],
    wait_for: Callable[..., Any],
    tmp_path: Path,
) -> None:
    _, heard = webhook
    endpoint = app.run(topics.service("topics@v1").model_copy(update={"http": Http(port=0)}))
    job = make_job(
        "watched", max_steps=100_000, checkpoint={"save_steps": 200}, evaluation={"eval_steps": 200}, num_train_epochs=1.0, budget_usd=5
    )
    stop = threading.Event()
    steps: list[int] = []

    def listener(record: Any) -> None:
        steps.append(record.step)

    def train() -> None:
        try:
            driver.fit(job, str(tmp_path), listener)
        except BaseException as error:  # noqa: BLE001  # ended by us
            steps.append(-1)
            ended.append(error)

    def use() -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                client.post(f"{endpoint.url}/v1/classify", json={"input": ["wheat exports", "cargo vessel"]})
                client.post(f"{endpoint.url}/v1/classify", json={"input": []})
                stop.wait(0.2)

    ended: list[BaseException] = []
    with ThreadPoolExecutor(2) as pool:
        training, using = pool.submit(train), pool.submit(use)
        try:
            wait_for("steps", lambda: len(steps) > 250, seconds=120)
            absent = {other.exported for other in foreign.ALL if other.absent_here}
            may_be_empty: dict[str, str] = {}

            def empty() -> list[str]:
                found = []
                expressions = {(page.uid, panel.title): expr for page in DASHBOARDS for panel in page.panels for expr, _ in panel.queries}
                expressions |= {("rule", rule.exported): rule.expr for rule in RECORDED}
                for name, expr in expressions.items():
                    if expr.reads & SPOKEN:
                        continue
                    if expr.reads & absent:
                        may_be_empty[" / ".join(name)] = "its source is not on this machine"
                    elif not ask(stack, filled_in(expr.text)):
                        found.append(f"{name}: {expr.text}")
                return found

            wait_for(lambda: "these have no data:\n" + "\n".join(empty()), lambda: not empty(), seconds=90)
            assert 8 < len(may_be_empty) < 25, may_be_empty
            for alert in ALERTS:
                ask(stack, alert.expr.text)  # each can be asked; most have no result, which is well
            assert {rule["health"] for group in rule_groups(stack) for rule in group["rules"]} == {"ok"}
            assert not firing(stack, "TrainingStalled")

            # One of two workers is stopped: the other waits for it in a collective.
            victim = processes_named("ray::RayTrainWorker")[-1]
            os.kill(victim.pid, signal.SIGSTOP)
            try:
                wait_for("the alert at the webhook", lambda: told(heard, "TrainingStalled", "firing"), seconds=180)
                assert told(heard, "TrainingStalled", "firing")[0]["labels"]["train_job"] == "watched"
                assert told(heard, "TrainingStalled", "firing")[0]["labels"]["severity"] == "critical"
            finally:
                os.kill(victim.pid, signal.SIGCONT)
            wait_for("its end at the webhook", lambda: told(heard, "TrainingStalled", "resolved"), seconds=180)
        finally:
            stop.set()
            for worker in processes_named("ray::RayTrainWorker"):
                worker.kill()
            using.result(60)
            training.result(120)
            app.stop()
    assert ended, "the job was ended by us"
    wait_for("that the job failed, at the webhook", lambda: told(heard, "TrainingFailed", "firing"), seconds=60)
    assert told(heard, "TrainingFailed", "firing")[0]["labels"]["reason"] == "worker_lost"
    wait_for("its end at the webhook", lambda: told(heard, "TrainingFailed", "resolved"), seconds=180)


def test_a_breached_objective_pages_and_is_over_once_answers_come_again(
    stack: Monitor, webhook: tuple[str, list[dict[str, Any]]], wait_for: Callable[..., Any]
) -> None:
    _, heard = webhook

    def service(latency_ms: int) -> Service:
        engine = {"kind": "echo", "latency_ms": latency_ms}
        return Service.model_validate({"name": "slo", "engine": engine, "limits": {"request_timeout_s": 0.2}, "http": {"port": 0}})

    stop = threading.Event()
    statuses: list[int] = []

    def use(url: str) -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.wait(0.1):
                statuses.append(client.post(f"{url}/v1/classify", json={"input": "a"}).status_code)

    with ThreadPoolExecutor(1) as pool:
        using = pool.submit(use, app.run(service(5000)).url)  # every answer is too late: 504
        try:
            wait_for("the page", lambda: told(heard, "ServingErrorBudgetFast", "firing"), seconds=180)
            (alert, *_) = told(heard, "ServingErrorBudgetFast", "firing")
            assert (alert["labels"]["model"], alert["labels"]["severity"]) == ("slo", "critical")
            assert set(statuses) == {504}
            app.run(service(0))
            wait_for("its end", lambda: told(heard, "ServingErrorBudgetFast", "resolved"), seconds=240)
            assert statuses[-1] == 200
        finally:
            stop.set()
            using.result(60)
            app.stop()


def rule_groups(stack: Monitor) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = httpx.get(f"{stack.prometheus}/api/v1/rules", timeout=30).json()["data"]["groups"]
    return groups


def firing(stack: Monitor, alert: str) -> list[dict[str, Any]]:
    return ask(stack, f'ALERTS{{alertname="{alert}", alertstate="firing"}}')


def told(heard: list[dict[str, Any]], alert: str, status: str) -> list[dict[str, Any]]:
    return [one for message in heard for one in message["alerts"] if one["labels"]["alertname"] == alert and one["status"] == status]
