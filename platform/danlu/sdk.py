"""What a notebook uses, and what the CLI is made of: prepare, train, evaluate, quantize, serve, predict."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu import logs, traces
from danlu.artifact.bundle import Bundle, write_bundle
from danlu.artifact.run_logs import RunLog
from danlu.artifact.runs import SPEC, RunFolder, latest_run, open_run
from danlu.artifact.store import Store, ensure_writable
from danlu.benchmark import run_harness, run_suite, suite_text
from danlu.errors import DanluError, DataError, ModelError
from danlu.examine import Examined, compare, examine, explain, scores_json, write_files
from danlu.handover import (
    LATEST,
    PRODUCTION,
    Prepared,
    Quantized,
    Trained,
    absolute,
    make_bundle,
    make_probes,
    now,
    open_bundle,
    split_for,
    training_digest,
    within_budget,
)
from danlu.machine import check_drive, check_machine, is_connected
from danlu.report import plots, report
from danlu.rows import clean, data_report
from danlu.served import Exchange, check_served, exchanges
from danlu.spec.files import dump
from danlu.spec.serve import Service
from danlu.spec.task import MaskedLm, Pretrain
from danlu.spec.train import TrainJob

if TYPE_CHECKING:
    from danlu.evaluate.score import Evaluation
    from danlu.serve.app import Endpoint
    from danlu.spec.compress import Quantization
    from danlu.tasks.exchange import Example, Prediction
    from danlu.tasks.judge import Completion
    from danlu.tasks.rows import Split
    from danlu.tasks.streamed import Spread
    from danlu.train.run import Record


def prepare(job: TrainJob, *, calibrate: bool = True) -> Prepared:
    """Find and check everything a job needs, and plan it. Raises a DanluError for what would fail later."""
    from danlu import track

    ensure_writable(job.storage)
    track.chosen(job)
    check_machine(job)
    # Importing these takes seconds: what is wrong above is said before.
    from danlu.compress.start import with_its_start
    from danlu.plan import make_plan
    from danlu.tasks.config import check_trainable
    from danlu.tasks.from_scratch import start_folder
    from danlu.tasks.task import read_splits
    from danlu.tasks.tokenizer import load_tokenizer
    from danlu.tasks.vocabulary import check_vocabulary

    with traces.span("plan", {"danlu.train_job": job.name}):
        job = with_its_start(job)
        folder = start_folder(job.model, job.data, job.task, seed=job.seed)
        check_trainable(folder, job.tuning)
        tokenizer = load_tokenizer(folder)
        splits = read_splits(job, tokenizer, max_length=job.model.max_length, spread=_spread())
        draws = isinstance(job.task, Pretrain) and isinstance(job.task.objective, MaskedLm)
        check_vocabulary(splits, tokenizer, folder, draws=draws)
        lengths = splits.train.encoded.lengths
        plan = make_plan(
            job, folder, num_rows=len(lengths), mean_tokens=float(lengths.mean()), num_labels=len(splits.label_names), calibrate=calibrate
        )
    check_drive(job, plan.nvme_bytes)
    return Prepared(job, folder, splits, plan)


def _spread() -> Spread | None:
    """What shares out work over the Ray this process is connected to, if it is."""
    if not is_connected():
        return None
    from danlu.train.driver import over_the_cluster

    return over_the_cluster


def train(
    job: TrainJob, *, fresh: bool = False, listener: Callable[[Record], None] | None = None, prepared: Prepared | None = None
) -> Trained:
    """Train, score and store a bundle. An unfinished run of the same spec is gone on with, unless `fresh`."""
    prepared = prepared or prepare(job)
    run = open_run(absolute(job.storage), job.name, training_digest(prepared.job), fresh=fresh)
    with run.held():
        return _trained(prepared, run, listener)


def _trained(prepared: Prepared, run: RunFolder, listener: Callable[[Record], None] | None) -> Trained:
    from danlu.track import tracked
    from danlu.train.run import record_to_dict

    # The job starts from what a bundle's alias meant when it was prepared.
    job, digest, kept = prepared.job, training_digest(prepared.job), RunLog(run.uri, "driver")

    def listen(record: Record) -> None:
        values = record_to_dict(record)
        run.record(values)
        track.record(values)
        if values.get("event") == "checkpoint":
            kept.keep()
        if listener is not None:
            listener(record)

    run.write(SPEC, dump(job))
    run.set_status("running", spec_digest=digest, host=socket.gethostname(), pid=os.getpid())
    ids = {"train_job": job.name, "run": f"{run.number:04d}"}
    try:
        with logs.naming(**ids), traces.span("train", {f"danlu.{name}": value for name, value in ids.items()}), tracked(job, run) as track:
            outcome = _fit(_portable(job), run.uri, prepared, listen)
            trained = _scored(prepared, run, outcome, digest)
            scores = {split: evaluation.scores.metrics() for split, evaluation in trained.evaluations.items()}
            meta = trained.bundle.meta
            made: dict[str, Any] = {"bundle": trained.reference, "digest": meta.digest, "scores": scores}
            made |= {"lineage": meta.lineage.model_dump(mode="json", exclude={"spec"})}
            track.made(made, lambda: plots(prepared, trained))
    except BaseException as error:
        reason = str(error) if isinstance(error, DanluError) else repr(error)
        run.set_status("failed", spec_digest=digest, reason=reason or type(error).__name__)
        raise
    finally:
        kept.keep()
    run.set_status("finished", spec_digest=digest, bundle=trained.reference, scores=scores, outcome=outcome)
    return trained


def evaluate(reference: str | Bundle, *, storage: str = "runs", data: Sequence[str] | str | None = None) -> tuple[Evaluation, Split]:
    """Score a bundle on files, or on the test rows of the job it came from (its dev rows if there are none)."""
    from danlu.compress.load import load_judge
    from danlu.evaluate.score import evaluate as score

    bundle = open_bundle(reference, storage)
    judge = load_judge(bundle)
    split, _ = split_for(bundle, judge, data)
    return score(judge, split), split


def quantize(
    job: TrainJob, reference: str | Bundle | None = None, *, run: RunFolder | None = None, before: Evaluation | None = None
) -> Quantized:
    """The quantized version of a bundle that `job.compress` asks for, kept and promoted only within its budget.

    `before` is the original's evaluation on the test (else dev) split, where it has just been made.
    """
    from danlu.compress.load import load_judge
    from danlu.compress.quantize import module_bytes, weight_bytes
    from danlu.compress.quantize import quantize as write_quantized
    from danlu.evaluate.score import compare
    from danlu.spec.compress import Compress
    from danlu.spec.task import is_decoders

    budget = job.compress or Compress()
    original = open_bundle(reference or f"{job.name}@{LATEST}", job.storage)
    judge = load_judge(original)
    split, split_name = split_for(original, judge, None)
    with tempfile.TemporaryDirectory(prefix="danlu-quantize-") as temporary:
        folder = Path(temporary)
        write_quantized(original, budget.quantization, folder / "model")
        draft = write_bundle(
            folder,
            original.meta.model_copy(
                update={
                    "quantization": budget.quantization,
                    "weights": "full",
                    "tuning": None,
                    "probes": [],
                    "version": None,
                }
            ),
        )
        race = None
        if is_decoders(original.meta.task):
            from danlu.serve.engines.torch.race import decode_race

            race = decode_race(original, draft)
        smaller = load_judge(draft)
        delta = compare(
            judge,
            smaller,
            split,
            name=budget.quantization.kind,
            split_name=split_name,
            # An adapter's file is not what serving it takes.
            bytes_original=weight_bytes(original.path / "model") if original.meta.weights == "full" else module_bytes(judge.model),
            bytes_compressed=weight_bytes(folder / "model"),
            before=before,
            race=race,
        )
        kept, verdict = within_budget(job, delta)
        store = Store(absolute(job.storage))
        if not kept:
            verdict += _give_way(store, original, budget.quantization)
        result = Quantized(delta, kept, verdict, None, None)
        if kept:
            meta = draft.meta.model_copy(
                update={
                    "probes": make_probes(smaller, split),
                    "scores": {split_name: delta.compressed},
                    "lineage": original.meta.lineage.model_copy(update={"parent": original.meta.digest, "created": now()}),
                }
            )
            write_bundle(folder, meta)
            kept_as = store.put(folder, job.name)
            store.set_alias(job.name, PRODUCTION, kept_as.version)
            stored = f"{job.name}@v{kept_as.version}"
            result = Quantized(delta, kept, verdict, stored, open_bundle(stored, job.storage))
    if run := run or latest_run(absolute(job.storage), job.name):
        run.record(
            {"kind": "quantized", "step": 10**9, "delta": delta.to_dict(), "kept": kept, "verdict": verdict, "bundle": result.reference}
        )
    return result


def _give_way(store: Store, original: Bundle, quantization: Quantization) -> str:
    """Where a version is not kept: the same one, kept before by another budget or measurement, is `production` no more. Says what is."""
    name, version = original.meta.name, original.meta.version
    served = store.aliases(name).get(PRODUCTION)
    if served is None or version is None or served == version:
        return "; the original is served"
    meta = open_bundle(f"{name}@v{served}", store.uri).meta
    if meta.quantization != quantization or meta.lineage.parent != original.meta.digest:
        return f"; {name}@v{served} stays @{PRODUCTION}"
    store.set_alias(name, PRODUCTION, version)
    return f"; {name}@v{served}, which was kept before, gives way to the original, now @{PRODUCTION}"


@contextmanager
def serving(service: Service) -> Iterator[Endpoint]:
    """An endpoint on this machine, up while the block runs."""
    from danlu.serve.adapters import check_adapters
    from danlu.serve.keys import read_keys
    from danlu.serve.models import check_models

    service = service.model_copy(update={"storage": absolute(service.storage)})
    if service.auth is not None:  # before Ray starts, as what follows
        read_keys(Path(service.auth.keys_file))
    check_models(service)
    check_adapters(service)
    from danlu.serve import app

    endpoint = app.run(service)
    try:
        yield endpoint
    finally:
        app.stop()


def predict(
    reference: str | Bundle,
    inputs: Sequence[str | Mapping[str, Any] | Example],
    pairs: Sequence[str] | None = None,
    *,
    storage: str = "runs",
) -> Sequence[Prediction | Completion]:
    """Answers in this process. Inputs are texts (with their `pairs`), or of an encoder's task also the JSON an endpoint takes (such as
    {"question": ..., "context": ...}) or the task's examples. A language model answers texts with texts."""
    from danlu.compress.load import load_judge
    from danlu.tasks.exchange import BadExample, read_examples, read_texts
    from danlu.tasks.judge import LanguageJudge

    if not inputs:
        raise DataError("there is nothing to answer", where="texts", fix="give at least one text with words")
    judge = load_judge(open_bundle(reference, storage))
    try:
        if isinstance(judge, LanguageJudge):
            return judge.answers(read_texts(inputs, pairs))
        return judge.predict(read_examples(inputs, pairs, judge.task))
    except BadExample as error:
        raise DataError(error.problem, where="texts", fix=error.fix) from error


