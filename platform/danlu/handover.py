"""The hand-overs: trained weights become a scored bundle; a bundle finds its rows again; a budget decides what is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.artifact.bundle import Bundle, BundleMeta, Lineage, Probe, canonical_json, read_bundle, text_digest, write_bundle
from danlu.artifact.runs import RunFolder, latest_run
from danlu.artifact.store import Store
from danlu.artifact.uris import filesystem_of
from danlu.errors import ModelError, StorageError
from danlu.spec.task import LOWER_IS_BETTER, Classification, EncoderTask, Pretrain, is_decoders
from danlu.spec.train import TrainJob
from danlu.spec.tuning import Freeze, Full

if TYPE_CHECKING:
    from danlu.evaluate.score import Delta, Evaluation
    from danlu.plan import Plan
    from danlu.tasks.exchange import Example
    from danlu.tasks.judge import LanguageJudge
    from danlu.tasks.predictor import Predictor
    from danlu.tasks.rows import Split, Splits

LATEST, PRODUCTION = "latest", "production"
"""Aliases of a job's bundles: what was trained last, and what is to be served."""

NUM_PROBES = 8


@dataclass(frozen=True)
class Prepared:
    """A job whose model and rows were found and checked: nothing has started yet."""

    job: TrainJob
    folder: Path
    splits: Splits
    plan: Plan


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder, its bundle and how that scored."""

    run: RunFolder
    bundle: Bundle
    reference: str
    evaluations: dict[str, Evaluation]
    outcome: dict[str, Any]


@dataclass(frozen=True)
class Quantized:
    """A quantized version beside its original; `reference` is None if it was not kept, and `verdict` says why."""

    delta: Delta
    kept: bool
    verdict: str
    reference: str | None
    bundle: Bundle | None


def open_bundle(reference: str | Bundle, storage: str = "runs") -> Bundle:
    """A bundle by `name@alias`, `name@v1`, folder or URI."""
    return reference if isinstance(reference, Bundle) else read_bundle(Store(absolute(storage)).resolve(reference))


def absolute(uri: str) -> str:
    """A storage URI that means the same in any working directory."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def make_bundle(prepared: Prepared, run: RunFolder, outcome: dict[str, Any], spec_digest: str) -> Trained:
    """Score the best weights on dev and test, and store them with everything that says where they came from."""
    import shutil

    from danlu.compress.load import load_judge
    from danlu.evaluate.fit_on_dev import fit_on_dev
    from danlu.evaluate.score import evaluate as score
    from danlu.tasks.predictor import Predictor

    job, splits = prepared.job, prepared.splits
    whole = isinstance(job.tuning, Full | Freeze)
    with tempfile.TemporaryDirectory(prefix="danlu-bundle-") as temporary:
        folder = Path(temporary)
        _fetch(f"{run.uri}/best/step-{outcome['best_step']:06d}", folder / "model")
        for leftover in (*folder.glob("model/rank-*.json"), folder / "model" / "manifest.json"):
            leftover.unlink()
        meta = BundleMeta(
            name=job.name,
            task=job.task,
            labels=splits.label_names,
            max_length=job.model.max_length,
            precision="bf16" if outcome["bf16"] else "fp32",
            weights="full" if whole else "adapter",
            base_model=None if whole else _anywhere(job.model.model_name_or_path),
            tuning=None if whole else job.tuning,
            lineage=make_lineage(job, splits, run, spec_digest),
        )
        _write_generation_defaults(prepared, folder / "model")
        draft = write_bundle(folder, meta)
        judge = load_judge(draft)
        evaluations = {"dev": score(judge, splits.dev)}
        if isinstance(judge, Predictor) and isinstance(judge.task, Classification):
            evaluations["dev"] = fit_on_dev(judge, splits.dev, evaluations["dev"])
            draft = replace(draft, meta=draft.meta.model_copy(update={"task": judge.task}))
        if splits.test is not None:
            evaluations["test"] = score(judge, splits.test)
        scores = {name: dict(evaluation.scores.metrics()) for name, evaluation in evaluations.items()}
        probes = make_probes(judge, splits.test or splits.dev)
        write_bundle(folder, draft.meta.model_copy(update={"scores": scores, "probes": probes}))
        store = Store(absolute(job.storage))
        stored = store.put(folder, job.name)
        shutil.rmtree(folder / "model", ignore_errors=True)
    store.set_alias(job.name, LATEST, stored.version)
    store.set_alias(job.name, PRODUCTION, stored.version)
    reference = f"{job.name}@v{stored.version}"
    return Trained(run, open_bundle(reference, job.storage), reference, evaluations, outcome)


