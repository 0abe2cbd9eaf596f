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
from danlu.tasks import packed_attention
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
            # An element is a sum of terms as large as the largest: that is what float32 rounds (1.2e-7 a term).
            rounding = max(1e-4, 3e-6 * float(theirs.grad.abs().max()))
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=rounding, msg=name)


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


class Layer(torch.nn.Module):
    """What attention looks at of the module that calls it."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("longest", [packed_attention.LONGEST, 8])
@pytest.mark.parametrize(("causal", "window", "key_heads"), [(False, None, 4), (True, None, 2), (True, 4, 1)])
def test_attention_and_its_gradients_are_those_of_one_masked_softmax(
    causal: bool, window: int | None, key_heads: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "LONGEST", longest)  # longer rows take PyTorch's own
    draw = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 5, 8, 11, 20, 21])
    tokens, place = int(offsets[-1]), torch.arange(int(offsets[-1]))
    inputs = [torch.randn(1, tokens, heads, 16, generator=draw).transpose(1, 2).requires_grad_() for heads in (4, key_heads, key_heads)]
    weigh = torch.randn(1, tokens, 4, 16, generator=draw)

    row, distance = torch.bucketize(place, offsets[1:], right=True), place[:, None] - place
    seen = (row[:, None] == row) & ((distance >= 0) if causal else True) & ((distance < window) if window else True)
    query, key, value = inputs[0], *(tensor.repeat_interleave(4 // key_heads, dim=1) for tensor in inputs[1:])
    expected = ((query @ key.transpose(2, 3) * 0.4).masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    gradients = torch.autograd.grad(expected, inputs, weigh)

    out, _ = packed_attention.packed_attention(Layer(causal), *inputs, None, cu_seqlens=offsets, scaling=0.4, sliding_window=window)
    assert ("_KeptAttention" in out.grad_fn.name()) == (longest > 8)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for found, theirs in zip(torch.autograd.grad(out, inputs, weigh), gradients, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


def test_dropped_attention_weights_are_dropped_in_the_backward_too() -> None:
    draw = torch.Generator().manual_seed(0)
    offsets, weigh = torch.tensor([0, 5, 12]), torch.randn(1, 12, 2, 12, generator=draw)
    inputs = [torch.randn(1, 12, heads, 12, generator=draw).transpose(1, 2).requires_grad_() for heads in (2, 1, 1)]

    def dropped(value: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return packed_attention.packed_attention(Layer(True), *inputs[:2], value, None, cu_seqlens=offsets, dropout=0.4)[0]

    out, weights = dropped(inputs[2]), dropped(torch.eye(12)[None, None]).transpose(1, 2)
    place = torch.arange(12)
    seen = ((place < 5)[:, None] == (place < 5)) & (place[:, None] >= place)
    whole = (inputs[0] @ inputs[1].transpose(2, 3) / 12**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    factors = torch.where(seen, weights / whole, 0.0).detach()
    assert {round(float(factor), 3) for factor in factors[:, :, seen].flatten()} == {0.0, 1.667}
    expected = (whole * factors @ inputs[2]).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for found, theirs in zip(torch.autograd.grad(out, inputs, weigh), torch.autograd.grad(expected, inputs, weigh), strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


def test_attention_in_bf16_is_as_near_to_float32_as_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, 70, heads, 16, generator=draw).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    offsets, weigh = torch.tensor([0, 40, 70]), torch.randn(1, 70, 4, 16, generator=draw)

    def found(dtype: torch.dtype) -> list[torch.Tensor]:
        rounded = [tensor.to(dtype) for tensor in exact]
        out, _ = packed_attention.packed_attention(Layer(True), *rounded, None, cu_seqlens=offsets)
        return [out, *torch.autograd.grad(out, exact, weigh.to(dtype))]

    ours = found(torch.bfloat16)
    monkeypatch.setattr(packed_attention, "LONGEST", 0)
    theirs = found(torch.bfloat16)
    for mine, other, one in zip(ours, theirs, found(torch.float32), strict=True):
        assert (mine.float() - one).norm() <= 1.3 * (other.float() - one).norm() + 1e-6
