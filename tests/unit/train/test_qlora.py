"""QLoRA's frozen base: it stays what it was, in eval mode too, and it is the same wherever the adapter is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from conftest import write_tiny_decoder
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from danlu.data.pack import pack
from danlu.spec.train import TrainJob
from danlu.tasks import pretrain
from danlu.train.model import Trainee, build

ROWS = [np.asarray([2, 9, 11, 30, 7], dtype=np.int32), np.asarray([2, 8, 40, 3], dtype=np.int32)]


@pytest.fixture(scope="module")
def wide_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its rows are whole blocks of 64, which is what bitsandbytes repacks without a word."""
    return write_tiny_decoder(tmp_path_factory.mktemp("wide-qwen3"), hidden_size=64)


def job_of(model: Path, **tuning: Any) -> TrainJob:
    fields = {"name": "qlora", "model": {"model_name_or_path": str(model)}, "data": {"train": "unused"}, "task": {"kind": "pretrain"}}
    return TrainJob.model_validate({**fields, "precision": "fp32", "tuning": {"kind": "qlora", "r": 4, **tuning}})


def gradients(trainee: Trainee, job: TrainJob) -> dict[str, torch.Tensor]:
    trainee.module.train()
    trainee.module.zero_grad()
    pretrain.loss(trainee.module, pack(ROWS), job.task).backward()
    return {name: p.grad.clone() for name, p in trainee.module.named_parameters() if p.grad is not None}


@torch.no_grad()
def scored(trainee: Trainee) -> None:
    trainee.module.eval()
    pretrain.row_outputs(trainee.module, pack(ROWS))


def test_a_4_bit_base_trains_on_as_before_after_a_forward_in_eval_mode(wide_decoder: Path) -> None:
    job = job_of(wide_decoder)
    trainee = build(job, wide_decoder, [])
    before = gradients(trainee, job)
    scored(trainee)
    after = gradients(trainee, job)
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(gradient.abs().max() > 0 for gradient in after.values())


def test_that_is_not_so_by_itself(wide_decoder: Path) -> None:
    """What the test above guards against, so that it is seen when bitsandbytes no longer does it."""
    job = job_of(wide_decoder)
    trainee = build(job, wide_decoder, [])
    layers = [module for module in trainee.module.modules() if isinstance(module, bnb.nn.Linear4bit)]
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, where bitsandbytes repacks weights")
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = gradients(trainee, job)
    scored(trainee)
    after = gradients(trainee, job)
    assert not all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


def test_an_8_bit_base_writes_no_log_line_for_each_product(wide_decoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(wide_decoder, bits=8)
    trainee = build(job, wide_decoder, [])
    caplog.clear()
    scored(trainee)
    assert any(isinstance(module, bnb.nn.Linear8bitLt) for module in trainee.module.modules())
    assert not caplog.records


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_its_losses_and_gradients_are_those_of_peft_and_bitsandbytes_by_hand(quant_type: str, tiny_decoder: Path) -> None:
    job = job_of(tiny_decoder, bnb_4bit_quant_type=quant_type)
    ours = gradients(build(job, tiny_decoder, []), job)
    torch.manual_seed(job.seed)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_decoder, quantization_config=config, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32.0, target_modules="all-linear")).train()
    for row in ROWS:
        ids = torch.from_numpy(row.astype(np.int64))[None]
        (model(input_ids=ids, labels=ids).loss * (len(row) - 1)).backward()
    theirs = {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_what_has_no_effect_or_cannot_follow_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValidationError, match="bnb_4bit_quant_type=fp4 has no effect with bits=8"):
        job_of(tiny_model, bits=8, bnb_4bit_quant_type="fp4")
    job = job_of(tiny_model).model_dump(mode="json") | {"task": {"kind": "classification"}, "compress": {}}
    with pytest.raises(ValidationError, match="compress takes full-precision weights"):
        TrainJob.model_validate(job)