def _fit(job: TrainJob, run_uri: str, prepared: Prepared, listener: Callable[[Record], None]) -> dict[str, Any]:
    """One worker trains in this process; several on Ray Train, on the Ray this process is connected to or one of its own."""
    if job.workers.num_workers == 1:
        from danlu.tasks.device import pick_device
        from danlu.train.run import LocalRun
        from danlu.train.worker import work

        with _metered(job, run_uri, listener) as heard:
            return asdict(work(job, LocalRun(pick_device(job.workers.gpus_per_worker), heard), run_uri, prepared.splits))
    from danlu.local_ray import start_ray
    from danlu.train import driver

    start_ray()
    return driver.fit(job, run_uri, listener)


@contextmanager
def _metered(job: TrainJob, run_uri: str, listener: Callable[[Record], None]) -> Iterator[Callable[[Record], None]]:
    """The listener, and the job's metrics where this process is connected to a Ray that shows them."""
    if not is_connected():
        yield listener
        return
    from danlu.metrics import emit
    from danlu.train.budget import budget_of
    from danlu.train.run import record_to_dict

    with emit.training(job.name, budget_of(job, run_uri)) as meter:

        def heard(record: Record) -> None:
            meter(record_to_dict(record))
            listener(record)

        yield heard


def _scored(prepared: Prepared, run: RunFolder, outcome: dict[str, Any], digest: str) -> Trained:
    """The bundle, scored where its model fits: in this process, or on a worker if only those have GPUs."""
    import torch

    job = _portable(prepared.job)
    if job.workers.num_workers == 1 or not job.workers.gpus_per_worker or torch.cuda.is_available():
        return make_bundle(prepared, run, outcome, digest)
    from danlu.train import driver

    trained: Trained = driver.on_a_worker(job, make_bundle, replace(prepared, job=job), run, outcome, digest)
    # Its bundle was opened on another machine.
    return replace(trained, bundle=open_bundle(trained.reference, job.storage))


