"""LoRA adapters that are served beside others: their folder found, and refused if it holds more than a plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from danlu.artifact.bundle import FILE, Bundle, read_bundle
from danlu.artifact.pretrained import model_folder
from danlu.artifact.store import Store
from danlu.compress.fits import check_fits
from danlu.errors import ModelError
from danlu.spec.model import Model
from danlu.spec.serve import Service, Torch
from danlu.spec.vllm import Vllm

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it into the model"
MORE_THAN_LORA = {
    "use_dora": ("DoRA", MERGE),
    "modules_to_save": ("whole modules", MERGE),
    "fan_in_fan_out": ("transposed weights", MERGE),
    "alora_invocation_tokens": ("what waits for tokens of its own", "train a LoRA without them"),
}
CHANGING_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""PEFT's `init_lora_weights` that leave the base with other weights than it has: the adapter alone says nothing."""


def check_adapters(service: Service) -> None:
    """ModelError if an adapter that is to be there from the start is not one of the model that is served. Reads headers of files only."""
    engine = service.engine
    if not isinstance(engine, Torch | Vllm) or not engine.adapters:
        return
    served = None if service.bundle is None else read_bundle(Store(service.storage).resolve(service.bundle))
    base = base_folder(engine, served)
    for name, source in engine.adapters.items():
        folder, _ = adapter_folder(source, name, service.storage, served)
        if base is not None:
            check_fits_decoder(folder, base, source, name)


def base_folder(engine: Torch | Vllm, served: Bundle | None) -> Path | None:
    """The folder with the shapes of the weights that adapters are put on; None where a bundle's are stored in a form of their own."""
    if served is None:
        assert engine.model_name_or_path is not None, "the spec asks for a bundle or a model"
        return model_folder(Model(model_name_or_path=engine.model_name_or_path, revision=engine.revision))
    if served.meta.weights == "adapter" and served.meta.base_model is not None:
        return model_folder(Model(model_name_or_path=served.meta.base_model))
    return served.path / "model" if served.meta.quantization is None else None


def check_fits_decoder(folder: Path, base: Path, source: str, name: str) -> None:
    """ModelError if an adapter is not one of the causal language model in `base`."""

    def skeleton() -> Any:
        from danlu.tasks import pretrain

        return pretrain.skeleton(base)

    check_fits(folder, base, skeleton, source=source, where=name)


def adapter_folder(source: str, name: str, storage: str, served: Bundle | None) -> tuple[Path, dict[str, Any]]:
    """Where an adapter lies, and its config. `source` is a folder, a URI, or a `name@alias` of the storage; a PEFT folder or a bundle.

    ModelError names what cannot be served beside others, or beside what is merged into the bundle that is `served`.
    """
    try:
        folder = Path(source).expanduser()
        if "://" in source or ("@" in source and not folder.exists()):
            folder = Store(storage).resolve(source)
        bundle = read_bundle(folder) if (folder / FILE).exists() else None
        folder = folder if bundle is None else bundle.path / "model"
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} is no object")
    except (OSError, ValueError, RuntimeError) as error:  # a RuntimeError: ~ of nobody
        raise no_adapter(source, name, error) from error
    base = config.get("base_model_name_or_path") if bundle is None else bundle.meta.base_model
    if served is not None and base is not None and base == served.meta.base_model:
        raise ModelError(
            f"{source} was trained on {base}, and what is served here has {served.meta.name} merged into that",
            where=name,
            fix=f"engine.model_name_or_path: {base} and no bundle, and each of them an adapter",
        )
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{source} is {config.get('peft_type')}, and only LoRA can be loaded beside others", where=name, fix=MERGE)
    for field, (why, fix) in MORE_THAN_LORA.items():
        if config.get(field):
            raise ModelError(f"{source} has {field}: {why} cannot be loaded beside others", where=name, fix=fix)
    if str(start := config.get("init_lora_weights")).lower().startswith(CHANGING_STARTS):
        raise ModelError(
            f"{source} has init_lora_weights={start}: it was trained on a base whose weights that had changed",
            where=name,
            fix="save it with PEFT's path_initial_model_for_weight_conversion, or merge it into the model",
        )
    return folder, config


def no_adapter(source: str, name: str, error: Exception) -> ModelError:
    """What to say of a folder whose config or weights cannot be read."""
    return ModelError(f"{source} holds no adapter: {error}", where=name, fix=f"a folder with {CONFIG} and {WEIGHTS}, or a bundle")
