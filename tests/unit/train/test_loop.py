"""The loop: it learns, stops, resumes exactly, and writes weights that anybody can load."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_model
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from danlu.compiled import KernelsUnavailable
from danlu.data.pack import Batches, pack_rows
from danlu.errors import DanluError, ModelError, SpecError
from danlu.spec.train import TrainJob
from danlu.tasks import classification, masked
from danlu.tasks import kernels as compiled
from danlu.tasks.rows import Splits
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train.loop import Outcome, train
from danlu.train.run import EvalRecord, EventRecord, LocalRun, StepRecord

CPU = torch.device("cpu")


class Setting:
    """A job's fields, and what a run of it gave."""

    def __init__(self, model: Path, files: dict[str, str], folder: Path) -> None:
        self.model, self.files, self.folder = model, files, folder

    def job(self, **overrides: Any) -> TrainJob:
        fields: dict[str, Any] = {
            "name": "loop",
            "model": {"model_name_or_path": str(self.model), "max_length": 32},
            "data": {"train": self.files["train"], "test": self.files["test"], "cache_dir": str(self.folder / "cache")},
            "optim": {"learning_rate": 3e-3, "schedule": {"kind": "constant"}},
            "precision": "fp32",
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "max_steps": 8,
        }
        return TrainJob.model_validate(fields | overrides)

    def data(self, job: TrainJob) -> Splits:
        tokenizer = load_tokenizer(self.model)
        return classification.splits(job.data, job.task, tokenizer, max_length=32, seed=job.seed)

    def run(self, job: TrainJob, name: str = "run", run: LocalRun | None = None) -> tuple[Outcome, LocalRun]:
        run = run or LocalRun(CPU)
        outcome = train(job, self.data(job), self.model, load_tokenizer(self.model), run, str(self.folder / name))
        return outcome, run