def _portable(job: TrainJob) -> TrainJob:
    """The job with local paths made absolute: a worker has another working directory."""
    data = job.data.model_copy(
        update={
            "cache_dir": str(Path(job.data.cache_dir).resolve()),
            **{name: _absolute_paths(getattr(job.data, name)) for name in ("train", "dev", "test") if getattr(job.data, name) is not None},
        }
    )
    path = Path(job.model.model_name_or_path).expanduser()
    model = job.model.model_copy(update={"model_name_or_path": str(path.resolve())}) if path.exists() else job.model
    return job.model_copy(update={"data": data, "model": model, "storage": absolute(job.storage)})


def _absolute_paths(source: str | list[str]) -> str | list[str]:
    if isinstance(source, list):
        return [str(_absolute_paths(item)) for item in source]
    is_glob = any(mark in source for mark in "*?[") and "://" not in source
    return str(Path(source).expanduser().resolve()) if is_glob or ("://" not in source and Path(source).expanduser().exists()) else source


__all__ = [
    "LATEST",
    "PRODUCTION",
    "Examined",
    "Exchange",
    "ModelError",
    "Prepared",
    "Quantized",
    "Trained",
    "absolute",
    "check_machine",
    "check_served",
    "clean",
    "compare",
    "data_report",
    "evaluate",
    "examine",
    "exchanges",
    "explain",
    "open_bundle",
    "predict",
    "prepare",
    "quantize",
    "report",
    "run_harness",
    "run_suite",
    "scores_json",
    "serving",
    "suite_text",
    "train",
    "write_files",
]
