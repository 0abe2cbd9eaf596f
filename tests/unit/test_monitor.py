"""`danlu monitor`: a real Prometheus and Alertmanager with our rules, and nothing of them after."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from danlu.errors import ResourceError
from danlu.metrics.alerts import ALERTS
from danlu.monitor import monitoring

needs_both = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("prometheus-alertmanager") is None,
    reason="Prometheus and Alertmanager are not installed: apt-get install prometheus prometheus-alertmanager",
)


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@needs_both
def test_it_loads_the_rules_finds_targets_and_leaves_nothing(tmp_path: Path) -> None:
    targets = tmp_path / "ray.json"
    targets.write_text(json.dumps([{"targets": ["127.0.0.1:1"], "labels": {"job": "ray"}}]))
    before = descendants()
    with monitoring(targets=str(targets), port=0, alert_port=0, interval="1s") as running:
        running.check()
        assert "TrainingStalled" in httpx.get(running.alerts()).text
        rules = httpx.get(f"{running.prometheus}/api/v1/rules").json()["data"]["groups"]
        assert {rule["name"] for group in rules for rule in group["rules"] if rule["type"] == "alerting"} == {
            alert.name for alert in ALERTS
        }
        deadline = time.monotonic() + 30
        while not (found := httpx.get(f"{running.prometheus}/api/v1/query", params={"query": "up"}).json()["data"]["result"]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert found[0]["metric"] == {"__name__": "up", "job": "ray", "instance": "127.0.0.1:1"}
        assert found[0]["value"][1] == "0"
        managers = httpx.get(f"{running.prometheus}/api/v1/alertmanagers").json()["data"]["activeAlertmanagers"]
        assert [manager["url"] for manager in managers] == [f"{running.alertmanager}/api/v2/alerts"]
    assert descendants() <= before
    assert not running.folder.exists()


@needs_both
def test_a_port_in_use_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="cannot be listened on"), monitoring(port=taken.getsockname()[1], alert_port=0):
            pass


def test_a_missing_prometheus_is_said_with_what_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="apt-get install prometheus"), monitoring(port=0, alert_port=0):
        pass


@needs_both
def test_ctrl_c_ends_the_command_and_both_programs() -> None:
    command = [sys.executable, "-m", "danlu.cli", "monitor", "--port", "0", "--alert-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert "http://127.0.0.1:" in lines[0], lines
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
