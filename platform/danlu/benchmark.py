"""Benchmarks: a suite from its official files (train what is not trained, score it on dev, write what is handed in), and the tasks of
lm-evaluation-harness on what is served. Part of the SDK.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.artifact.bundle import Bundle
from danlu.artifact.store import Store
from danlu.errors import DataError, ModelError, SpecError
from danlu.handover import LATEST, absolute, open_bundle
from danlu.spec.data import Columns
from danlu.spec.files import dump, parse
from danlu.spec.task import METRICS, Classification, EncoderTask, ExtractiveQA, MultipleChoice, Regression, is_decoders
from danlu.spec.train import TrainJob

if TYPE_CHECKING:
    from danlu.evaluate.harness import Harnessed
    from danlu.evaluate.suite import SuiteTask


@dataclass(frozen=True)
class SuiteScore:
    """One task's line in the table; `scores` are empty, and `note` says why, where it could not be scored."""

    task: str
    shape: str
    bundle: str
    rows: int
    scores: dict[str, float]
    note: str = ""


def run_suite(
    name: str,
    job: TrainJob,
    folder: str | Path,
    out: str | Path,
    *,
    tasks: Sequence[str] = (),
    train: Callable[[TrainJob], Any],
    on_task: Callable[[str], None] = lambda _: None,
) -> list[SuiteScore]:
    """Every task whose folder is there. `job` says model, tuning and the rest; its name goes before each task's."""
    from danlu.evaluate.suite import suite

    known, root = suite(name), Path(folder)
    if unknown := [one for one in tasks if one not in known]:
        raise DataError(f"{name} has no task {unknown[0]!r}", where="--tasks", fix=", ".join(known))
    if not root.is_dir():
        raise DataError(f"{root} is no folder", where="--data", fix=f"the folder that holds {', '.join(list(known)[:3])} ...")
    there = [task for task in known.values() if (not tasks or task.name in tasks) and task.folder(root) is not None]
    if not there:
        raise DataError(f"{root} has none of {name}'s folders", where="--data", fix=f"folders named {', '.join(known)}")
    found = []
    for task in there:
        on_task(task.name)
        found.append(_one(task, name, job, root, Path(out), train))
    (Path(out) / "scores.json").write_text(json.dumps([asdict(one) for one in found], ensure_ascii=False, indent=1), encoding="utf-8")
    handed = [Path(out) / known[one.task].submission for one in found if (Path(out) / known[one.task].submission).exists()]
    if handed:
        with zipfile.ZipFile(Path(out) / f"submit_{name}.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for path in handed:
                file.write(path, path.name)
    return found


def run_harness(
    job: TrainJob,
    tasks: Sequence[str],
    *,
    reference: str | Bundle | None = None,
    url: str | None = None,
    api_key: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> Harnessed:
    """Scores of lm-evaluation-harness' tasks (names, or YAML files of tasks) of a job's bundle: at the endpoint `url`, which serves it, or
    at one on this machine that lasts as long as that takes."""
    from danlu.evaluate.harness import ensure_installed, harness

    if not is_decoders(job.task):
        raise SpecError(
            f"lm-evaluation-harness asks a causal language model, and {job.task.kind} is none", where="--lm-eval", fix="without it"
        )
    ensure_installed()
    bundle = open_bundle(reference or f"{job.name}@{LATEST}", job.storage)

    def ask(at: str, key: str | None) -> Harnessed:
        folder = bundle.path / "model"
        return harness(at, folder, tasks, model=bundle.meta.name, api_key=key, num_fewshot=num_fewshot, limit=limit)

    if url is not None:
        return ask(url, api_key)
    from danlu.serve import app

    service = job.service(str(bundle.path))
    endpoint = app.run(service.model_copy(update={"storage": absolute(job.storage), "http": service.http.model_copy(update={"port": 0})}))
    try:
        return ask(endpoint.url, None)
    finally:
        app.stop()


def suite_text(found: Sequence[SuiteScore]) -> str:
    """The table for the terminal."""
    width = max(len(one.task) for one in found)
    lines = []
    for one in found:
        scores = "   ".join(f"{name} {value:.4f}" for name, value in one.scores.items()) or one.note
        lines.append(f"  {one.task:<{width}} {one.rows:>7} dev rows   {scores}")
    means = [sum(one.scores.values()) / len(one.scores) for one in found if one.scores]
    return "\n".join([*lines, f"  {'mean':<{width}} {'':>7}            {sum(means) / len(means):.4f}"] if means else lines)


def _one(task: SuiteTask, name: str, job: TrainJob, root: Path, out: Path, train: Callable[[TrainJob], Any]) -> SuiteScore:
    rows = {split: some for split in task.files if (some := task.rows(root, split)) is not None}
    paths = {split: _written(out / "rows" / task.name / f"{split}.jsonl", some) for split, some in rows.items()}
    dev = len(rows.get("dev", ()))
    if "train" not in rows or "dev" not in rows:
        return SuiteScore(task.name, task.shape, "", dev, {}, "its train or dev file is missing")
    asked, columns = _asked(task, rows["train"])
    data = {"train": paths["train"], "dev": paths["dev"], "test": None, "format": "jsonl", "split": None, "streaming": False}
    metric = job.evaluation.metric_for_best_model
    own = job.model_copy(
        update={
            "name": f"{job.name}-{task.name}"[:48].rstrip("-"),
            "task": asked,
            "data": job.data.model_copy(update=data | {"columns": columns}),
            "evaluation": job.evaluation.model_copy(update={"metric_for_best_model": metric if metric in METRICS[asked.kind] else None}),
        }
    )
    # What fits one task need not fit the next: a tuning that puts a prompt before a text, for one.
    own = parse(TrainJob, dump(own), source=f"the job for {task.name}")
    return _scored(task, own, rows, out, train)


def _asked(task: SuiteTask, train: list[dict[str, Any]]) -> tuple[EncoderTask, Columns]:
    """What a task of this shape is to a job, and the columns of its rows."""
    match task.shape:
        case "classification":
            labels = list(task.labels) if task.labels else sorted({row["label"] for row in train})
            pair = "text_pair" if "text_pair" in train[0] else None
            return Classification(labels=labels), Columns(text="text", text_pair=pair, label="label")
        case "regression":
            return Regression(), Columns(text="text", text_pair="text_pair", label="label")
        case "multiple_choice":
            return MultipleChoice(), Columns(question="question", context="context", options="choices", label="answer")
        case "extractive_qa":
            return ExtractiveQA(), Columns(question="question", context="context", answers="answers")


def _scored(
    task: SuiteTask, own: TrainJob, rows: dict[str, list[dict[str, Any]]], out: Path, train: Callable[[TrainJob], Any]
) -> SuiteScore:
    from danlu.compress.load import load_predictor

    reference = f"{own.name}@{LATEST}"
    try:
        Store(absolute(own.storage)).resolve(reference)
    except ModelError:
        train(own)
    predictor = load_predictor(open_bundle(reference, own.storage))

    def answers(some: list[dict[str, Any]]) -> list[Any]:
        return [task.answer(found) for found in predictor.predict([task.example(row) for row in some])]

    scores: dict[str, float] = {}
    for split in (split for split in rows if split.startswith("dev")):
        suffix = split.removeprefix("dev")
        scores |= {f"{name}{suffix}": value for name, value in task.scores(rows[split], answers(rows[split])).items()}
    for split in (split for split in rows if split.startswith("test")):
        handed = task.submission if split == "test" else task.submission.replace("-m.", "-mm.")
        text = task.handed_in([row["id"] for row in rows[split]], answers(rows[split]))
        (out / handed).write_text(text, encoding="utf-8")
    return SuiteScore(task.name, task.shape, reference, len(rows["dev"]), scores)


def _written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    # An option by its letter: whether a number counts from 0 or from 1 would have to be guessed.
    told = [row | {"answer": chr(ord("A") + row["answer"])} if isinstance(row.get("answer"), int) else row for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told), encoding="utf-8")
    return str(path)
