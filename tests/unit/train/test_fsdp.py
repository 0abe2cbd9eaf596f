"""FSDP on one worker: which layers are sharded, adapters, and a disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, DistilBertConfig, DistilBertModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from danlu.spec.train import Optim
from danlu.train.strategies import sharded
from danlu.train.strategies.fsdp import layers_of
from danlu.train.strategies.group import ensure_process_group
from danlu.train.strategy import Setup


def test_the_layers_of_encoders_and_decoders_are_found(tiny_model: Path, tiny_decoder: Path) -> None:
    for folder, kind in ((tiny_model, "BertLayer"), (tiny_decoder, "Qwen3DecoderLayer")):
        assert [type(layer).__name__ for layer in layers_of(AutoModel.from_pretrained(folder))] == [kind, kind]
    distil = DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_heads=2, n_layers=3))
    assert len(layers_of(distil)) == 3
    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_experts=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    assert len(layers_of(moe)) == 2


def test_a_checkpoint_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    ensure_process_group(Setup(Optim(), [], 1, torch.float32, torch.device("cpu"), 0, 1))
    model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1,)))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        sharded.save(model, torch.optim.AdamW(model.parameters()), tmp_path / "file" / "checkpoint")
