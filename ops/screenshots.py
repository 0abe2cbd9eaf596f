"""Pictures of what one sees, into ops/images: Prometheus' graphs and alerts, a job's report, a service's page, a load's report.

`python ops/screenshots.py` trains on Reuters R8 for a few steps, serves a fake language model, puts a load on it and watches both with
`danlu monitor`'s Prometheus. It takes some three minutes, Debian's chromium, prometheus and prometheus-alertmanager.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import httpx
import ray

from danlu import sdk, terminal
from danlu.client.load import Load, measure
from danlu.client.page import page
from danlu.errors import ResourceError
from danlu.local_ray import start_ray
from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.monitor import monitoring
from danlu.spec.files import load
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "ops/images"
LARGEST = 150_000
"""Bytes of a picture: a repository keeps each version of it."""
STEPS = 60


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise ResourceError("chromium is not installed", where="ops/screenshots.py", fix="apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    with terminal.no_process_left(), tempfile.TemporaryDirectory(prefix="danlu-shots-") as name:
        folder = Path(name)
        start_ray()
        node = next(node for node in ray.nodes() if node["Alive"])
        targets = folder / "ray.json"
        targets.write_text(
            json.dumps([{"labels": {"job": "ray"}, "targets": [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"]}])
        )
        with monitoring(targets=str(targets), port=0, alert_port=0, interval="2s") as monitor:

            def shoot(picture: str, url: str, height: int = 800) -> None:
                _shoot(chromium, url, IMAGES / f"{picture}.png", height, folder)

            job = load(TrainJob, ROOT / "k8s/examples/reuters-r8.yaml", [f"max_steps={STEPS}", f"storage={folder}/runs"])
            prepared = sdk.prepare(job)
            trained = sdk.train(job, prepared=prepared, fresh=True)
            _until(lambda: _has(monitor.prometheus, catalog.TRAIN_LOSS))
            shoot("prometheus-loss", _graph(monitor.prometheus, f"max by (train_job) ({catalog.TRAIN_LOSS.exported})"))
            shoot("report", Path(sdk.report(prepared, trained)).resolve().as_uri())
            engine = {"kind": "echo_text", "time_to_first_token_ms": 30, "time_per_output_token_ms": 5}
            with sdk.serving(Service.model_validate({"name": "parrot", "engine": engine, "http": {"port": 0}})) as endpoint:
                report, seen = measure(Load(endpoint.url, "parrot", 200, 8, None, max_tokens=None, seed=0, headers={}))
                (folder / "load.html").write_text(page(report, seen), encoding="utf-8")
                shoot("load", (folder / "load.html").as_uri())
                shoot("service", f"{endpoint.url}/docs")
                _until(lambda: _has(monitor.prometheus, catalog.SERVE_RUNNING))
                shoot("prometheus-alerts", monitor.alerts())


def _shoot(chromium: str, url: str, picture: Path, height: int, folder: Path) -> None:
    """A picture of a page, once its scripts have had ten seconds of its own time."""
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    command += [f"--user-data-dir={folder}/chromium", f"--window-size=1200,{height}", "--virtual-time-budget=10000"]
    subprocess.run([*command, f"--screenshot={picture}", url], check=True, capture_output=True, timeout=120)
    size = picture.stat().st_size
    if size > LARGEST:
        raise ResourceError(f"{picture.name} has {size:,} bytes; {LARGEST:,} will do", where="ops/screenshots.py", fix="a smaller window")
    print(f"  {picture.relative_to(ROOT)}  {size:,} bytes", flush=True)


def _graph(prometheus: str, expression: str) -> str:
    asked = {"g0.expr": expression, "g0.tab": "0", "g0.range_input": "5m"}
    return f"{prometheus}/graph?{urllib.parse.urlencode(asked)}"


def _has(prometheus: str, metric: Metric) -> bool:
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": metric.exported}, timeout=10)
    return bool(answer.json()["data"]["result"])


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise ResourceError("Prometheus has not seen it within a minute", where="ops/screenshots.py", fix="again on a quieter machine")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
