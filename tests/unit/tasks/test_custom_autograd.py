"""Decoders with a hand-written backward give transformers' own outputs and gradients, and stay what they were."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from danlu.tasks.custom_autograd import CustomRMSNorm, rotate_half, use_custom_autograd

IDS = torch.arange(3, 43).view(2, 20)
SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, tuple[PretrainedConfig, int]] = {
    "llama": (LlamaConfig(**SMALL), 5),
    "qwen3": (Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True), 9),
    "gpt2": (GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3), 0),
    "gemma2": (Gemma2Config(**SMALL, head_dim=8), 0),
}
"""Configs, and how many norms are root mean squares times a weight."""


def model_of(family: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family][0])).eval()


def loss_and_gradients(model: torch.nn.Module, precision: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_with_its_own_backward_gives_transformers_loss_and_gradients(family: str) -> None:
    model = model_of(family)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    expected, gradients = loss_and_gradients(model)
    names = list(model.state_dict())

    use_custom_autograd(model)

    assert sum(isinstance(module, CustomRMSNorm) for module in model.modules()) == FAMILIES[family][1]
    assert list(model.state_dict()) == names
    loss, found = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_under_bf16_autocast_it_is_as_near_to_float32_as_transformers_own() -> None:
    model = model_of("qwen3")
    exact, _ = loss_and_gradients(model)
    rounded, theirs = loss_and_gradients(model, torch.bfloat16)
    use_custom_autograd(model)
    loss, ours = loss_and_gradients(model, torch.bfloat16)
    assert abs(loss - exact) <= 2 * abs(rounded - exact) + 1e-3
    for name, gradient in theirs.items():
        assert ours[name].dtype == gradient.dtype
        assert (ours[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_frozen_norms_get_no_gradient_and_copies_have_weights_of_their_own() -> None:
    model = model_of("llama")
    use_custom_autograd(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    other = copy.deepcopy(model)
    loss, gradients = loss_and_gradients(model)
    assert not any("norm" in name for name in gradients)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    assert loss_and_gradients(other)[0] != loss
    assert loss_and_gradients(model)[0] == loss


def test_half_rotations_are_transformers_to_the_bit() -> None:
    from transformers.models.cohere.modeling_cohere import rotate_half as interleaved
    from transformers.models.mixtral.modeling_mixtral import rotate_half as halves

    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.equal(rotate_half(x), halves(x))
    assert not torch.equal(rotate_half(x), interleaved(x))
    assert torch.autograd.gradcheck(rotate_half, x)
    with pytest.raises(ValueError, match="7"):
        rotate_half(torch.zeros(1, 7))


def test_a_model_that_rotates_in_another_way_is_left_alone() -> None:
    from transformers.models.cohere import modeling_cohere

    before = modeling_cohere.rotate_half
    use_custom_autograd(AutoModelForCausalLM.from_config(CohereConfig(**SMALL)))
    assert modeling_cohere.rotate_half is before
