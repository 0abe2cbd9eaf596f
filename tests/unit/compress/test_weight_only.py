"""Weights of 8 and 4 bits: rounded to the nearest, multiplied as what they stand for, and the same after a save, a load and a cast."""

from __future__ import annotations

import copy

import pytest
import torch
from lm import FAMILIES, SMALL
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from danlu.compress.weight_only import WeightOnlyLinear, load_weights, pack_nibbles, quantize_weights, state_of, unpack_nibbles
from danlu.errors import ModelError
from danlu.spec.compress import Int4, Int8

KINDS = {"int8": Int8(), "int4": Int4(), "int4, groups of 64": Int4(group_size=64)}


def linear(ins: int, outs: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(ins + outs)
    return nn.Linear(ins, outs, bias=bias)


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    config = Qwen2Config(**SMALL, tie_word_embeddings=False) if family == "untied" else copy.deepcopy(FAMILIES[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def test_a_weight_of_8_bits_is_off_by_half_a_step_of_its_outputs_scale() -> None:
    layer = linear(96, 40)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[4] *= 1000
    made = WeightOnlyLinear.from_linear(layer, Int8())
    step = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    # A scale keeps the eight bits of a bf16.
    assert bool(((made.dequantize() - layer.weight).abs() <= step * (0.5 + 127 * 2**-9)).all())
    assert bool((made.dequantize()[3] == 0).all())


@pytest.mark.parametrize("group", [32, 64])
def test_a_group_of_4_bits_loses_no_more_than_plain_rounding_would(group: int) -> None:
    layer = linear(128, 40)
    nn.init.normal_(layer.weight)
    made = WeightOnlyLinear.from_linear(layer, Int4(group_size=group))
    groups = layer.weight.detach().view(40, -1, group)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = (largest / -8).bfloat16().float()
    plain = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(2)
    own = (made.dequantize().view(groups.shape) - groups).square().sum(2)
    assert bool((own <= plain * (1 + 1e-5)).all())
    assert float(own.sum()) < 0.96 * float(plain.sum())
    assert made.weight.numel() * 2 == layer.weight.numel()


def test_nibbles_come_out_as_they_went_in() -> None:
    values = torch.randint(-8, 8, (7, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(values)), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_what_the_integers_stand_for(kind: str, dtype: torch.dtype) -> None:
    made = WeightOnlyLinear.from_linear(linear(128, 50), KINDS[kind]).to(dtype)
    for tokens in (1, 3, 20):
        x = torch.randn(2, tokens, 128, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        assert made.bias is not None
        expected = nn.functional.linear(x.double(), made.dequantize().double(), made.bias.double())
        difference = float((made(x).double() - expected).abs().max() / expected.abs().max())
        assert difference < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "untied", "gemma2"])
@torch.inference_mode()
def test_a_model_is_the_same_after_a_save_a_load_and_casts(family: str, kind: str) -> None:
    model = quantize_weights(model_of(family), KINDS[kind])
    ids = torch.arange(5, 40)[None]
    before = model(ids).logits
    state = {name: tensor.clone() for name, tensor in state_of(model).items()}
    assert ("model.embed_tokens.weight" in state) == (family != "qwen3"), "what the head stands for is kept once"
    loaded = load_weights(lambda: AutoModelForCausalLM.from_config(model.config), state).eval()
    assert torch.equal(loaded(ids).logits, before)
    through = loaded.to(torch.bfloat16).to(torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, WeightOnlyLinear):
            assert torch.equal(through.get_submodule(name).dequantize(), module.dequantize()), name
    if kind == "int4":
        assert (model.model.layers[0].mlp.up_proj.bits, model.lm_head.bits if family != "gemma2" else 8) == (4, 8)


def test_other_weights_are_refused_by_name() -> None:
    model = quantize_weights(model_of("qwen3"), Int8())
    state = state_of(model)
    state["model.layers.0.mlp.up_proj.other"] = state.pop("model.layers.0.mlp.up_proj.scale")
    with pytest.raises(ModelError, match=r"up_proj\.scale|up_proj\.other"):
        load_weights(lambda: AutoModelForCausalLM.from_config(model.config), state)


def test_a_model_whose_layers_have_no_linears_is_refused() -> None:
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear layer"):
        quantize_weights(model_of("gpt2"), Int8())
