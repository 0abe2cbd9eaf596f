"""Packed decoders give each row's own losses and gradients, whatever stands beside it; and never the whole logits."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from danlu.data.pack import pack
from danlu.errors import ModelError
from danlu.tasks.packed_decoder import PackedDecoder, next_tokens, token_losses

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, pad_token_id=0),
    "mistral-window": MistralConfig(**SMALL, sliding_window=8),
    "granite-divides": GraniteConfig(**SMALL, logits_scaling=4.0, attention_multiplier=0.5, embedding_multiplier=3.0),
    "cohere-multiplies": CohereConfig(**SMALL, logit_scale=0.25),
}
PADDED: dict[str, PretrainedConfig] = {
    "gemma2-softcap": Gemma2Config(**SMALL, head_dim=8, sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
}
ROWS = [np.random.default_rng(i).integers(3, 90, size=n) for i, n in enumerate([7, 3, 2, 21, 40, 5])]


def model_of(config: PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()


class SquaredLogits(LlamaForCausalLM):
    """No family: logits that no factor makes of the output layer's."""

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits.square()
        return output


def test_logits_that_are_made_in_another_way_are_refused() -> None:
    """Losses are made of the output layer here, a chunk at a time, and not by the model."""
    with pytest.raises(ModelError, match="SquaredLogits does more to its output layer's numbers"):
        PackedDecoder(SquaredLogits(LlamaConfig(**SMALL)))


def alone_losses(model: torch.nn.Module) -> torch.Tensor:
    """transformers' own loss of each row by itself, times its targets."""
    found = []
    for row in ROWS:
        ids = torch.tensor(row)[None]
        found.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss * (len(row) - 1))
    return torch.stack(found)


@pytest.mark.parametrize("family", [*FAMILIES, *PADDED])
def test_losses_and_gradients_are_those_of_each_row_alone(family: str) -> None:
    config = (FAMILIES | PADDED)[family]
    ours, alone = PackedDecoder(model_of(config)), model_of(config)
    assert ours.packed == (family in FAMILIES)
    batch = pack(ROWS)
    losses = ours(batch.input_ids, batch.position_ids, batch.cu_seqlens)
    expected = alone_losses(alone)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert (expected / expected.sum()).std() > 0.01
    losses.sum().backward()
    expected.sum().backward()
    for (name, mine), theirs in zip(ours.model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_rows_loss_does_not_move_when_its_neighbour_changes() -> None:
    """Masks that leak change outputs by little: they are compared to the last bit but rounding."""
    ours = PackedDecoder(model_of(FAMILIES["qwen3"]))
    first, second = pack([ROWS[3], ROWS[4]]), pack([ROWS[3], ROWS[4][::-1].copy()])
    a, b = (ours(batch.input_ids, batch.position_ids, batch.cu_seqlens) for batch in (first, second))
    assert a[0] == b[0]
    assert a[1] != b[1]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_chunks_change_neither_loss_nor_gradient(chunk_tokens: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(30, 16, requires_grad=True), torch.nn.Linear(16, 50)
    targets = torch.randint(0, 50, (30,))
    targets[::5] = -100
    token_losses(hidden, head, targets, chunk_tokens=chunk_tokens).sum().backward()
    found = (hidden.grad.clone(), head.weight.grad.clone())
    hidden.grad, head.weight.grad = None, None
    torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum").backward()
    torch.testing.assert_close(found, (hidden.grad, head.weight.grad), rtol=1e-4, atol=1e-5)


def test_the_logits_of_a_large_vocabulary_never_stand_whole() -> None:
    """2,048 tokens by 50,000 entries are 0.4 GB in float32; what autograd keeps between forward and backward is a hundredth."""
    hidden, head = torch.randn(2048, 16, requires_grad=True), torch.nn.Linear(16, 50_000, bias=False)
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() if tensor.data_ptr() != head.weight.data_ptr() else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_losses(hidden, head, torch.zeros(2048, dtype=torch.long), chunk_tokens=256).sum()
    assert kept < 2048 * 50_000 * 4 / 100


def test_the_last_token_of_a_row_has_no_target() -> None:
    batch = pack(ROWS[:3])
    assert (next_tokens(batch.input_ids, batch.cu_seqlens) == -100).nonzero()[:, 0].tolist() == [6, 9, 11]
    assert next_tokens(batch.input_ids, batch.cu_seqlens)[:6].tolist() == ROWS[0][1:].tolist()
