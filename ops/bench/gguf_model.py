"""`python gguf_model.py FOLDER [F32 | F16 | BF16]`: a Qwen3's folder as FOLDER/model.gguf, for llama.cpp. Needs gguf, and no PyTorch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Name and numbers, as float32, of what a safetensors file has in bf16 or fp32."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        for name, told in header.items():
            if name == "__metadata__":
                continue
            first, last = told["data_offsets"]
            file.seek(start + first)
            raw = file.read(last - first)
            match told["dtype"]:
                case "F32":
                    numbers = np.frombuffer(raw, dtype=np.float32)
                case "BF16":
                    numbers = (np.frombuffer(raw, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)
                case other:
                    raise SystemExit(f"{name} is {other}: F32 or BF16")
            yield name, numbers.reshape(told["shape"])


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer whose pre-tokenizer is GPT-2's, and its chat template."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    told = json.loads((folder / "tokenizer_config.json").read_text())
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    names = sorted(ids, key=ids.__getitem__)
    assert [ids[name] for name in names] == list(range(size)), "a vocabulary without gaps"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.CONTROL if ids[name] in special else gguf.TokenType.NORMAL for name in names])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(ids[told["eos_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def write(folder: Path, dtype: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    add_tokenizer(writer, folder, config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, numbers in tensors(folder / "model.safetensors"):
        kind = gguf.GGMLQuantizationType.F32 if numbers.ndim == 1 else gguf.GGMLQuantizationType[dtype]
        renamed = names.get_name(name, try_suffixes=(".weight",))
        assert renamed is not None, name
        writer.add_tensor(renamed, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "BF16")
