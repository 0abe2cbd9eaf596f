"""What the tests on a real Ray share: a small job, the processes of a name, and what stands on Ray's metrics port."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from danlu.spec.train import TrainJob

JobMaker = Callable[..., TrainJob]


@pytest.fixture(scope="session")
def make_job(tiny_model: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> JobMaker:
    """A TrainJob for two workers with one core each, in float32; keywords replace its fields."""
    folder = tmp_path_factory.mktemp("jobs")

    def make(name: str, **overrides: Any) -> TrainJob:
        fields: dict[str, Any] = {
            "name": name,
            "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
            "data": {"train": topic_files["train"], "test": topic_files["test"], "cache_dir": str(folder / "cache")},
            "workers": {"num_workers": 2},
            "optim": {"learning_rate": 3e-3, "schedule": {"kind": "constant", "warmup_ratio": 0.0}},
            "precision": "fp32",
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "max_steps": 8,
            "storage": str(folder / "storage"),
        }
        return TrainJob.model_validate(fields | overrides)

    return make


def wait_for(what: str | Callable[[], str], condition: Callable[[], Any], *, seconds: float = 120.0) -> Any:
    """The condition's value once it is true; fails with `what` if that takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")


@pytest.fixture(scope="session", name="wait_for")
def wait_for_fixture() -> Callable[..., Any]:
    return wait_for


@pytest.fixture(scope="session")
def processes_named() -> Callable[[str], list[psutil.Process]]:
    """Processes that this test session started and whose command line begins with a name, the oldest first."""

    def named(name: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(name) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda process: process.create_time())

    return named


@pytest.fixture(scope="session")
def log_of_ray(ray_local: object) -> Callable[..., list[dict[str, Any]]]:
    """The JSON lines in the logs of Ray's workers that have these fields, as `ray logs` shows them."""
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path())

    def lines(**fields: object) -> list[dict[str, Any]]:
        texts = [line for path in folder.glob("worker-*.err") for line in path.read_text(errors="replace").splitlines()]
        found = [json.loads(text) for text in texts if text.startswith('{"time"')]
        return [line for line in found if fields.items() <= line.items()]

    return lines


@dataclass
class MetricsPort:
    """Ray's metrics port, read with Prometheus' own parser. `seen` keeps the name of every sample of ours that ever stood there."""

    url: str
    seen: set[str] = field(default_factory=set)

    def samples(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """Sample name -> (labels, value)."""
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        ours = "\n".join(line for line in httpx.get(self.url, timeout=60).text.splitlines() if "danlu" in line)
        for family in text_string_to_metric_families(ours):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        self.seen |= set(found)
        return found

    def total(self, name: str, **labels: str) -> float:
        """Sum of a name's samples that have these labels."""
        return sum(value for found, value in self.samples().get(name, []) if labels.items() <= found.items())


@pytest.fixture(scope="session")
def metrics_port(ray_local: object) -> MetricsPort:
    import ray

    node = next(node for node in ray.nodes() if node["Alive"])
    return MetricsPort(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")


@pytest.fixture(scope="session")
def topics(make_job: JobMaker, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A finished job in its own storage: `topics@v1` is what was trained, `topics@v2` its int8 version."""
    from danlu import sdk

    job = make_job(
        "topics",
        workers={"num_workers": 1},
        max_steps=60,
        storage=str(tmp_path_factory.mktemp("topics")),
        compress={"quantization": {"kind": "int8"}, "max_quality_drop": 1.0, "min_speedup": 1e-9},
    )
    trained = sdk.train(job, prepared=sdk.prepare(job, calibrate=False))
    assert trained.reference == "topics@v1"
    assert trained.evaluations["test"].scores.accuracy > 0.8
    assert sdk.quantize(job, trained.bundle, run=trained.run).reference == "topics@v2"
    return job
