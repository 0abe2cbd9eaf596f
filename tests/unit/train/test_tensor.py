"""Which models can be split over workers, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from danlu.errors import ModelError
from danlu.tasks.context import Context
from danlu.tasks.packed_decoder import PackedDecoder
from danlu.train.strategies.context import share
from danlu.train.strategies.tensor import ENCODER_PLAN, plan_of


def test_a_decoder_brings_its_plan_and_bert_gets_ours(tiny_decoder: Path, tiny_model: Path) -> None:
    assert plan_of(AutoModelForCausalLM.from_pretrained(tiny_decoder), 2)["layers.*.self_attn.o_proj"] == "rowwise"
    assert plan_of(AutoModelForSequenceClassification.from_pretrained(tiny_model), 2) == ENCODER_PLAN


def test_a_size_that_does_not_divide_the_heads_is_refused_with_all_numbers(tiny_decoder: Path) -> None:
    with pytest.raises(ModelError, match="num_key_value_heads=2, which is not a multiple of tensor_parallel_size=4") as raised:
        plan_of(AutoModelForCausalLM.from_pretrained(tiny_decoder), 4)
    assert "num_attention_heads=4, num_key_value_heads=2, intermediate_size=64" in raised.value.fix


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(ModelError, match="DistilBertModel has no tensor-parallel plan") as raised:
        plan_of(DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_heads=2, n_layers=1)), 2)
    assert "fsdp" in raised.value.fix


def test_experts_are_refused_because_their_split_is_not_trained_here() -> None:
    config = Qwen3MoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    with pytest.raises(ModelError, match=r"splits layers\.\*\.mlp\.experts"):
        plan_of(Qwen3MoeForCausalLM(config), 2)


def test_heads_that_workers_cannot_share_are_refused_with_all_numbers(tiny_decoder: Path) -> None:
    decoder = PackedDecoder(AutoModelForCausalLM.from_pretrained(tiny_decoder))
    with pytest.raises(ModelError, match="num_attention_heads=4, which cannot be shared out over context_parallel_size=3") as raised:
        share(decoder, Context(None, 0, 3))
    assert "num_attention_heads=4, num_key_value_heads=2" in raised.value.fix
    share(decoder, Context(None, 0, 4))  # the two key heads are repeated