def trained_before(prepared: Prepared) -> Trained | None:
    """What the latest run has left, if that was this job's on these rows and the walk behind it was not walked to its end."""
    from danlu.compress.load import load_judge
    from danlu.evaluate.score import evaluate as score

    job, splits = prepared.job, prepared.splits
    run = latest_run(absolute(job.storage), job.name)
    status = {} if run is None else run.status()
    if run is None or status["state"] != "finished" or status.get("spec_digest") != training_digest(job) or status.get("walked"):
        return None
    try:
        bundle = open_bundle(status["bundle"], job.storage)
    except ModelError:  # deleted since
        return None
    if bundle.meta.lineage.data_digests != data_digests(splits):
        return None
    judge = load_judge(bundle)
    rows = {"dev": splits.dev} | ({} if splits.test is None else {"test": splits.test})
    evaluations = {name: score(judge, split) for name, split in rows.items()}
    return Trained(run, bundle, status["bundle"], evaluations, status["outcome"])


def walked(trained: Trained) -> None:
    """Keep that nothing is left to do behind a training: the next walk begins with another."""
    status = trained.run.status()
    trained.run.set_status(status.pop("state"), **{name: value for name, value in status.items() if name != "time"} | {"walked": True})


def training_digest(job: TrainJob) -> str:
    """Of what a training depends on."""
    left_out = {"compress", "serve", "max_failures", "trackers", "budget_usd", "cluster"}
    return text_digest(canonical_json(job.model_dump(mode="json", exclude=left_out)))


def _write_generation_defaults(prepared: Prepared, folder: Path) -> None:
    """What an engine needs beside weights and tokenizer: where an answer ends."""
    from danlu.tasks import chat
    from danlu.tasks.judge import write_generation_defaults
    from danlu.tasks.tokenizer import load_tokenizer

    task = prepared.job.task
    if is_decoders(task):
        tokenizer = load_tokenizer(folder)
        ends = [] if isinstance(task, Pretrain) else chat.end_of_turn_ids(prepared.splits.train.encoded, tokenizer)
        write_generation_defaults(folder, prepared.folder, tokenizer, ends)


def _fetch(uri: str, target: Path) -> None:
    filesystem, path = filesystem_of(uri)
    try:
        filesystem.get(f"{path}/", f"{target}/", recursive=True)
    except OSError as error:
        raise StorageError(
            f"the best weights could not be copied to {target}: {error}",
            where=uri,
            fix="free some space there, or set TMPDIR; the same command goes on without training again",
        ) from error


def _anywhere(model: str) -> str:
    """A model's name that means the same in any working directory."""
    return str(Path(model).expanduser().resolve()) if "://" not in model and Path(model).expanduser().exists() else model


def make_lineage(job: TrainJob, splits: Splits, run: RunFolder, spec_digest: str) -> Lineage:
    from importlib.metadata import version

    from danlu import __version__
    from danlu.compress.start import started_from

    libraries = ("torch", "transformers", "peft", "deepspeed", "ray")
    return Lineage(
        spec=job.model_dump(mode="json"),
        spec_digest=spec_digest,
        data_digests=data_digests(splits),
        code_version=f"danlu {__version__}",
        library_versions={name: version(name) for name in libraries},
        seed=job.seed,
        created=now(),
        parent=started_from(_anywhere(job.model.model_name_or_path)),
        run=run.uri,
        cleaning=None if (cleaned := splits.report.cleaned) is None else {name: dict(steps) for name, steps in cleaned.removed.items()},
    )


