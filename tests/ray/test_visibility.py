"""The catalogue and the metrics port are the same list: nothing is promised that is not there, nothing is there that is not promised."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from danlu import sdk
from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.serve import app
from danlu.serve.keys import create_key, set_budget
from danlu.spec.serve import Http, Service
from danlu.spec.train import TrainJob
from danlu.train.run import Record

pytestmark = pytest.mark.usefixtures("ray_local")

TORCH_ONLY = {catalog.SERVE_DRAFTED, catalog.SERVE_DRAFTED_RIGHT, catalog.SERVE_KERNELS}
"""What no other engine has to tell: test_torch_text.py reads them."""


def samples_of(metric: Metric) -> set[str]:
    """Names of the samples that a metric is exported as."""
    return {f"{metric.exported}{end}" for end in ("_bucket", "_sum", "_count")} if metric.kind == "histogram" else {metric.exported}


def missing(layer: str, seen: set[str]) -> set[str]:
    """Sample names of a layer that nobody has seen."""
    return {name for metric in catalog.ALL if metric.layer == layer and metric not in TORCH_ONLY for name in samples_of(metric)} - seen


def test_a_training_and_a_serving_run_show_every_metric_of_the_catalogue_and_no_other(
    make_job: Callable[..., TrainJob], topics: TrainJob, metrics_port: Any, wait_for: Callable[..., Any], tmp_path: Path
) -> None:
    metrics_port.samples()
    # After the other files of this folder all of it has been there already; alone, this test runs what is missing.
    if missing("train", metrics_port.seen):
        job = make_job("seen", workers={"num_workers": 1}, precision="fp16", budget_usd=5, max_steps=12, checkpoint={"save_steps": 4})
        prepared = sdk.prepare(job, calibrate=False)

        def interrupt(record: Record) -> None:
            if record.step == 10:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sdk.train(job, listener=interrupt, prepared=prepared)
        sdk.train(job, prepared=prepared)  # goes on from the checkpoint
    if missing("serve", metrics_port.seen):
        endpoint = app.run(topics.service("topics@v1").model_copy(update={"http": Http(port=0)}))
        assert httpx.post(f"{endpoint.url}/v1/classify", json={"input": "wheat"}, timeout=60).status_code == 200
        assert httpx.post(f"{endpoint.url}/v1/classify", json={"input": []}, timeout=60).status_code == 400
        metrics_port.samples()
        wait_for("the batches", lambda: f"{catalog.SERVE_BATCH_ROWS.exported}_sum" in metrics_port.samples())
        app.stop()
        key = create_key(tmp_path / "keys.json", "ada", lifetime=timedelta(days=3))
        set_budget(tmp_path / "keys.json", "ada", 5.0)
        fields = {"name": "text", "engine": {"kind": "echo_text"}, "http": {"port": 0}, "auth": {"keys_file": str(tmp_path / "keys.json")}}
        endpoint = app.run(Service.model_validate(fields))
        for _ in range(2):  # the second finds the first one's prompt in the cache
            bearer = {"authorization": f"Bearer {key}"}
            assert httpx.post(f"{endpoint.url}/v1/completions", json={"prompt": "wheat"}, headers=bearer, timeout=60).status_code == 200
    try:
        for layer in ("train", "serve"):
            wait_for(
                lambda layer=layer: f"these are not there: {missing(layer, metrics_port.seen)}",
                lambda layer=layer: metrics_port.samples() and not missing(layer, metrics_port.seen),
                seconds=60,
            )
    finally:
        app.stop()
    promised = {name for metric in catalog.ALL for name in samples_of(metric)}
    assert {name for name in metrics_port.seen if name.startswith("ray_danlu_")} <= promised
    assert promised - metrics_port.seen <= {metric.exported for metric in TORCH_ONLY}
