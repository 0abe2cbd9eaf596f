"""Four workers that take a model or its rows apart in two ways at once give a plain PyTorch loop's losses and gradient norms, and go on
from each other's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tokenizer
from ranks import Curve, on_ranks
from test_parity import PLACES, decoder_case, plain_curve, plain_decoder_run
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.soak  # four processes of two minutes; two workers' share of it stands in test_parity.py

INTERLEAVED = {"kind": "interleaved_1f1b", "stages_per_worker": 2}

ENCODER: dict[str, dict[str, Any]] = {
    "data x pipeline": {"parallel": {"kind": "pipeline"}},
    "pipeline x tensor": {"parallel": {"kind": "pipeline", "tensor_parallel_size": 2}},
    "data x tensor, ZeRO-1": {"parallel": {"kind": "tensor", "zero_stage": 1}},
}
DECODER: dict[str, dict[str, Any]] = {
    "data x pipeline, GPipe": {"parallel": {"kind": "pipeline", "schedule": {"kind": "gpipe"}}},
    "data x pipeline, interleaved": {"parallel": {"kind": "pipeline", "schedule": INTERLEAVED}},
    "pipeline x tensor": {"parallel": {"kind": "pipeline", "tensor_parallel_size": 2}},
    "data x tensor, ZeRO-1": {"parallel": {"kind": "tensor", "zero_stage": 1}},
    "data x pipeline, ZeRO-1": {"parallel": {"kind": "pipeline", "zero_stage": 1}},
    "data x context": {"parallel": {"kind": "ddp", "context_parallel_size": 2}},
    "more workers than key heads": {"parallel": {"kind": "fsdp", "context_parallel_size": 4}},
}
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "four stages from two": ("data x pipeline, GPipe", {"kind": "pipeline", "pipeline_parallel_size": 4}),
    "two stages from split matrices": ("data x tensor, ZeRO-1", {"kind": "pipeline"}),
    "split matrices from four stages": ("data x pipeline, interleaved", {"kind": "tensor", "zero_stage": 1}),
    "another context": ("more workers than key heads", {"kind": "fsdp", "context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, an output layer of its own."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    vocabulary = write_tokenizer(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = LlamaConfig(
        vocab_size=vocabulary, **sizes, **ids, max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=False
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def four_ranks(
    tiny_model: Path, llama: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Curve]]:
    """Where runs were written, and curves, all of one world of processes."""
    folder = tmp_path_factory.mktemp("four-ranks")
    shape: dict[str, Any] = {"workers": {"num_workers": 4}, "micro_batch_size": 2}
    cases = {f"encoder {name}": shape | case for name, case in ENCODER.items()}
    cases |= {f"decoder {name}": {"folder": str(llama)} | decoder_case(llama, **shape, **case) for name, case in DECODER.items()}
    for name, (before, parallel) in RESUMED.items():
        case = decoder_case(llama, **shape, parallel=parallel)
        cases[name] = {"folder": str(llama), "goes_on_from": f"decoder {before}"} | case
    return folder, on_ranks(4, cases, folder, model=tiny_model, train_file=topic_files["train"]).curves


@pytest.fixture(scope="module")
def plain_llama(llama: Path, topic_files: dict[str, str]) -> tuple[Curve, dict[str, torch.Tensor]]:
    return plain_decoder_run(llama, topic_files["train"])


@pytest.mark.parametrize("case", ENCODER)
def test_an_encoder_taken_apart_twice_equals_the_plain_loop(
    case: str, four_ranks: tuple[Path, dict[str, Curve]], tiny_model: Path, topic_files: dict[str, str]
) -> None:
    assert_equal(four_ranks[1][f"encoder {case}"], plain_curve(tiny_model, topic_files["train"]))


@pytest.mark.parametrize("case", DECODER)
def test_a_decoder_taken_apart_twice_equals_the_plain_loop_and_its_weights(
    case: str, four_ranks: tuple[Path, dict[str, Curve]], plain_llama: tuple[Curve, dict[str, torch.Tensor]]
) -> None:
    folder, curves = four_ranks
    assert_equal(curves[f"decoder {case}"], plain_llama[0])
    loaded = AutoModelForCausalLM.from_pretrained(Path(f"{folder}/out.json.decoder {case}") / "best" / "step-000004").state_dict()
    assert loaded.keys() == plain_llama[1].keys()
    for name, weight in plain_llama[1].items():
        torch.testing.assert_close(loaded[name], weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_is_gone_on_from_by_a_model_that_is_taken_apart_otherwise(
    case: str, four_ranks: tuple[Path, dict[str, Curve]], plain_llama: tuple[Curve, Any]
) -> None:
    assert_equal(four_ranks[1][case], plain_llama[0][2:])


def assert_equal(found: Curve, plain: Curve) -> None:
    assert len(found) == len(plain) > 0
    for ours, theirs in zip(found, plain, strict=True):
        assert ours == pytest.approx(theirs, abs=0.5 * 10**-PLACES), (found, plain)
