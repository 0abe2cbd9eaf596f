"""Packed rows give a model's own answers and gradients, for every family that is packed at all."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ErnieConfig,
    PretrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from danlu.data.pack import Packed, by_length, pack
from danlu.tasks.packed import PackedClassifier

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "initializer_range": 0.3,
}
FAMILIES = {
    "bert": BertConfig(**SMALL),
    "ernie": ErnieConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL, pad_token_id=1),
    "xlm-roberta": XLMRobertaConfig(**SMALL, pad_token_id=1),
    "electra": ElectraConfig(**SMALL),
    "albert": AlbertConfig(**SMALL, embedding_size=16),
    "distilbert": DistilBertConfig(
        vocab_size=90, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40, num_labels=3, initializer_range=0.3
    ),
}
ROWS = [np.random.default_rng(i).integers(3, 90, size=n) for i, n in enumerate([7, 3, 3, 12, 30, 5])]


def model_of(config: PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(1)
    # A copy: the attention that a model uses is set in its config.
    return AutoModelForSequenceClassification.from_config(copy.deepcopy(config)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_answers_and_gradients_are_those_of_each_row_alone(family: str) -> None:
    packed, alone = PackedClassifier(model_of(FAMILIES[family])), model_of(FAMILIES[family])
    assert packed.packed
    logits = packed.logits(pack(ROWS))
    expected = torch.cat([alone(input_ids=torch.tensor(row)[None], attention_mask=torch.ones(1, len(row))).logits for row in ROWS])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05, "answers that are all alike would show nothing"

    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours), theirs in zip(packed.model.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_more_tokens_than_the_position_table_has_can_be_packed() -> None:
    packed = PackedClassifier(model_of(FAMILIES["bert"]))
    rows = ROWS * 4
    assert sum(map(len, rows)) > SMALL["max_position_embeddings"]
    torch.testing.assert_close(packed.logits(pack(rows))[: len(ROWS)], packed.logits(pack(ROWS)), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_packed_is_fed_padded_rows_with_the_same_answers() -> None:
    config = DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ours, alone = PackedClassifier(model_of(config)), model_of(config)
    assert not ours.packed
    expected = torch.cat([alone(input_ids=torch.tensor(row)[None], attention_mask=torch.ones(1, len(row))).logits for row in ROWS])
    torch.testing.assert_close(ours.logits(pack(ROWS)), expected, rtol=1e-4, atol=1e-5)


def test_a_pair_keeps_its_segment_ids() -> None:
    packed, alone = PackedClassifier(model_of(FAMILIES["bert"])), model_of(FAMILIES["bert"])
    types = [np.asarray([0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2)) for row in ROWS]
    expected = torch.cat(
        [
            alone(
                input_ids=torch.tensor(row)[None], token_type_ids=torch.tensor(kinds)[None], attention_mask=torch.ones(1, len(row))
            ).logits
            for row, kinds in zip(ROWS, types, strict=True)
        ]
    )
    torch.testing.assert_close(packed.logits(pack(ROWS, types)), expected, rtol=1e-4, atol=1e-5)


def test_packing_keeps_offsets_positions_and_labels() -> None:
    batch: Packed = pack(ROWS[:3], labels=[2, 0, 1])
    assert batch.cu_seqlens.tolist() == [0, 7, 10, 13]
    assert batch.position_ids.tolist() == [*range(7), *range(3), *range(3)]
    assert batch.labels is not None
    assert batch.labels.tolist() == [2, 0, 1]
    assert (batch.num_rows, batch.num_tokens) == (3, 13)


def test_groups_by_length_hold_every_row_once_within_the_token_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, size=200)
    groups = by_length(lengths, 100)
    assert sorted(int(i) for group in groups for i in group) == list(range(200))
    assert all(lengths[group].sum() <= 100 or len(group) == 1 for group in groups)