@pytest.fixture
def setting(tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> Setting:
    return Setting(tiny_model, topic_files, tmp_path)


def losses(run: LocalRun) -> dict[int, float]:
    return {record.step: record.loss for record in run.records if isinstance(record, StepRecord)}


class Killed(Exception):
    pass


def killed_at(step: int) -> LocalRun:
    """A run that dies when `step` is reported."""

    def listener(record: object) -> None:
        if isinstance(record, StepRecord) and record.step == step:
            raise Killed

    return LocalRun(CPU, listener)


@pytest.mark.parametrize(
    "parallel", [{"kind": "ddp"}, {"kind": "deepspeed", "zero_stage": 2}, {"kind": "deepspeed", "zero_stage": 3}, {"kind": "fsdp"}]
)
def test_a_killed_run_resumes_to_the_losses_of_the_uninterrupted_one(setting: Setting, parallel: dict[str, Any]) -> None:
    job = setting.job(
        parallel=parallel,
        checkpoint={"save_steps": 3},
        model={"model_name_or_path": str(setting.model), "max_length": 32, "hidden_dropout": 0.2},
    )
    _, whole = setting.run(job, "whole")
    with pytest.raises(Killed):
        setting.run(job, "broken", killed_at(5))
    outcome, rest = setting.run(job, "broken")
    assert next(record.event for record in rest.records if isinstance(record, EventRecord)) == "resumed"
    resumed = losses(rest)
    assert min(resumed) == 4
    assert resumed == pytest.approx({step: loss for step, loss in losses(whole).items() if step >= 4}, abs=1e-6)
    assert outcome.steps == 8


@pytest.fixture
def wide(topic_files: dict[str, str], tmp_path: Path) -> Setting:
    """A model whose layers the compiled kernels take."""
    return Setting(write_tiny_model(tmp_path / "wide", hidden_size=64), topic_files, tmp_path)


def test_compiled_kernels_train_what_pytorch_does(wide: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    curves = {}
    for kernels in ("auto", "off"):
        job = wide.job(precision="bf16", kernels=kernels, optim={"learning_rate": 1e-3, "schedule": {"kind": "constant"}}, max_steps=20)
        curves[kernels] = losses(wide.run(job, kernels)[1])
    assert curves["auto"] == pytest.approx(curves["off"], abs=2e-2), "what bf16 rounds"
    assert curves["off"][20] < curves["off"][1] - 0.3
    if not isinstance(compiled._kernels(), KernelsUnavailable):
        assert curves["auto"] != curves["off"]
    monkeypatch.setenv("CXX", "nosuch-g++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(wide.folder / "none"))
    compiled._kernels.cache_clear()
    try:
        assert losses(wide.run(job.model_copy(update={"kernels": "auto"}), "no compiler")[1]) == curves["off"]
    finally:
        compiled._kernels.cache_clear()
    assert caplog.text.count("there is no C++ compiler: nosuch-g++") == 1


def test_a_killed_run_draws_the_same_dropout_from_compiled_kernels_when_it_goes_on(wide: Setting) -> None:
    model = {"model_name_or_path": str(wide.model), "max_length": 32, "hidden_dropout": 0.2}
    job = wide.job(precision="bf16", model=model, checkpoint={"save_steps": 3})
    _, whole = wide.run(job, "whole")
    with pytest.raises(Killed):
        wide.run(job, "broken", killed_at(5))
    _, rest = wide.run(job, "broken")
    assert losses(rest) == {step: loss for step, loss in losses(whole).items() if step >= 4}


def test_a_finished_run_is_not_trained_further(setting: Setting) -> None:
    job = setting.job()
    first, _ = setting.run(job)
    again, run = setting.run(job)
    assert again == first
    assert not losses(run)


def test_it_learns_and_the_best_weights_load_in_plain_transformers_with_the_reported_scores(setting: Setting) -> None:
    job = setting.job(max_steps=60)
    outcome, run = setting.run(job)
    assert outcome.best_value > 0.9
    data = setting.data(job)
    model = AutoModelForSequenceClassification.from_pretrained(setting.folder / "run" / "best" / f"step-{outcome.best_step:06d}").eval()
    tokenizer = load_tokenizer(setting.model)
    with torch.no_grad():
        batch = tokenizer(data.dev.texts.texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        predicted = model(**batch).logits.argmax(-1).numpy()
    assert (predicted == data.dev.labels).mean() == pytest.approx(outcome.best_value)
    assert model.config.id2label == dict(enumerate(data.label_names))
    best = [record for record in run.records if isinstance(record, EvalRecord) and record.is_best][-1]
    assert best.step == outcome.best_step


def test_early_stopping_stops_after_patience_evaluations_without_a_best(setting: Setting) -> None:
    job = setting.job(
        max_steps=40,
        optim={"learning_rate": 1e-12},
        evaluation={"eval_steps": 2, "early_stopping_patience": 3, "metric_for_best_model": "accuracy"},
    )
    outcome, _ = setting.run(job)
    assert outcome.stopped_early
    assert outcome.steps == 8
    assert outcome.best_step == 2


@pytest.mark.parametrize(("save_steps", "told"), [(1, "the checkpoint of step 1 is from before"), (8, "no checkpoint is from before")])
def test_divergence_is_said_instead_of_trained_on(save_steps: int, told: str, setting: Setting) -> None:
    """The first step moves nothing and the second everything: of their checkpoints only the first one's helps."""
    optim = {"learning_rate": 1e30, "max_grad_norm": None, "schedule": {"kind": "linear", "warmup_ratio": 0.99}}
    job = setting.job(optim=optim, checkpoint={"save_steps": save_steps})
    with pytest.raises(DanluError, match=r"optim.learning_rate: the loss of step \d+ is (nan|inf|[0-9.e+]+)") as raised:
        setting.run(job)
    assert re.search(told, str(raised.value)), raised.value


def test_weights_that_are_no_numbers_are_told_apart_from_a_rate_too_high(setting: Setting, tmp_path: Path) -> None:
    broken = shutil.copytree(setting.model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    setting.model = broken
    with pytest.raises(ModelError, match=f"{name} in {broken} holds values that are no numbers"):
        setting.run(setting.job())


def test_a_step_of_rows_in_which_nothing_is_learned_learns_nothing_and_goes_on(setting: Setting, tmp_path: Path) -> None:
    """BERT's tokenizer makes nothing of the sign for what could not be read; a batch may have no other rows."""
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(setting.model)).save_pretrained(
        folder := shutil.copytree(setting.model, tmp_path / "m")
    )
    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(["\ufffd\ufffd", "wheat rose and corn fell", "the port"] * 8) + "\n")
    job = setting.job(
        data={"train": str(tmp_path / "texts.csv"), "dev": str(tmp_path / "texts.csv"), "cache_dir": str(tmp_path / "cache")},
        task={"kind": "pretrain", "objective": {"kind": "masked"}},
        model={"model_name_or_path": str(folder), "max_length": 16},
        global_batch_size=1,
        micro_batch_size=1,
    )
    tokenizer, run = load_tokenizer(folder), LocalRun(CPU)
    data = masked.splits(job.data, job.task, tokenizer, max_length=16, seed=job.seed)
    assert min(data.train.encoded.lengths) == 2, "nothing but the two special tokens"
    assert train(job, data, folder, tokenizer, run, str(tmp_path / "run")).steps == 8
    found = losses(run)
    assert 0.0 in found.values()
    assert 0 < sum(loss > 0 for loss in found.values()) < 8
    assert all(np.isfinite(list(found.values())))


def test_lora_gives_the_losses_of_peft_by_hand(setting: Setting) -> None:
    job = setting.job(tuning={"kind": "lora", "r": 4, "lora_alpha": 8.0}, micro_batch_size=16, max_steps=4)
    _, run = setting.run(job)
    data = setting.data(job)
    torch.manual_seed(job.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        setting.model, config=AutoConfig.from_pretrained(setting.model, num_labels=3)
    )
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8.0, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in trained], lr=3e-3, betas=(0.9, 0.999), eps=1e-8
    )
    rows = Batches(data.train.encoded, data.train.labels, global_batch_size=16, micro_batch_size=16, rank=0, world_size=1, seed=job.seed)
    expected = {}
    for step in range(4):
        indices = rows.rows_of(step)
        length = int(data.train.encoded.lengths[indices].max())
        ids, mask = np.zeros((16, length), dtype=np.int64), np.zeros((16, length), dtype=np.int64)
        for i, index in enumerate(indices):
            row = data.train.encoded.row(int(index))
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        loss = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), labels=torch.from_numpy(data.train.labels[indices])
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        warm = 1
        optimizer.param_groups[0]["lr"] = 0.0
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if step < warm else 3e-3
        optimizer.step()
        expected[step + 1] = float(loss.detach())
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert expected[4] != pytest.approx(expected[1], abs=1e-3)