def data_digests(splits: Splits) -> dict[str, str]:
    """Split -> digest of its rows."""
    return {
        name: split.digest or text_digest(canonical_json([split.texts.texts, split.texts.pairs, split.texts.labels]))
        for name, split in (("train", splits.train), ("dev", splits.dev), ("test", splits.test))
        if split is not None
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def make_probes(judge: Predictor | LanguageJudge, split: Split) -> list[Probe]:
    """A few rows with the answers that whoever serves this bundle must give."""
    import numpy as np

    from danlu.tasks.exchange import shown, to_fields
    from danlu.tasks.judge import LanguageJudge

    rows = [int(row) for row in np.linspace(0, len(split.texts.texts) - 1, min(NUM_PROBES, len(split.texts.texts)))]
    if isinstance(judge, LanguageJudge):
        return judge.probes(split, rows)
    examples = [split.examples[i] for i in rows]
    return [
        Probe(
            text=shown(example),
            input=to_fields(example),
            label=answer.label,
            probabilities=answer.probabilities,
            margin=answer.margin,
        )
        for example, answer in zip(examples, judge.predict(examples), strict=True)
    ]


def split_for(bundle: Bundle, judge: Predictor | LanguageJudge, data: Sequence[str] | str | None) -> tuple[Split, str]:
    """Rows to score a bundle on: the files given, or the test (else dev) rows of its own job."""
    from danlu.tasks.task import read_given, read_splits

    job = TrainJob.model_validate(bundle.meta.lineage.spec)
    tokenizer, max_length = judge.tokenizer, bundle.meta.max_length
    if data is None:
        splits = read_splits(job, tokenizer, max_length=max_length)
        return (splits.test, "test") if splits.test is not None else (splits.dev, "dev")
    return read_given(data, job, tokenizer, bundle.meta.labels, max_length=max_length), "given"


def within_budget(job: TrainJob, delta: Delta) -> tuple[bool, str]:
    from danlu.spec.compress import Compress

    budget = job.compress or Compress()
    metric = job.metric_for_best_model
    rise = delta.compressed[metric] - delta.original[metric]
    loss = rise if metric in LOWER_IS_BETTER else -rise
    may = "rise" if metric in LOWER_IS_BETTER else "fall"
    quality = f"{metric} {'rises' if rise > 0 else 'falls'} by {abs(rise):.4f} (may {may} by {budget.max_quality_drop})"
    told = f"{quality}, {delta.speedup:.2f}x the speed (at least {budget.min_speedup})"
    if loss > budget.max_quality_drop or delta.speedup < budget.min_speedup:
        return False, f"not kept: {told}"
    return True, f"kept: {told}"


def surest_errors(prepared: Prepared, trained: Trained, number: int = 12) -> list[tuple[Example, str, str, float]]:
    """Wrong answers of the test (else dev) rows: what was asked, the truth, the answer, its probability; the surest first."""
    from danlu.tasks.task import encoder_file

    name = "test" if prepared.splits.test is not None else "dev"
    split = prepared.splits.test or prepared.splits.dev
    task = trained.bundle.meta.task
    if not split.references or not isinstance(task, EncoderTask):
        return []
    outputs = trained.evaluations[name].outputs
    answers = encoder_file(task).predictions(outputs, split.encoded, split.examples, prepared.splits.label_names, task)
    wrong = [
        (example, references[0] if references else "", found.label, found.probability)
        for example, references, found in zip(split.examples, split.references, answers, strict=True)
        if found.label not in (references or ("",))
    ]
    return sorted(wrong, key=lambda row: -row[3])[:number]
