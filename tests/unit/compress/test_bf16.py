"""How weights are held for bf16 inference."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, Qwen3ForCausalLM

from danlu.compress.bf16 import PrepackedLinear, hold_linears_in_bf16


def autocast(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def test_weights_rounded_once_give_the_bits_that_autocast_gives(tiny_model: Path) -> None:
    torch.manual_seed(1)
    model = BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3, hidden_act="relu").eval()
    ids = torch.randint(5, 40, (4, 16))
    held = copy.deepcopy(model)
    hold_linears_in_bf16(held)
    assert held.classifier.weight.dtype == held.bert.encoder.layer[0].output.dense.bias.dtype == torch.bfloat16
    assert held.bert.embeddings.word_embeddings.weight.dtype == held.bert.embeddings.LayerNorm.weight.dtype == torch.float32
    assert torch.equal(autocast(held, ids), autocast(model, ids))
    with torch.inference_mode():
        assert not torch.equal(model(input_ids=ids).logits, autocast(model, ids))  # rounding can be seen here


def test_a_gelu_before_the_rounding_is_nearer_to_float32(tiny_model: Path) -> None:
    torch.manual_seed(1)
    model = BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3).eval()
    ids = torch.randint(5, 40, (64, 16))
    held = copy.deepcopy(model)
    hold_linears_in_bf16(held)
    if not isinstance(held.bert.encoder.layer[0].intermediate.dense, PrepackedLinear):
        pytest.skip("this CPU's oneDNN does not compute in bf16")
    with torch.inference_mode():
        truth = model(input_ids=ids).logits
    before, after = ((autocast(one, ids).float() - truth).abs() for one in (model, held))
    assert after.mean() <= before.mean() * 1.05
    assert after.max() < 0.05


def test_an_embedding_tied_to_a_linear_layer_stays_in_float32(tiny_decoder: Path) -> None:
    model = Qwen3ForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32).eval()
    ids = torch.randint(5, 40, (2, 16))
    before = autocast(model, ids)
    hold_linears_in_bf16(model)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert torch.equal(autocast(model, ids), before)
