"""The language model that the serving benchmarks share: Qwen3-shaped, 95M random parameters with a vocabulary of 25,600."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_qwen3(folder: Path, *, vocab_size: int, eos_token_id: int | None, dtype: Any, quick: bool) -> Any:
    """Its config and weights, 2 layers of 12 if `quick`; without an end token it never ends by itself. Returns the model."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=768,
        num_hidden_layers=2 if quick else 12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=eos_token_id,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return model
