"""The language model that the serving benchmarks share: Qwen3-shaped, 95M random parameters with a vocabulary of 25,600."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_qwen3(folder: Path, *, vocab_size: int, eos_token_id: int | None, dtype: Any, quick: bool) -> Any:
    """Its config and weights, 2 layers of 12 if `quick`; without an end token it never ends by itself. Returns the model."""
    model = qwen3(2 if quick else 12, vocab_size, eos_token_id).to(dtype)
    model.save_pretrained(folder)
    return model


def write_pair(folder: Path, *, vocab_size: int, eos_token_id: int, dtype: Any, upper: float, quick: bool) -> None:
    """A model of 36 layers (4 if `quick`), and in folder/draft its first two, which say what it says where the upper ones change little:
    their outputs are scaled by `upper`. Heads of their own, as a head that is the embeddings repeats itself."""
    import torch

    large = qwen3(4 if quick else 36, vocab_size, eos_token_id, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in large.model.layers[2:]:
            layer.self_attn.o_proj.weight *= upper
            layer.mlp.down_proj.weight *= upper
    small = qwen3(2, vocab_size, eos_token_id, tie_word_embeddings=False)
    small.load_state_dict(large.state_dict(), strict=False)
    large.to(dtype).save_pretrained(folder)
    small.to(dtype).save_pretrained(folder / "draft")


def write_bitsandbytes_bundle(folder: Path, model: Any, kind: str) -> None:
    """A bundle of the model in bitsandbytes' `kind` of weights, beside the tokenizer that is there; what is left whole keeps its dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    from danlu.artifact.bundle import BundleMeta, Lineage, write_bundle
    from danlu.compress.quantize import write_bitsandbytes
    from danlu.spec.compress import BnbInt8, BnbNf4
    from danlu.spec.task import Pretrain

    quantization = BnbInt8() if kind == "bnb_int8" else BnbNf4()
    write_bitsandbytes(model, AutoModelForCausalLM, quantization, folder / "model", model.dtype)
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    what: dict[str, Any] = {"name": "bench", "task": Pretrain(), "labels": [], "max_length": 256, "quantization": quantization}
    precision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    write_bundle(folder, BundleMeta(**what, precision=precision, lineage=lineage))


def qwen3(layers: int, vocab_size: int, eos_token_id: int | None, **more: Any) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=eos_token_id,
        **{"tie_word_embeddings": True} | more,
    )
    return Qwen3ForCausalLM(config)
