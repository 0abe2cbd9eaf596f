"""A LoRA adapter's folder, found and looked at before vLLM is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu.artifact.bundle import FILE, read_bundle
from danlu.artifact.store import Store
from danlu.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(source: str, name: str, storage: str, *, max_lora_rank: int) -> Path:
    """Of a PEFT folder or a bundle: a folder, a URI, or a `name@alias` of the storage. ModelError names what cannot be served."""
    folder = Path(source).expanduser()
    if "://" in source or ("@" in source and not folder.exists()):
        folder = Store(storage).resolve(source)
    if (folder / FILE).exists():
        folder = read_bundle(folder).path / "model"
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source} holds no adapter: {error}", where=name, fix=f"a folder with {CONFIG} and {WEIGHTS}, or a bundle"
        ) from error
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{source} is {config.get('peft_type')}, and only LoRA can be loaded beside others", where=name, fix="merge it")
    for field_name, why in (("use_dora", "DoRA"), ("modules_to_save", "whole modules"), ("fan_in_fan_out", "transposed weights")):
        if config.get(field_name):
            raise ModelError(f"{source} has {field_name}: {why} cannot be loaded beside others", where=name, fix="merge it into the model")
    rank = max([int(config["r"]), *(int(value) for value in (config.get("rank_pattern") or {}).values())])
    if rank > max_lora_rank:
        raise ModelError(
            f"{source} has the rank {rank}; max_lora_rank={max_lora_rank} is the largest", where=name, fix="a larger max_lora_rank"
        )
    return folder.resolve()
