"""A Prometheus and an Alertmanager on this machine, with our rules, over the Ray that runs here: `danlu monitor`."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from danlu.errors import ResourceError
from danlu.metrics.rules import RAY_TARGETS, alertmanager_config, prometheus_config, rule_file

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Monitor:
    """What runs, and where."""

    prometheus: str
    alertmanager: str
    folder: Path

    def alerts(self) -> str:
        """Prometheus' page of alerts, which Debian's build has among its classic ones."""
        page = f"{self.prometheus}/alerts"
        return page if httpx.get(page, timeout=5).status_code == 200 else f"{self.prometheus}/classic/alerts"

    def check(self) -> None:
        """ResourceError if Prometheus or Alertmanager does not answer any more."""
        for name, url in (("Prometheus", self.prometheus), ("Alertmanager", self.alertmanager)):
            try:
                httpx.get(f"{url}/-/ready", timeout=5).raise_for_status()
            except httpx.HTTPError as error:
                raise ResourceError(f"{name} does not answer any more: {error}", where=url, fix="start it again") from error


@contextlib.contextmanager
def monitoring(
    *,
    targets: str = RAY_TARGETS,
    port: int = 9090,
    alert_port: int = 9093,
    page: str | None = None,
    tell: str | None = None,
    interval: str = "5s",
    rules: str | None = None,
    group_wait: str = "5s",
) -> Iterator[Monitor]:
    """Both of them, up while the block runs; nothing is left of them after. A port of 0 takes a free one.

    `page` and `tell` are webhooks for critical and other alerts; `rules` replaces our rule file's text.
    """
    prometheus, alertmanager = _program("prometheus"), _program("prometheus-alertmanager", "alertmanager")
    port, alert_port = _free(port), _free(alert_port)
    with tempfile.TemporaryDirectory(prefix="danlu-monitor-", ignore_cleanup_errors=True) as name, contextlib.ExitStack() as ends:
        folder = Path(name)
        (folder / "rules.yaml").write_text(rules or rule_file(), encoding="utf-8")
        found = {"file_sd_configs": [{"files": [targets], "refresh_interval": interval}]}
        (folder / "prometheus.yaml").write_text(
            prometheus_config(targets=found, rules=["rules.yaml"], alertmanager=f"127.0.0.1:{alert_port}", interval=interval),
            encoding="utf-8",
        )
        (folder / "alertmanager.yaml").write_text(alertmanager_config(page=page, tell=tell, wait=group_wait), encoding="utf-8")
        running = Monitor(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{alert_port}", folder)
        ends.enter_context(
            _running(
                folder / "alertmanager.log",
                running.alertmanager,
                [
                    alertmanager,
                    f"--config.file={folder / 'alertmanager.yaml'}",
                    f"--storage.path={folder / 'alertmanager'}",
                    f"--web.listen-address=127.0.0.1:{alert_port}",
                    "--cluster.listen-address=",
                ],
            )
        )
        ends.enter_context(
            _running(
                folder / "prometheus.log",
                running.prometheus,
                [
                    prometheus,
                    f"--config.file={folder / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
            )
        )
        yield running


@contextlib.contextmanager
def _running(log: Path, url: str, command: list[str]) -> Iterator[None]:
    """The program until the block ends; ready once it says so."""
    with log.open("wb") as file:
        # A session of its own: Ctrl-C reaches us, and we end it.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
                raise ResourceError(f"{Path(command[0]).name} did not start: {' | '.join(lines)}", where="danlu monitor")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _program(*names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    raise ResourceError(
        f"{' or '.join(names)} is not installed",
        where="danlu monitor",
        fix="on Debian or Ubuntu: apt-get install prometheus prometheus-alertmanager",
    )


def _free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ResourceError(f"127.0.0.1:{port} cannot be listened on: {error.strerror}", where="port", fix="--port 0") from error
        return int(probe.getsockname()[1])
