"""The examples of k8s/examples: their rows are what they say, and their specs, made small, go from rows to answers."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from danlu import sdk
from danlu.serve.engines.encoder import EncoderEngine
from danlu.serve.gateway import Gateway
from danlu.spec.files import load
from danlu.spec.serve import Encoder, Limits
from danlu.spec.train import TrainJob

EXAMPLES = Path(__file__).parents[2] / "k8s" / "examples"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def script(name: str) -> ModuleType:
    """A script of an example, as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_").replace("-", "_"), EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(name: str, folder: Path, *more: str, model: Path | None = None) -> TrainJob:
    """An example's job on a few rows in `folder`, three steps of it, each checked as `--set` is."""
    job = load(TrainJob, EXAMPLES / f"{name}.yaml")
    given = [f"data.{role}={folder / Path(path).name}" for role in ("train", "test") if (path := getattr(job.data, role))]
    given += [f"model.model_name_or_path={model}"] if model is not None else []
    given += ["model.max_length=32", "max_steps=3", "global_batch_size=8", "micro_batch_size=8", "precision=fp32"]
    return load(TrainJob, EXAMPLES / f"{name}.yaml", [*given, f"storage={folder}/runs", f"data.cache_dir={folder}/cache", *more])


def train(job: TrainJob) -> sdk.Trained:
    return sdk.train(job, prepared=sdk.prepare(job, calibrate=False))


def asked(trained: sdk.Trained) -> TestClient:
    """A client of the bundle's service, in this process."""
    gateway = Gateway(EncoderEngine(Encoder(), trained.bundle), trained.bundle.meta.name, Limits(), lambda *_, **__: None)
    asyncio.run(gateway.start())
    return TestClient(gateway)


# Financial risk.


def test_loan_notes_default_as_often_as_their_chance_says() -> None:
    make = script("financial-risk/make_rows").make_rows
    rows = make(4000, 5)
    assert make(4000, 5) == rows != make(4000, 6)
    chance = np.array([float(row["chance"]) for row in rows])
    defaults = np.array([row["label"] == "default" for row in rows])
    for some in (chance < 0.1, (chance >= 0.1) & (chance < 0.4), chance >= 0.4):
        assert abs(defaults[some].mean() - chance[some].mean()) < 4 * np.sqrt((chance[some] * (1 - chance[some])).sum()) / some.sum()
    assert 0.1 < defaults.mean() < 0.4


def test_financial_risk_answers_by_cost_and_explains(tiny_model: Path, tmp_path: Path) -> None:
    script("financial-risk/make_rows").write(tmp_path, num_train=80, num_test=40)
    trained = train(small("financial-risk", tmp_path, model=tiny_model))
    found = sdk.examine(trained.bundle, storage=str(tmp_path / "runs")).analysis
    assert found.decision is not None
    assert found.decision.threshold is not None
    assert found.temperature is not None
    assert found.temperature.applied
    explained = sdk.explain(trained.bundle, ["A tax claim is in dispute."])[0]
    assert [word.word for word in explained.words] == ["A", "tax", "claim", "is", "in", "dispute", "."]
    answer = asked(trained).post("/v1/classify", json={"input": "A tax claim is in dispute."}).json()["data"][0]
    assert answer["label"] == explained.prediction.label
    assert answer["probs"] == pytest.approx(explained.prediction.probabilities, abs=1e-5)
