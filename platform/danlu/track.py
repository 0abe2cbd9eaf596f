"""Experiment trackers beside a run: the same numbers under the same names in TensorBoard, Weights & Biases and MLflow.

A tracker that breaks is dropped with a warning; the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fsspec.implementations.local import LocalFileSystem

from danlu.artifact.runs import RunFolder
from danlu.artifact.uris import filesystem_of
from danlu.errors import SpecError
from danlu.spec.files import dump
from danlu.spec.train import TrainJob

if TYPE_CHECKING:
    from danlu.evaluate.plots import Plot

log = logging.getLogger(__name__)

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Somewhere that draws curves."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step."""
        ...

    def made(self, result: Mapping[str, Any], plots: Sequence[Plot]) -> None:
        """What came of it (see `Tracking.made`), the spec beside it, and what the run's report draws."""
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
    local = isinstance(filesystem_of(job.storage)[0], LocalFileSystem)
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


class Tracking:
    """The trackers of a run, of which one that breaks is left out."""

    def __init__(self, job: TrainJob, run: RunFolder) -> None:
        self.trackers: dict[str, Tracker] = {}
        for name in chosen(job):
            self._safely(name, lambda name=name: self.trackers.update({name: _open(name, job, run)}))  # type: ignore[misc]

    def record(self, record: Mapping[str, Any]) -> None:
        """Draw the numbers of a record of the run."""
        if found := numbers(record):
            self._each(lambda tracker: tracker.log(record["step"], found))

    def made(self, result: Mapping[str, Any], plots: Callable[[], Sequence[Plot]] = list) -> None:
        """Keep what came of it: the bundle, its scores and its lineage, as JSON has them; and plots, drawn if anybody keeps them."""
        drawn = cache(plots)
        self._each(lambda tracker: tracker.made(result, drawn()))

    def close(self) -> None:
        """Write what is left."""
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            self._safely(name, lambda tracker=tracker: do(tracker))  # type: ignore[misc]

    def _safely(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001  # whatever it is: a curve is not worth a run
            broken = self.trackers.pop(name, None)
            if broken is not None:
                with contextlib.suppress(Exception):  # what it had taken so far need not be lost
                    broken.close()
            log.warning("%s is left out from here on: %s: %s", name, type(error).__name__, error)


@contextlib.contextmanager
def tracked(job: TrainJob, run: RunFolder) -> Iterator[Tracking]:
    """The run's trackers, open while the block runs."""
    tracking = Tracking(job, run)
    try:
        yield tracking
    finally:
        tracking.close()


def _installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES[name]) is not None


def _open(name: str, job: TrainJob, run: RunFolder) -> Tracker:
    folder = Path(filesystem_of(run.uri)[1])
    match name:
        case "tensorboard":
            return _TensorBoard(job, folder)
        case "wandb":
            return _Wandb(job, run, folder)
        case "mlflow":
            return _MLflow(job, run, folder)
    raise AssertionError(name)


class _TensorBoard:
    """`tensorboard --logdir runs` shows all runs."""

    def __init__(self, job: TrainJob, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("spec", _indented(dump(job)))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def made(self, result: Mapping[str, Any], plots: Sequence[Plot]) -> None:
        self.writer.add_text("result", _indented(json.dumps(result, ensure_ascii=False, indent=1)))
        for plot in plots:
            if plot.table:  # it draws the curves itself, and shows Markdown, but no HTML
                self.writer.add_text(f"plots/{plot.name}", plot.table)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """Offline, unless WANDB_MODE says otherwise; `wandb sync` sends it later."""

    def __init__(self, job: TrainJob, run: RunFolder, folder: Path) -> None:
        import wandb

        self.job = job
        folder.mkdir(parents=True, exist_ok=True)
        self.teardown = wandb.teardown
        self.run = wandb.init(
            project="danlu",
            name=f"{job.name}-{run.number}",
            dir=str(folder),
            mode=None if "WANDB_MODE" in os.environ else "offline",
            config=job.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        # W&B drops a step that went back, as a resumed run does: the step is a number of its own besides.
        self.run.log({**numbers, "step": step})

    def made(self, result: Mapping[str, Any], plots: Sequence[Plot]) -> None:
        import wandb

        self.run.summary.update(_flat(result))
        artifact = wandb.Artifact(f"{self.job.name}-{self.run.id}", type="result", metadata=dict(result))
        for name, text in _files(self.job, result).items():
            with artifact.new_file(name) as file:
                file.write(text)
        self.run.log_artifact(artifact)
        if plots:
            # Its own CSS would be put before ours.
            self.run.log({f"plots/{plot.name}": wandb.Html(plot.html, inject=False) for plot in plots})

    def close(self) -> None:
        self.run.finish()
        self.teardown()  # its own process, which would else be ended with the command's, and say so with a traceback


class _MLflow:
    """Into a database beside the run, unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, job: TrainJob, run: RunFolder, folder: Path) -> None:
        from mlflow import MlflowClient

        self.job = job
        folder.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}"))
        found = self.client.get_experiment_by_name(job.name)
        if found is None:
            # A server has a place of its own for files; else MLflow would put them where the process happens to stand.
            place = None if "MLFLOW_TRACKING_URI" in os.environ else (folder / "mlflow").resolve().as_uri()
            experiment = self.client.create_experiment(job.name, artifact_location=place)
        else:
            experiment = found.experiment_id
        self.id = self.client.create_run(experiment, run_name=f"{job.name}-{run.number}").info.run_id
        for name, value in _flat(job.model_dump(mode="json", exclude_none=True)).items():
            self.client.log_param(self.id, name, value)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.client.log_metric(self.id, name, value, step=step)

    def made(self, result: Mapping[str, Any], plots: Sequence[Plot]) -> None:
        for name, value in _flat({**result, "lineage": {}}).items():
            self.client.set_tag(self.id, name, value)
        for name, text in _files(self.job, result).items():
            self.client.log_text(self.id, text, name)
        for plot in plots:
            self.client.log_text(self.id, plot.html, f"plots/{plot.name}.html")

    def close(self) -> None:
        self.client.set_terminated(self.id)


def _flat(fields: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found


def _files(job: TrainJob, result: Mapping[str, Any]) -> dict[str, str]:
    """What is kept with a run."""
    return {"spec.yaml": dump(job), "result.json": json.dumps(result, ensure_ascii=False, indent=1)}


def _indented(text: str) -> str:
    """As TensorBoard's Markdown shows a text with its line breaks."""
    return "".join(f"    {line}\n" for line in text.splitlines())
