"""A model cut into stages, called one after the other in one process, gives the whole model's answers, whatever its family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from danlu.errors import ModelError
from danlu.spec.parallel import Interleaved1F1B, Pipeline
from danlu.tasks.packed import PackedClassifier, PackedModel
from danlu.tasks.packed_decoder import PackedDecoder
from danlu.train.strategies.stages import Handed, Reached, cut, forget_weights, watched
from danlu.train.strategies.tensor import answers

SMALL = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
DECODER = SMALL | {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
MODELS: dict[str, Callable[[], PackedModel]] = {
    "llama": lambda: PackedDecoder(LlamaForCausalLM(LlamaConfig(**DECODER))),
    "qwen3, tied": lambda: PackedDecoder(Qwen3ForCausalLM(Qwen3Config(**DECODER, tie_word_embeddings=True))),
    "mistral": lambda: PackedDecoder(MistralForCausalLM(MistralConfig(**DECODER, sliding_window=8))),
    "gpt2": lambda: PackedDecoder(GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=5, n_head=2, n_positions=64))),
    "bert": lambda: PackedClassifier(BertForSequenceClassification(BertConfig(**SMALL))),
    "roberta": lambda: PackedClassifier(RobertaForSequenceClassification(RobertaConfig(**SMALL))),
    "electra": lambda: PackedClassifier(ElectraForSequenceClassification(ElectraConfig(**SMALL, embedding_size=8))),
}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_stages_hand_over_what_the_whole_model_computes(family: str) -> None:
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    assert model.packed
    with watched(model) as found:
        expected = answers(model)
    (anatomy,) = found
    spec = Pipeline(pipeline_parallel_size=2, schedule=Interleaved1F1B(stages_per_worker=2))
    stages = [(cut(model, anatomy, layers, handed := Handed()), handed) for layers in spec.layers_of_stages(anatomy.num_layers)]
    held = [sum(p.numel() for p in stage.parameters()) for stage, _ in stages]
    everything = sum(p.numel() for p in model.parameters())
    forget_weights(model)
    assert all(p.is_meta for p in model.parameters())
    assert everything <= sum(held) <= everything + SMALL["vocab_size"] * SMALL["hidden_size"]  # tied weights stand twice
    handed_over: list[torch.Tensor] = []

    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(stage for stage, _ in stages)

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            for stage, _ in stages:
                try:
                    answer: torch.Tensor = stage(*args)
                except Reached as reached:
                    handed_over.append(reached.hidden)
                    for _, other in stages:
                        other.hidden = reached.hidden
            return answer

    torch.testing.assert_close(answers(Chain()), expected)
    assert len(handed_over) == 3


def test_leftover_layers_go_to_the_first_stages_and_too_few_are_refused() -> None:
    spec = Pipeline(pipeline_parallel_size=4)
    assert [len(layers) for layers in spec.layers_of_stages(10)] == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="3 layers cannot be cut into 4 stages; at most 3 work"):
        spec.layers_of_stages(3)


def test_a_model_that_is_no_stack_of_layers_is_refused() -> None:
    class Two(torch.nn.Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.model = model
            self.others = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    with pytest.raises(ModelError, match="has 2 lists of layers"), watched(Two(LlamaForCausalLM(LlamaConfig(**DECODER)))):
        pass
