"""LoRA adapters that are served beside others: their folder found, and refused if it holds more than a plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu.artifact.bundle import FILE, Bundle, read_bundle
from danlu.artifact.store import Store
from danlu.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MORE_THAN_LORA = {"use_dora": "DoRA", "modules_to_save": "whole modules", "fan_in_fan_out": "transposed weights"}


def adapter_folder(source: str, name: str, storage: str, served: Bundle | None) -> tuple[Path, dict[str, Any]]:
    """Where an adapter lies, and its config. `source` is a folder, a URI, or a `name@alias` of the storage; a PEFT folder or a bundle.

    ModelError names what cannot be served beside others, or beside what is merged into the bundle that is `served`.
    """
    folder = Path(source).expanduser()
    if "://" in source or ("@" in source and not folder.exists()):
        folder = Store(storage).resolve(source)
    bundle = read_bundle(folder) if (folder / FILE).exists() else None
    folder = folder if bundle is None else bundle.path / "model"
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise no_adapter(source, name, error) from error
    base = config.get("base_model_name_or_path") if bundle is None else bundle.meta.base_model
    if served is not None and base is not None and base == served.meta.base_model:
        raise ModelError(
            f"{source} was trained on {base}, and what is served here has {served.meta.name} merged into that",
            where=name,
            fix=f"engine.model_name_or_path: {base} and no bundle, and each of them an adapter",
        )
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{source} is {config.get('peft_type')}, and only LoRA can be loaded beside others", where=name, fix="merge it")
    for field, why in MORE_THAN_LORA.items():
        if config.get(field):
            raise ModelError(f"{source} has {field}: {why} cannot be loaded beside others", where=name, fix="merge it into the model")
    return folder, config


def no_adapter(source: str, name: str, error: Exception) -> ModelError:
    """What to say of a folder whose config or weights cannot be read."""
    return ModelError(f"{source} holds no adapter: {error}", where=name, fix=f"a folder with {CONFIG} and {WEIGHTS}, or a bundle")
