"""LoRA adapters that are served beside others: their folder found, and refused if it holds more than a plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu.artifact.bundle import FILE, read_bundle
from danlu.artifact.store import Store
from danlu.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MORE_THAN_LORA = {"use_dora": "DoRA", "modules_to_save": "whole modules", "fan_in_fan_out": "transposed weights"}


def adapter_folder(source: str, name: str, storage: str) -> tuple[Path, dict[str, Any]]:
    """Where an adapter lies, and its config. `source` is a folder, a URI, or a `name@alias` of the storage; a PEFT folder or a bundle.

    ModelError names what cannot be served beside others.
    """
    folder = Path(source).expanduser()
    if "://" in source or ("@" in source and not folder.exists()):
        folder = Store(storage).resolve(source)
    if (folder / FILE).exists():
        folder = read_bundle(folder).path / "model"
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise no_adapter(source, name, error) from error
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{source} is {config.get('peft_type')}, and only LoRA can be loaded beside others", where=name, fix="merge it")
    for field, why in MORE_THAN_LORA.items():
        if config.get(field):
            raise ModelError(f"{source} has {field}: {why} cannot be loaded beside others", where=name, fix="merge it into the model")
    return folder, config


def no_adapter(source: str, name: str, error: Exception) -> ModelError:
    """What to say of a folder whose config or weights cannot be read."""
    return ModelError(f"{source} holds no adapter: {error}", where=name, fix=f"a folder with {CONFIG} and {WEIGHTS}, or a bundle")
