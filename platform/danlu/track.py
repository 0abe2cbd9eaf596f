"""Experiment trackers beside a run: the same numbers under the same names in TensorBoard, Weights & Biases and MLflow.

A tracker that breaks is dropped with a warning; the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from danlu.artifact.runs import RunFolder
from danlu.errors import SpecError
from danlu.spec.train import TrainJob

log = logging.getLogger(__name__)

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Somewhere that draws curves."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers by the names that every tracker shows; none for events."""
    match record["kind"]:
        case "step":
            names = ("loss", "learning_rate", "grad_norm", "epoch", "tokens_per_second", "step_seconds")
            return {f"train/{name}": float(record[name]) for name in names}
        case "eval":
            return {f"dev/{name}": float(value) for name, value in record["metrics"].items()}
    return {}


def chosen(job: TrainJob) -> list[str]:
    """The job's trackers. Unset: TensorBoard where it is installed and the storage is a local folder. SpecError for what cannot be had."""
    local = isinstance(url_to_fs(job.storage)[0], LocalFileSystem)
    if job.trackers is None:
        return ["tensorboard"] if local and _installed("tensorboard") else []
    for number, name in enumerate(job.trackers):
        if not _installed(name):
            raise SpecError(
                f"{name} is not installed", where=f"trackers[{number}]", fix=f"pip install {MODULES[name]}, or leave it out of trackers"
            )
    if job.trackers and not local:
        raise SpecError(
            f"trackers write beside the run's records, which storage={job.storage} keeps on no disk of this machine",
            where="trackers",
            fix="trackers: [], or a local storage",
        )
    return list(job.trackers)


@contextlib.contextmanager
def tracked(job: TrainJob, run: RunFolder) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what takes each record of the run."""
    trackers: dict[str, Tracker] = {}

    def safely(name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001  # whatever it is: a curve is not worth a run
            trackers.pop(name, None)
            log.warning("%s is left out from here on: %s: %s", name, type(error).__name__, error)

    for name in chosen(job):
        safely(name, lambda name=name: trackers.update({name: _open(name, job, run)}))  # type: ignore[misc]

    def take(record: Mapping[str, Any]) -> None:
        if found := numbers(record):
            for name, tracker in list(trackers.items()):
                safely(name, lambda tracker=tracker: tracker.log(record["step"], found))  # type: ignore[misc]

    try:
        yield take
    finally:
        for name, tracker in list(trackers.items()):
            safely(name, tracker.close)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES[name]) is not None


def _open(name: str, job: TrainJob, run: RunFolder) -> Tracker:
    folder = Path(url_to_fs(run.uri)[1])
    match name:
        case "tensorboard":
            return _TensorBoard(folder)
        case "wandb":
            return _Wandb(job, run, folder)
        case "mlflow":
            return _MLflow(job, run, folder)
    raise AssertionError(name)


class _TensorBoard:
    """`tensorboard --logdir runs` shows all runs."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """Offline, unless WANDB_MODE says otherwise; `wandb sync` sends it later."""

    def __init__(self, job: TrainJob, run: RunFolder, folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project="danlu",
            name=f"{job.name}-{run.number}",
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=job.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        # W&B drops a step that went back, as a resumed run does: the step is a number of its own besides.
        self.run.log({**numbers, "step": step})

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """Into a database beside the run, unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, job: TrainJob, run: RunFolder, folder: Path) -> None:
        from mlflow import MlflowClient

        folder.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}"))
        found = self.client.get_experiment_by_name(job.name)
        experiment = self.client.create_experiment(job.name) if found is None else found.experiment_id
        self.id = self.client.create_run(experiment, run_name=f"{job.name}-{run.number}").info.run_id
        self.client.log_param(self.id, "model", job.model.model_name_or_path)
        self.client.log_param(self.id, "tuning", job.tuning.kind)
        self.client.log_param(self.id, "learning_rate", job.optim.learning_rate)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.client.log_metric(self.id, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.id)
