"""What the loop says of itself: where a step's time goes, how much it multiplies, what ranks hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from danlu.train.phases import Phases, flops_per_token, peak_flops
from danlu.train.run import LocalRun, RanksRecord

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(tiny_decoder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_decoder)


def counted(model: torch.nn.Module, num_tokens: int) -> float:
    """PyTorch's own count of a training step, of matrix products of weights only: one token at a time attends to itself alone."""
    tokens = torch.arange(num_tokens)[:, None] % 50
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=None).logits.sum().backward()
    return float(sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name) and "bmm" not in str(name)))


def test_flops_per_token_are_pytorchs_own_count(decoder: torch.nn.Module) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    for model in (decoder, gpt2):
        # The first layer's input needs gradients as well, since the embeddings are trained.
        assert flops_per_token(model) * 16 == counted(model, 16)


def test_frozen_weights_multiply_but_take_no_gradient(decoder: torch.nn.Module) -> None:
    everything = flops_per_token(decoder)
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    assert flops_per_token(decoder) == pytest.approx(everything * 4 / 6)
    for parameter in decoder.parameters():
        parameter.requires_grad_(True)


def test_four_bits_multiply_as_much_as_sixteen(decoder: torch.nn.Module, tiny_decoder: Path) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(
        tiny_decoder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        device_map={"": "cpu"},
    )
    for model in (quantized, decoder):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    assert flops_per_token(quantized) == flops_per_token(decoder)
    for parameter in decoder.parameters():
        parameter.requires_grad_(True)


def test_the_parts_of_a_step_are_its_whole_and_ranks_are_compared_every_tenth() -> None:
    run = LocalRun(CPU)
    phases = Phases(run)
    for step in range(1, 21):
        phases.begin(step)
        began = phases.last
        with phases.exchange.waiting():
            for name in ("data", "forward", "backward", "forward"):
                with phases.exchange.computing():
                    torch.ones(64, 64) @ torch.ones(64, 64)
                    phases.end(name)
        phases.end("optimizer")
        assert sum(phases.seconds.values()) == pytest.approx(phases.last - began)
        assert sorted(phases.seconds) == ["backward", "communication", "data", "forward", "optimizer"]
        assert min(phases.seconds.values()) > 0
        phases.compare(step)
    told = [record for record in run.records if isinstance(record, RanksRecord)]
    assert [record.step for record in told] == [10, 20]
    assert all(0 < record.own_seconds[0] < 1 and record.memory_bytes[0] > 1 << 20 for record in told)


def test_a_cpus_peak_is_measured_and_is_faster_than_a_second_of_nothing() -> None:
    before = torch.random.get_rng_state()
    speed, source = peak_flops(CPU, torch.float32)
    assert source == "measured"
    assert 1e8 < speed < 1e14
    assert torch.equal(before, torch.random.get_rng_state()), "measuring must not change what is drawn later"
