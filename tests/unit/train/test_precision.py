"""float16 with a loss scale: torch's GradScaler, by hand, makes the same steps and skips the same ones; a restart keeps the scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_decoder
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from danlu.spec.train import TrainJob
from danlu.tasks import pretrain
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train.loop import train
from danlu.train.precision import LossScale
from danlu.train.run import EventRecord, LocalRun, StepRecord

STEPS = 8


@pytest.fixture(scope="module")
def loud_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose gradients overflow float16 at the first scales."""
    folder = write_tiny_decoder(tmp_path_factory.mktemp("loud"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 300
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def job_of(folder: Path, train_file: str, storage: Path, **fields: Any) -> TrainJob:
    base: dict[str, Any] = {
        "name": "half",
        "model": {"model_name_or_path": str(folder), "max_length": 12},
        "data": {"train": train_file, "cache_dir": str(storage / "cache")},
        "task": {"kind": "pretrain"},
        "optim": {"learning_rate": 1e-3, "max_grad_norm": 0.5, "schedule": {"kind": "constant", "warmup_ratio": 0}},
        "precision": "fp16",
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "max_steps": STEPS,
        "evaluation": {"eval_steps": STEPS},
        "checkpoint": {"save_steps": 4},
    }
    return TrainJob.model_validate(base | fields)


def run(job: TrainJob, uri: Path) -> LocalRun:
    local = LocalRun(torch.device("cpu"))
    folder = Path(job.model.model_name_or_path)
    tokenizer = load_tokenizer(folder)
    data = pretrain.splits(job.data, job.task, tokenizer, max_length=job.model.max_length, seed=job.seed)
    train(job, data, folder, tokenizer, local, str(uri))
    return local


def steps_of(local: LocalRun) -> list[StepRecord]:
    return [record for record in local.records if isinstance(record, StepRecord)]


def by_hand(job: TrainJob) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, the next step's scale) of each step: transformers, autocast and GradScaler."""
    folder = Path(job.model.model_name_or_path)
    tokenizer = load_tokenizer(folder)
    data = pretrain.splits(job.data, job.task, tokenizer, max_length=12, seed=job.seed)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    groups = [{"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    scaler = torch.amp.GradScaler("cpu")
    order = np.concatenate([np.random.default_rng((job.seed, epoch)).permutation(len(data.train)) for epoch in range(2)])
    found = []
    for step in range(STEPS):
        rows = [torch.from_numpy(data.train.encoded.row(int(i)).astype(np.int64)) for i in order[step * 16 : (step + 1) * 16]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        found.append((float(loss.detach()), float(norm), scaler.get_scale()))
    return found


def test_steps_and_skipped_steps_are_those_of_torchs_scaler_by_hand(
    loud_decoder: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    job = job_of(loud_decoder, topic_files["train"], tmp_path)
    local = run(job, tmp_path / "run")
    ours, theirs = steps_of(local), by_hand(job)
    skipped = [not math.isfinite(norm) for _, norm, _ in theirs]
    assert 0 < sum(skipped) < STEPS
    assert [record.skipped for record in ours] == skipped
    assert [record.loss_scale for record in ours] == [scale for *_, scale in theirs]
    for record, (loss, norm, _) in zip(ours, theirs, strict=True):
        assert record.loss == pytest.approx(loss, rel=2e-3)
        assert record.skipped or record.grad_norm == pytest.approx(norm, rel=2e-2)
    told = [record for record in local.records if isinstance(record, EventRecord) and record.event == "step skipped"]
    assert len(told) == sum(skipped)
    assert "the loss scale is now 32768" in told[0].detail


def test_a_restart_goes_on_with_the_scale(loud_decoder: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    job = job_of(loud_decoder, topic_files["train"], tmp_path)
    whole = steps_of(run(job, tmp_path / "run"))
    (tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}" / "manifest.json").unlink()
    again = steps_of(run(job, tmp_path / "run"))
    assert whole[3].loss_scale < 65536.0  # type: ignore[operator]
    assert [(r.loss, r.loss_scale, r.skipped) for r in again] == [(r.loss, r.loss_scale, r.skipped) for r in whole[4:]]


def test_the_scale_grows_and_backs_off_as_torchs_does() -> None:
    ours, theirs = LossScale(scale=1024.0, growth_interval=3), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for finite in (True, True, False, True, True, True, True, False, False, True, True, True):
        weight.grad = torch.full((1,), 1.0 if finite else math.inf)
        theirs.scale(torch.ones(1))
        theirs.step(optimizer)
        theirs.update()
        assert ours.takes_step(1.0 if finite else math.inf) == finite
        assert ours.scale == theirs.get_scale()
    assert ours.skipped_steps == 3


def test_deepspeed_in_float16_on_a_cpu_is_refused_by_the_spec(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"DeepSpeed has no fp16 on a CPU; precision=bf16"):
        job_of(tmp_path, "t.csv", tmp_path, parallel={"kind": "deepspeed"})


@pytest.mark.gpu
def test_deepspeed_in_float16_follows_its_own_scale(loud_decoder: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    shape = {"parallel": {"kind": "deepspeed", "zero_stage": 2}, "workers": {"gpus_per_worker": 1}}
    job = job_of(loud_decoder, topic_files["train"], tmp_path, **shape)
    local = LocalRun(torch.device("cuda"))
    tokenizer = load_tokenizer(loud_decoder)
    data = pretrain.splits(job.data, job.task, tokenizer, max_length=12, seed=job.seed)
    train(job, data, loud_decoder, tokenizer, local, str(tmp_path / "run"))
    found = steps_of(local)
    assert any(record.skipped for record in found)
    assert not all(record.skipped for record in found)
    assert [record.loss_scale for record in found] == sorted((record.loss_scale for record in found), reverse=True)  # type: ignore[type-var]
