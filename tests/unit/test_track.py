"""Trackers: what their own readers find is what the records say, and one that breaks is left out."""

from __future__ import annotations

import json
import logging
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import split_of
from sklearn.metrics import confusion_matrix

from danlu import track
from danlu.artifact.runs import RunFolder
from danlu.errors import SpecError
from danlu.evaluate.plots import Plot, plots
from danlu.evaluate.score import Evaluation
from danlu.spec.files import load
from danlu.spec.task import Classification
from danlu.spec.train import TrainJob
from danlu.tasks import classification

RECORDS: list[dict[str, Any]] = [
    {"kind": "step", "step": n, "loss": 1 / n, "learning_rate": 1e-3, "grad_norm": 2.0, "epoch": n / 4, "tokens_per_second": 9.0,
     "step_seconds": 0.5, "eta_s": 1.0}
    for n in (1, 2, 3)
] + [
    {"kind": "eval", "step": 3, "metrics": {"accuracy": 0.75, "loss": 0.5}},
    {"kind": "event", "step": 3, "event": "checkpoint"},
]  # fmt: skip
RESULT = {
    "bundle": "seen@v1",
    "digest": "sha256:1",
    "scores": {"test": {"accuracy": 0.7}},
    "lineage": {"data_digests": {"train": "sha256:2"}},
}
EXPECTED = {("train/loss", 1): 1.0, ("train/loss", 3): 1 / 3, ("train/grad_norm", 2): 2.0, ("dev/accuracy", 3): 0.75}


LABELS, LOGITS = [0, 0, 1, 1, 1], np.array([[2, 0], [0, 1], [0, 3], [0, 1], [1, 0]], np.float32)


def drawn() -> list[Plot]:
    """Plots of the records, and of five answers."""
    split, task = split_of(LABELS), Classification()
    evaluation = Evaluation(classification.scores(LOGITS, split, ["wheat", "ship"], task), LOGITS, 1.0)
    return plots("seen 0001", RECORDS, task, {"test": (split, evaluation)})


PAGES = {f"{plot.name}.html": plot.html for plot in drawn()}


def job(folder: Path, **fields: Any) -> TrainJob:
    return TrainJob.model_validate(
        {"name": "seen", "model": {"model_name_or_path": "m"}, "data": {"train": "t.csv"}, "storage": str(folder)} | fields
    )


def run_of(folder: Path, *names: str) -> RunFolder:
    run = RunFolder(f"{folder}/runs/seen/0001", 1)
    with track.tracked(job(folder, trackers=list(names)), run) as tracking:
        for record in RECORDS:
            tracking.record(record)
        tracking.made(RESULT, drawn)
    return run


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What stands in TensorBoard's event files, read by their format: length, checksum, protobuf, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 16 + length
    return found


def test_tensorboard_shows_the_records_numbers(tmp_path: Path) -> None:
    run_of(tmp_path, "tensorboard")
    shown = scalars(tmp_path / "runs/seen/0001/tensorboard")
    assert {key: shown[key] for key in EXPECTED} == pytest.approx(EXPECTED)
    assert len(shown) == 3 * 6 + 2 + 4
    (file,) = (tmp_path / "runs/seen/0001/tensorboard").glob("events.out.tfevents.*")
    raw = file.read_bytes()
    assert b"model_name_or_path: m" in raw
    assert b'"bundle": "seen@v1"' in raw
    for name, counts in zip(("wheat", "ship"), confusion_matrix(LABELS, LOGITS.argmax(1)), strict=True):
        assert f"| {name} | {counts[0]} | {counts[1]} |".encode() in raw
    assert b"plots/calibration-test" in raw


def test_mlflow_shows_the_same_numbers_under_the_same_names(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="an extra: pip install danlu[mlflow]")
    run_of(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/seen/0001/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("seen").experiment_id])
    shown = {(name, point.step): point.value for name in found.data.metrics for point in client.get_metric_history(found.info.run_id, name)}
    assert {key: shown[key] for key in EXPECTED} == pytest.approx(EXPECTED)
    assert found.info.status == "FINISHED"
    assert found.data.params["model.model_name_or_path"] == "m"
    assert (found.data.params["optim.optimizer.kind"], found.data.params["seed"]) == ("adamw", "17")
    assert (found.data.tags["bundle"], found.data.tags["scores.test.accuracy"]) == ("seen@v1", "0.7")
    kept = tmp_path / "runs/seen/0001/mlflow" / found.info.run_id / "artifacts"
    assert json.loads((kept / "result.json").read_text()) == RESULT
    assert load(TrainJob, kept / "spec.yaml").name == "seen"
    assert {path.name: path.read_text() for path in (kept / "plots").iterdir()} == PAGES


def test_wandb_writes_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="an extra: pip install danlu[wandb]")
    run_of(tmp_path, "wandb")
    children = [" ".join(child.cmdline()) for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not [command for command in children if "wandb" in command], "else it is ended with the command, and says so with a traceback"
    pages = (tmp_path / "runs/seen/0001/wandb").glob("offline-run-*/files/media/html/plots/*.html")
    assert {path.name.partition("_")[0] + ".html": path.read_text() for path in pages} == PAGES
    (file,) = (tmp_path / "runs/seen/0001/wandb").glob("offline-run-*/run-*.wandb")
    expected = {b"train/loss", b"seen@v1", b"scores.test.accuracy", b"spec.yaml"}
    deadline = time.monotonic() + 30
    while missing := {text for text in expected if text not in file.read_bytes()}:
        assert time.monotonic() < deadline, missing  # W&B's own process writes it
        time.sleep(0.05)


def test_a_tracker_that_breaks_is_left_out_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(f"{tmp_path}/runs/seen/0001", 1)
    (tmp_path / "runs/seen/0001").mkdir(parents=True)
    (tmp_path / "runs/seen/0001/tensorboard").write_text("a file where TensorBoard wants a folder")
    with caplog.at_level(logging.WARNING), track.tracked(job(tmp_path, trackers=["tensorboard"]), run) as tracking:
        tracking.record(RECORDS[0])
    assert "tensorboard is left out" in caplog.text


def test_plots_are_the_curves_the_counts_and_the_reliability_and_one_that_cannot_be_drawn_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> list[Plot]:
        raise ZeroDivisionError

    assert list(PAGES) == ["curves.html", "confusion-test.html", "calibration-test.html"]
    assert [page.count("<svg") for page in PAGES.values()] == [5, 0, 1]
    run = RunFolder(f"{tmp_path}/runs/seen/0001", 1)
    with caplog.at_level(logging.WARNING), track.tracked(job(tmp_path, trackers=["tensorboard"]), run) as tracking:
        tracking.made(RESULT, broken)
    assert "tensorboard is left out from here on: ZeroDivisionError" in caplog.text


def test_a_tracker_that_cannot_be_had_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(track.MODULES, "wandb", "no_such_module_here")
    with pytest.raises(SpecError, match=r"trackers\[1\]: wandb is not installed"):
        track.chosen(job(tmp_path, trackers=["tensorboard", "wandb"]))
    with pytest.raises(SpecError, match="trackers: trackers write beside"):
        track.chosen(job(tmp_path, trackers=["tensorboard"], storage="memory://bucket"))
    assert track.chosen(job(tmp_path, storage="memory://bucket")) == []
    assert track.chosen(job(tmp_path)) == ["tensorboard"]
    assert track.chosen(job(tmp_path, trackers=[])) == []
