"""A LoRA adapter's folder, looked at before vLLM is told of it."""

from __future__ import annotations

from pathlib import Path

from danlu.artifact.bundle import Bundle
from danlu.errors import ModelError
from danlu.serve.adapters import adapter_folder, check_fits_decoder


def servable_folder(source: str, name: str, storage: str, served: Bundle | None, *, base: Path, max_lora_rank: int) -> Path:
    """Where an adapter lies (see `adapter_folder`); ModelError also if it is not one of the model in `base`, or if vLLM has no room for
    its rank."""
    folder, config = adapter_folder(source, name, storage, served)
    rank = max([int(config["r"]), *(int(value) for value in (config.get("rank_pattern") or {}).values())])
    if rank > max_lora_rank:
        raise ModelError(
            f"{source} has the rank {rank}; max_lora_rank={max_lora_rank} is the largest", where=name, fix="a larger max_lora_rank"
        )
    check_fits_decoder(folder, base, source, name)
    return folder.resolve()