def test_an_adapter_that_names_no_module_of_the_model_is_refused(setting: Setting) -> None:
    with pytest.raises(SpecError, match="no module named 'q_proj'") as raised:
        setting.run(setting.job(tuning={"kind": "lora", "target_modules": ["q_proj"]}))
    assert "query" in str(raised.value)


def test_frozen_embeddings_do_not_move(setting: Setting) -> None:
    job = setting.job(tuning={"kind": "full", "freeze_embeddings": True}, parallel={"kind": "deepspeed", "zero_stage": 2})
    outcome, _ = setting.run(job)
    load = AutoModelForSequenceClassification.from_pretrained
    before = load(setting.model, num_labels=3).bert
    after = load(setting.folder / "run" / "best" / f"step-{outcome.best_step:06d}").bert
    assert torch.equal(before.embeddings.word_embeddings.weight, after.embeddings.word_embeddings.weight)
    assert not torch.equal(before.encoder.layer[0].output.dense.weight, after.encoder.layer[0].output.dense.weight)


def test_bf16_stays_near_float32(setting: Setting) -> None:
    fp32, bf16 = (losses(setting.run(setting.job(precision=precision), precision)[1]) for precision in ("fp32", "bf16"))
    assert bf16 == pytest.approx(fp32, rel=0.03)
    assert bf16 != fp32


def test_pack_rows_takes_labels_along(setting: Setting) -> None:
    data = setting.data(setting.job())
    batch = pack_rows(data.train.encoded, [3, 1], data.train.labels)
    assert batch.labels is not None
    assert batch.labels.tolist() == data.train.labels[[3, 1]].tolist()


def test_checkpointed_activations_change_no_loss_and_save_memory(setting: Setting) -> None:
    plain, sparing = (
        setting.job(max_steps=3, model={"model_name_or_path": str(setting.model), "max_length": 32, "hidden_dropout": 0.2, **extra})
        for extra in ({}, {"gradient_checkpointing": True})
    )
    kept: dict[str, int] = {"plain": 0, "sparing": 0}
    found = {}
    for name, job in (("plain", plain), ("sparing", sparing)):

        def keep(tensor: torch.Tensor, name: str = name) -> torch.Tensor:
            kept[name] += tensor.numel() if tensor.requires_grad and not tensor.is_leaf else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found[name] = losses(setting.run(job, name)[1])
    assert found["sparing"] == pytest.approx(found["plain"], abs=1e-6)
    assert kept["sparing"] < 0.7 * kept["plain"]


MEMORY = """
import resource
from pathlib import Path
from danlu.train.memory import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"x" * 40_000_000  # glibc's own rule is to give as much back at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

faults()
print(faults())
with kept_memory():
    faults()
    print(faults())
    held = resident()
print(held - resident())
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
def test_memory_that_a_step_frees_is_not_fetched_again_by_the_next_and_is_given_back_in_the_end() -> None:
    # A process of its own: what others have left of this one's heap would serve as well.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    before, within, given_back, after = map(int, done.stdout.split())
    assert within < 50 < 80 < min(before, after)
    assert given_back > 30_000_000
