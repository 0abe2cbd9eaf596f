"""The walk in one process: what was trained is what is scored, compressed and asked, and a failure on the way loses nothing."""

from __future__ import annotations

import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import make_rows, write_tiny_model
from peft import PeftModel
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from danlu import on_local, sdk
from danlu.artifact.bundle import read_bundle
from danlu.artifact.merged import MERGED, let_go
from danlu.artifact.runs import latest_run
from danlu.artifact.store import Store
from danlu.compress.load import load_predictor
from danlu.compress.quantize import quantize as write_quantized
from danlu.errors import DataError, ModelError, ResourceError, StorageError
from danlu.evaluate.score import Delta
from danlu.handover import trained_before, walked, within_budget
from danlu.spec.compress import Compress, Int8
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob
from danlu.train.run import EvalRecord, EventRecord, Record, StepRecord


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than such small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MakeJob = Callable[..., TrainJob]


@pytest.fixture(scope="module")
def make_job(tiny_model: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> MakeJob:
    """A job of 12 steps with a storage of its own unless given; one worker, so no Ray."""

    def make(**overrides: Any) -> TrainJob:
        folder = tmp_path_factory.mktemp("job")
        fields: dict[str, Any] = {
            "name": "topics",
            "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
            "data": {**topic_files, "cache_dir": str(folder / "cache")},
            "workers": {"num_workers": 1, "cpus_per_worker": 1},
            "optim": {"learning_rate": 3e-3, "schedule": {"kind": "constant"}},
            "precision": "fp32",
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "max_steps": 12,
            "storage": str(folder / "runs"),
        }
        return TrainJob.model_validate(fields | overrides)

    return make


@pytest.fixture(scope="module")
def prepared(make_job: MakeJob) -> sdk.Prepared:
    job = make_job(max_steps=60, evaluation={"eval_steps": 20}, compress={"max_quality_drop": 0.2, "min_speedup": 0.01})
    return sdk.prepare(job, calibrate=False)


@pytest.fixture(scope="module")
def trained(prepared: sdk.Prepared) -> sdk.Trained:
    return sdk.train(prepared.job, prepared=prepared)


@pytest.fixture(scope="module")
def quantized(prepared: sdk.Prepared, trained: sdk.Trained) -> sdk.Quantized:
    return sdk.quantize(prepared.job)


def plain_probabilities(folder: Path, texts: list[str], model: torch.nn.Module | None = None) -> np.ndarray:
    """What plain transformers says of texts, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = (model or AutoModelForSequenceClassification.from_pretrained(folder)).eval()
    with torch.no_grad():
        rows = [model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).softmax(-1).numpy()


def probabilities(found: list[Any]) -> np.ndarray:
    return np.array([prediction.probabilities for prediction in found])


def test_what_was_trained_scores_as_plain_transformers_scores_it(
    prepared: sdk.Prepared, trained: sdk.Trained, topic_files: dict[str, str]
) -> None:
    frame = pandas.read_csv(topic_files["test"])
    found = plain_probabilities(trained.bundle.path / "model", list(frame["text"]))
    answers = [trained.bundle.meta.labels[i] for i in found.argmax(1)]
    scores = trained.evaluations["test"].scores
    assert scores.accuracy == accuracy_score(frame["label"], answers) > 0.9
    assert scores.macro_f1 == pytest.approx(f1_score(frame["label"], answers, average="macro"))
    assert prepared.plan.num_steps == 60
    assert trained.bundle.meta.scores["test"] == scores.metrics()


def test_the_run_tells_what_happened(prepared: sdk.Prepared, trained: sdk.Trained) -> None:
    status = trained.run.status()
    assert (status["state"], status["bundle"]) == ("finished", "topics@v1")
    assert status["scores"]["test"] == trained.evaluations["test"].scores.metrics()
    records = trained.run.records()
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 61))
    assert [record["step"] for record in records if record["kind"] == "eval"] == [20, 40, 60]
    best = max((record for record in records if record["kind"] == "eval"), key=lambda record: record["metrics"]["accuracy"])
    assert best["metrics"]["accuracy"] == trained.evaluations["dev"].scores.accuracy


def test_the_stored_bundle_scores_the_same_again(prepared: sdk.Prepared, trained: sdk.Trained, topic_files: dict[str, str]) -> None:
    for reference in ("topics@latest", "topics@v1", "topics", str(trained.bundle.path), trained.bundle):
        again, split = sdk.evaluate(reference, storage=prepared.job.storage)
        assert again.scores == trained.evaluations["test"].scores
        assert len(split.labels) == 60
    given, _ = sdk.evaluate("topics@latest", storage=prepared.job.storage, data=topic_files["test"])
    assert given.scores == trained.evaluations["test"].scores


def test_the_bundle_says_where_it_came_from(prepared: sdk.Prepared, trained: sdk.Trained, topic_files: dict[str, str]) -> None:
    lineage = read_bundle(trained.bundle.path, verify=True).meta.lineage
    assert TrainJob.model_validate(lineage.spec) == prepared.job
    assert lineage.run == trained.run.uri
    assert set(lineage.data_digests) == {"train", "dev", "test"}
    assert lineage.library_versions["torch"] == torch.__version__
    assert trained.bundle.meta.labels == sorted(set(pandas.read_csv(topic_files["train"])["label"]))


def test_probes_are_what_the_bundle_answers(prepared: sdk.Prepared, trained: sdk.Trained, quantized: sdk.Quantized) -> None:
    assert quantized.bundle is not None
    for bundle in (trained.bundle, quantized.bundle):
        probes = bundle.meta.probes
        assert len(probes) == 8
        found = sdk.predict(bundle, [probe.text for probe in probes])
        assert [prediction.label for prediction in found] == [probe.label for probe in probes]
        np.testing.assert_allclose(probabilities(found), [probe.probabilities for probe in probes], atol=1e-6)
    by_name = sdk.predict("topics@production", ["wheat corn harvest"], storage=prepared.job.storage)
    assert by_name == sdk.predict(quantized.bundle, ["wheat corn harvest"])


def test_a_quantized_version_within_its_budget_is_promoted(prepared: sdk.Prepared, trained: sdk.Trained, quantized: sdk.Quantized) -> None:
    assert quantized.kept
    assert quantized.reference == "topics@v2"
    assert quantized.bundle is not None
    store = Store(prepared.job.storage)
    assert store.aliases("topics") == {"latest": 1, "production": 2}
    assert quantized.bundle.meta.lineage.parent == trained.bundle.meta.digest
    assert quantized.delta.original == trained.evaluations["test"].scores.metrics()
    again, _ = sdk.evaluate("topics@production", storage=prepared.job.storage)
    assert again.scores.metrics() == quantized.delta.compressed == quantized.bundle.meta.scores["test"]
    assert quantized.delta.bytes < quantized.delta.bytes_original
    assert trained.run.records()[-1]["kind"] == "quantized"


def test_an_int8_bundle_is_packed_and_a_text_gets_the_same_answer_in_any_company(quantized: sdk.Quantized) -> None:
    assert quantized.bundle is not None
    predictor = load_predictor(quantized.bundle)
    assert predictor.model.packed
    texts = [row["text"] for row in make_rows(20, 5)]
    together = probabilities(predictor.predict(texts))
    alone = probabilities([predictor.predict([text])[0] for text in texts])
    assert together == pytest.approx(alone, abs=2e-3)
    assert np.ptp(together, axis=0).max() > 0.1, "answers that are all alike would show nothing"


def test_what_is_quantized_is_not_quantized_again(prepared: sdk.Prepared, quantized: sdk.Quantized) -> None:
    with pytest.raises(ModelError, match="is quantized already"):
        sdk.quantize(prepared.job, quantized.bundle)


def test_a_disk_that_is_full_under_a_smaller_version_is_told_with_its_folder(trained: sdk.Trained, tmp_path: Path) -> None:
    """Whatever writes it: safetensors has no OSError for that, and tokenizers no exception of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError, match=f"could not be written to {tmp_path}") as raised:
            write_quantized(trained.bundle, Int8(), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "TMPDIR" in raised.value.fix


def test_outside_its_budget_the_original_stays_in_production(make_job: MakeJob) -> None:
    job = make_job(compress={"max_quality_drop": 0.0, "min_speedup": 1e6})
    sdk.train(job)
    result = sdk.quantize(job)
    assert (result.kept, result.reference, result.bundle) == (False, None, None)
    assert "not kept" in result.verdict
    assert "at least 1000000.0" in result.verdict
    store = Store(job.storage)
    assert (store.versions("topics"), store.aliases("topics")) == ([1], {"latest": 1, "production": 1})
    assert result.verdict.endswith("the original is served")


def test_a_version_that_was_kept_gives_way_where_it_is_kept_no_more(make_job: MakeJob) -> None:
    """And one of another kind, which nobody has measured again, stays: what is said to be served is."""
    loose, tight = ({"max_quality_drop": 1.0, "min_speedup": speedup} for speedup in (1e-9, 1e6))
    job = make_job(compress=loose)
    sdk.train(job)
    store = Store(job.storage)
    assert sdk.quantize(job).reference == "topics@v2"
    other = job.model_copy(update={"compress": Compress.model_validate({**tight, "quantization": {"kind": "bnb_int8"}})})
    assert sdk.quantize(other).verdict.endswith("; topics@v2 stays @production")
    assert store.aliases("topics")["production"] == 2
    verdict = sdk.quantize(job.model_copy(update={"compress": Compress.model_validate(tight)})).verdict
    assert "topics@v2, which was kept before, gives way to the original" in verdict
    assert store.aliases("topics")["production"] == 1


@pytest.mark.parametrize(
    ("metric", "after", "speedup", "kept"),
    [
        ("accuracy", 0.895, 2.0, True), ("accuracy", 0.89, 2.0, False), ("accuracy", 0.95, 2.0, True), ("accuracy", 0.9, 0.9, False),
        ("loss", 0.905, 1.0, True), ("loss", 0.92, 2.0, False), ("loss", 0.5, 2.0, True),
    ],
)  # fmt: skip
def test_the_budget_is_of_the_jobs_own_metric(make_job: MakeJob, metric: str, after: float, speedup: float, kept: bool) -> None:
    job = make_job(evaluation={"metric_for_best_model": metric}, compress={"max_quality_drop": 0.0051, "min_speedup": 1.0})
    before = dict.fromkeys(("accuracy", "macro_f1", "loss"), 0.9)
    delta = Delta("int8", before, before | {metric: after}, 1.0, 0.0, 1.0, 1.0, speedup, speedup, speedup, 1, 1, 1, 1, "test")
    is_kept, told = within_budget(job, delta)
    assert is_kept == kept
    way, may = "rises" if after > 0.9 else "falls", "rise" if metric == "loss" else "fall"
    assert f"kept: {metric} {way} by {abs(after - 0.9):.4f} (may {may} by 0.0051), {speedup:.2f}x the speed" in told


class Killed(Exception):
    pass


def dies_at(step: int) -> Callable[[Record], None]:
    def listener(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == step:
            raise Killed("the power went")

    return listener


def losses(run: Any) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in run.records() if record["kind"] == "step"}


def test_a_walk_that_was_stopped_behind_its_training_goes_on_with_what_was_trained(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(max_steps=4)
    data = job.data.model_copy(update={"train": str(shutil.copy(str(job.data.train), tmp_path / "train.csv"))})
    job = job.model_copy(update={"data": data})

    def before(job: TrainJob) -> sdk.Trained | None:
        return trained_before(sdk.prepare(job, calibrate=False))

    assert before(job) is None, "no run yet"
    trained = sdk.train(job, prepared=sdk.prepare(job, calibrate=False))
    found = before(job.model_copy(update={"max_failures": 3}))
    assert found is not None
    assert (found.reference, found.run.uri, found.outcome) == (trained.reference, trained.run.uri, trained.outcome)
    assert {name: one.scores.metrics() for name, one in found.evaluations.items()} == {
        name: one.scores.metrics() for name, one in trained.evaluations.items()
    }
    assert before(job.model_copy(update={"seed": 5})) is None, "another job"
    rows = Path(str(job.data.train))
    text = rows.read_text()
    rows.write_text(text + text.splitlines()[-1] + "\n")
    assert before(job) is None, "other rows"
    rows.write_text(text)
    walked(found)
    assert found.run.status()["bundle"] == trained.reference
    assert before(job) is None, "all was done"


def test_after_a_failure_the_same_command_goes_on(make_job: MakeJob) -> None:
    whole = sdk.train(make_job())
    job = make_job(checkpoint={"save_steps": 4})
    with pytest.raises(Killed):
        sdk.train(job, listener=dies_at(7))
    broken = latest_run(job.storage, "topics")
    assert broken is not None
    assert (broken.status()["state"], broken.status()["reason"]) == ("failed", "Killed('the power went')")
    assert Store(job.storage).versions("topics") == []
    heard: list[Record] = []
    trained = sdk.train(job, listener=heard.append)
    assert trained.run.uri == broken.uri
    assert next(record.event for record in heard if isinstance(record, EventRecord)) == "resumed"
    assert min(record.step for record in heard if isinstance(record, StepRecord)) == 5
    assert losses(trained.run) == pytest.approx(losses(whole.run), abs=1e-6)
    assert trained.evaluations["test"].scores == whole.evaluations["test"].scores
    assert trained.run.status()["state"] == "finished"


def test_a_finished_job_or_a_fresh_one_is_a_new_run(make_job: MakeJob) -> None:
    job = make_job(max_steps=2)
    with pytest.raises(Killed):
        sdk.train(job, listener=dies_at(2))
    fresh = sdk.train(job, fresh=True)
    assert (fresh.run.number, fresh.reference) == (2, "topics@v1")
    again = sdk.train(job)
    assert (again.run.number, again.reference) == (3, "topics@v2")
    assert losses(again.run) == pytest.approx(losses(fresh.run))


def test_an_adapter_is_served_as_its_merged_model_from_any_folder(
    make_job: MakeJob, tiny_model: Path, topic_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    job = make_job(
        model={"model_name_or_path": f"./{tiny_model.name}", "max_length": 32},
        tuning={"kind": "lora", "r": 8, "lora_alpha": 16.0},
        optim={"learning_rate": 1e-2, "schedule": {"kind": "constant"}},
        max_steps=40,
        compress={"max_quality_drop": 1.0, "min_speedup": 0.01},
    )
    trained = sdk.train(job)
    assert trained.bundle.meta.weights == "adapter"
    assert (trained.bundle.path / "model" / "adapter_model.safetensors").exists()
    assert not (trained.bundle.path / "model" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    texts = list(pandas.read_csv(topic_files["test"])["text"])
    found = sdk.predict("topics@latest", texts, storage=job.storage)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    unmerged = PeftModel.from_pretrained(base, trained.bundle.path / "model")
    np.testing.assert_allclose(probabilities(found), plain_probabilities(tiny_model, texts, unmerged), atol=1e-5)
    assert trained.evaluations["test"].scores.accuracy > 0.6
    again, _ = sdk.evaluate("topics@latest", storage=job.storage)
    assert again.scores == trained.evaluations["test"].scores
    quantized = sdk.quantize(job)
    assert quantized.bundle is not None
    assert quantized.bundle.meta.weights == "full"
    whole = 4 * AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).num_parameters()
    assert quantized.delta.bytes_original == whole
    assert quantized.delta.bytes < whole


def test_trainings_from_an_adapter_share_its_merged_weights_which_stay_as_long_as_an_adapter_stands_on_them(make_job: MakeJob) -> None:
    lora = {"tuning": {"kind": "lora", "r": 2}, "max_steps": 2}
    first = sdk.train(job := make_job(**lora))
    start = {"model": {"model_name_or_path": first.reference, "max_length": 32}, "storage": job.storage, "max_steps": 2}
    whole, adapter = sdk.train(make_job(name="whole", **start)), sdk.train(make_job(name="adapter", **{**start, **lora}))
    (merged,) = (Path(job.storage) / MERGED).iterdir()
    for trained in (whole, adapter):
        assert trained.bundle.meta.lineage.parent == first.bundle.meta.digest
    assert adapter.bundle.meta.base_model == str(merged)
    for name in ("whole", "adapter"):
        on_local.delete(job.storage, name)
        assert let_go(job.storage, rest_s=0) == []
    assert sdk.predict(adapter.reference, ["wheat corn harvest"], storage=job.storage)
    shutil.rmtree(adapter.bundle.path.parent)
    assert let_go(job.storage, rest_s=0) == [merged.name]
    assert sdk.predict(whole.reference, ["wheat corn harvest"], storage=job.storage), "weights of its own need no others"


@pytest.fixture(scope="module")
def wide(make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, sdk.Trained]:
    """A model of 64 wide layers: bitsandbytes quantizes blocks of 64 weights."""
    folder = write_tiny_model(tmp_path_factory.mktemp("wide-bert"), hidden_size=64)
    job = make_job(model={"model_name_or_path": str(folder), "max_length": 32}, max_steps=30)
    return job, sdk.train(job)


@pytest.mark.parametrize(("kind", "bound"), [("bnb_int8", 0.05), ("bnb_nf4", 0.25)])
def test_bitsandbytes_bundles_answer_near_the_original(
    wide: tuple[TrainJob, sdk.Trained], tmp_path: Path, topic_files: dict[str, str], kind: str, bound: float
) -> None:
    pytest.importorskip("bitsandbytes")
    job, trained = wide
    compress = {"quantization": {"kind": kind}, "max_quality_drop": 1.0, "min_speedup": 1e-6}
    job = TrainJob.model_validate(job.model_dump() | {"compress": compress, "storage": str(tmp_path / "runs")})
    result = sdk.quantize(job, trained.bundle)
    assert result.bundle is not None
    texts = list(pandas.read_csv(topic_files["test"])["text"])
    before, after = (probabilities(sdk.predict(bundle, texts)) for bundle in (trained.bundle, result.bundle))
    change = np.abs(before - after).max()
    assert 0 < change < bound
    assert result.delta.largest_probability_change == pytest.approx(change, abs=1e-4)
    assert sdk.predict("topics@production", texts[:3], storage=job.storage)[0].probabilities == pytest.approx(list(after[0]), abs=1e-4)
    assert result.delta.bytes < result.delta.bytes_original


@contextmanager
def files_no_larger_than(number: int) -> Iterator[None]:
    """A write beyond it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_storage_that_cannot_be_written_is_found_before_anything_starts(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage in (str(tmp_path / "file"), str(tmp_path / "file" / "runs")):
        with pytest.raises(StorageError, match="cannot write to") as raised:
            sdk.prepare(make_job(storage=storage))
        assert raised.value.where == "storage"


def test_a_disk_that_fills_up_while_training_loses_nothing(make_job: MakeJob) -> None:
    job = make_job(checkpoint={"save_steps": 4}, evaluation={"eval_steps": 12})
    with files_no_larger_than(60_000), pytest.raises(StorageError, match="could not be saved") as raised:
        sdk.train(job)
    assert "free some space" in raised.value.fix
    run = latest_run(job.storage, "topics")
    assert run is not None
    assert run.status()["state"] == "failed"
    trained = sdk.train(job)
    assert (trained.run.number, trained.run.status()["state"]) == (1, "finished")


def test_a_disk_that_fills_up_after_training_costs_no_training(make_job: MakeJob) -> None:
    job = make_job()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_up(record: Record) -> None:
        if isinstance(record, EventRecord) and record.event == "checkpoint" and record.step == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))

    try:
        with pytest.raises(StorageError) as raised:
            sdk.train(job, listener=fills_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.fix
    heard: list[Record] = []
    trained = sdk.train(job, listener=heard.append)
    assert not [record for record in heard if isinstance(record, StepRecord | EvalRecord)]
    assert (trained.run.number, trained.reference) == (1, "topics@v1")


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_storage_uri_does_as_well_as_a_folder(
    kind: str, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = str(request.getfixturevalue("s3_uri")) if kind == "s3" else f"memory://{tmp_path.name}"
    job = make_job(storage=storage, max_steps=4, checkpoint={"save_steps": 2})
    with pytest.raises(Killed):
        sdk.train(job, listener=dies_at(3))
    heard: list[Record] = []
    trained = sdk.train(job, listener=heard.append)
    assert min(record.step for record in heard if isinstance(record, StepRecord)) == 3
    assert trained.run.status()["state"] == "finished"
    again, _ = sdk.evaluate("topics@production", storage=job.storage)
    assert again.scores == trained.evaluations["test"].scores
    assert len(losses(trained.run)) == 4


def test_the_report_is_written_beside_the_run(prepared: sdk.Prepared, trained: sdk.Trained, quantized: sdk.Quantized) -> None:
    uri = sdk.report(prepared, trained, quantized, served="8 probes")
    html = Path(uri).read_text()
    assert Path(uri).parent == Path(trained.run.uri)
    assert f"{trained.evaluations['test'].scores.accuracy:.4f}" in html
    assert trained.bundle.meta.digest in html
    assert quantized.verdict in html


def test_wrong_questions_are_refused(prepared: sdk.Prepared, trained: sdk.Trained, tmp_path: Path) -> None:
    for texts, told in (([], "there is nothing to answer"), (["wheat", "  "], r"`inputs\[1\]` is empty")):
        with pytest.raises(DataError, match=told):
            sdk.predict(trained.bundle, texts)
    with pytest.raises(ModelError, match="has no bundle named 'topic'; it has: topics"):
        sdk.predict("topic@latest", ["wheat"], storage=prepared.job.storage)
    pandas.DataFrame({"text": ["a", "b"], "label": ["grain", "gold"]}).to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match="row 2 has the label 'gold'"):
        sdk.evaluate(trained.bundle, data=str(tmp_path / "rows.csv"))


def test_workers_that_do_not_fit_the_machine_are_refused(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr("danlu.plan.num_cores", lambda: 3)
    sdk.check_machine(make_job(workers={"num_workers": 2, "cpus_per_worker": 1}))
    with pytest.raises(ResourceError, match="2 workers with 2 cores each need 4 cores; this machine has 3") as raised:
        sdk.check_machine(make_job(workers={"num_workers": 2, "cpus_per_worker": 2}))
    assert raised.value.fix.startswith("--set workers.num_workers=1")


def test_the_job_that_workers_get_means_the_same_in_any_folder(
    make_job: MakeJob, topic_files: dict[str, str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(topic_files["train"]).parent
    monkeypatch.chdir(folder)
    job = make_job(data={"train": ["train.csv", "*.csv"], "test": "s3://bucket/test.csv", "cache_dir": "cache"}, storage="runs")
    portable = sdk._portable(job)
    assert portable.data.train == [str(folder / "train.csv"), str(folder / "*.csv")]
    assert (portable.data.test, portable.data.cache_dir) == ("s3://bucket/test.csv", str(folder / "cache"))
    assert portable.storage == str(folder / "runs")
    assert portable.model.model_name_or_path == str(tiny_model)


def test_a_service_without_its_keys_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.serve.app.run", lambda *_, **__: pytest.fail("it was started"))
    service = Service.model_validate(
        {"kind": "service", "name": "parrot", "engine": {"kind": "echo_text"}, "auth": {"keys_file": str(tmp_path / "keys.json")}}
    )
    with pytest.raises(StorageError, match="keys create NAME --file"), sdk.serving(service):
        pass
