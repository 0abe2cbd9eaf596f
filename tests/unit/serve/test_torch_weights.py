"""Integer weights in the engine: every tier's greedy answers are `model.generate`'s on what the integers stand for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import peft
import pytest
import torch
from lm import ask, engine, ids_of, prompts, reference, with_engine, write_adapter, write_family
from torch import nn
from transformers import PreTrainedModel

from danlu.compress.weight_only import WeightOnlyLinear, quantize_weights
from danlu.errors import ModelError
from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.generation import Sampling
from danlu.spec.compress import Int4, Int8

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
FIRST = {"auto": "compiled kernels", "off": "fused PyTorch"}


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "gemma2"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that are fused, one with biases, and one that is not; and an adapter of each."""
    root = tmp_path_factory.mktemp(request.param)
    base = write_family(root / "base", request.param)
    return base, write_adapter(base, root / "adapter", 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def plain(folder: Path, kind: str) -> PreTrainedModel:
    """An ordinary model of the rounded weights."""
    model = quantize_weights(reference(folder), Int8() if kind == "int8" else Int4())
    for name, module in list(model.named_modules()):
        if isinstance(module, WeightOnlyLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data, linear.bias = module.dequantize(), None if module.bias is None else nn.Parameter(module.bias)
            model.set_submodule(name, linear)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def greedy(model: PreTrainedModel | peft.PeftModel, prompt: tuple[int, ...]) -> list[int]:
    """Whatever ends a text may stand in it."""
    made = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kernels", FIRST)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_answers_are_those_of_the_rounded_weights_with_and_without_an_adapter(kind: str, kernels: str, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    asked = [(prompt, name) for prompt in prompts(3, 60, seed=4) for name in (None, "a")]
    models = {None: plain(base, kind), "a": peft.PeftModel.from_pretrained(plain(base, kind), adapter).eval()}
    expected = [greedy(models[name], prompt) for prompt, name in asked]
    assert {len(ids) for ids in expected} == {12}
    if kind == "int4":
        assert expected[0] != greedy(reference(base), asked[0][0]), "rounding changes something"

    async def body(made: TorchEngine) -> None:
        for _ in range(2):  # the second time prefixes come from the cache
            answers = await asyncio.gather(*(ask(made, prompt, GREEDY, adapter=name) for prompt, name in asked))
            assert [ids_of(deltas) for deltas in answers] == expected
        assert answers[0][-1].usage is not None
        assert answers[-1][-1].usage.cached_tokens > 0

    with_engine(engine(base, quantization=kind, kernels=kernels, adapters={"a": str(adapter)}), body)


def test_activations_are_what_dtype_says(folders: tuple[Path, Path]) -> None:
    async def body(made: TorchEngine) -> None:
        assert {tensor.dtype for kept in made.runner.cache.layers.values() for tensor in kept} == {torch.bfloat16}
        assert len(ids_of(await ask(made, (7, 8, 9), GREEDY))) == 12

    with_engine(engine(folders[0], quantization="int8", dtype="bf16"), body)


@torch.inference_mode()
def test_a_model_with_nothing_to_round_is_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "gpt2")

    async def body(_: TorchEngine) -> None:
        raise AssertionError("it started")

    with pytest.raises(ModelError, match="no linear layer to quantize"):
        with_engine(engine(folder, quantization="int8"), body)
