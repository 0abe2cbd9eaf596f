"""Tiny language models of many families with a byte-level tokenizer, and ways to ask an engine: shared by the engine's tests."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.generation import Delta, Generation, Prompt, Sampling
from danlu.spec.serve import Torch

CORPUS = [
    "the market price rose on the new report",
    "小麦出口增加，价格上涨。",
    "ships 🚢 and grain 🌾 and naïve café",
    '{"name": "a", "grade": 1}',
]
VOCABULARY = 320
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, sliding_window=8),
    "gemma2": Gemma2Config(
        **SMALL, head_dim=8, tie_word_embeddings=False, sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, tie_word_embeddings=False, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, eos_token_id=1),
}


def write_byte_tokenizer(folder: Path) -> None:
    """Any text, byte by byte, with a few merges: characters of Chinese and emojis take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast.save_pretrained(folder)


def write_family(folder: Path, family: str, **shape: Any) -> Path:
    """A model with random weights, as a Hugging Face folder; `shape` changes its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    write_byte_tokenizer(folder)
    torch.manual_seed(1)
    config = copy.deepcopy(FAMILIES[family])
    config.update(shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def reference(folder: Path) -> PreTrainedModel:
    """The model by itself; eager, which alone has every family's details."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def write_adapter(model_folder: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A LoRA adapter that changes something, as PEFT writes it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(reference(model_folder), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would change nothing
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def greedy(model: PreTrainedModel, prompt: Sequence[int], number: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    made = model.generate(ids, max_new_tokens=number, min_new_tokens=number, do_sample=False, pad_token_id=0, eos_token_id=VOCABULARY - 1)
    return made[0, len(prompt) :].tolist()


def engine(folder: Path, **spec: Any) -> TorchEngine:
    return TorchEngine(Torch(**{"model_name_or_path": str(folder), "dtype": "fp32", "kv_cache_memory_gb": 0.1} | spec))


def with_engine(made: TorchEngine, body: Callable[[TorchEngine], Coroutine[Any, Any, Any]]) -> Any:
    async def life() -> Any:
        await made.start()
        try:
            return await body(made)
        finally:
            await made.stop()

    return asyncio.run(life())


async def ask(made: TorchEngine, prompt: Prompt, sampling: Sampling, **more: Any) -> list[Delta]:
    """Every delta; the last one, and no other, is terminal."""
    deltas = [delta async for delta in made.generate(Generation("a", prompt, sampling, **more))]
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert [delta.usage is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return deltas


def ids_of(deltas: Sequence[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def prompts(number: int, longest: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (number,), generator=generator).tolist()
    return [tuple(torch.randint(5, VOCABULARY - 1, (length,), generator=generator).tolist()) for length in lengths]
