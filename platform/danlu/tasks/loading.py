"""Models with the output layer they were pretrained with: language models of every kind, loaded whole or as shapes only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from danlu.errors import ModelError
from danlu.tasks.config import read_config, why


def load_model(
    auto: Any,
    folder: str | Path,
    *,
    dropout: float | None,
    dropout_names: Sequence[str],
    quantization: BitsAndBytesConfig | None,
    fix: str,
    backbone_only: bool = False,
) -> PreTrainedModel:
    """The pretrained model of the `auto` class, in float32, its linear layers in fewer bits where `quantization` says how.

    `dropout` stands for each of the config's `dropout_names`. ModelError if the folder lacks weights; with `backbone_only` the output layer
    may be missing, and then starts from nothing.
    """
    config = read_config(folder)
    if dropout is not None:
        for name in dropout_names:
            if hasattr(config, name):
                setattr(config, name, dropout)
    fewer = {} if quantization is None else {"quantization_config": quantization}
    model: PreTrainedModel
    model, loaded = auto.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True, **fewer)
    missing = [name for name in loaded["missing_keys"] if not backbone_only or name.startswith(f"{model.base_model_prefix}.")]
    if missing:
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} of the model's parameters, such as {min(missing)}",
            where="model.model_name_or_path",
            fix=fix,
        )
    return model


def load_shapes(auto: Any, folder: str | Path, what: str) -> PreTrainedModel:
    """The model that `load_model` loads, with shapes and no weights. ModelError if the folder holds no `what`."""
    config = read_config(folder)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config)
    except Exception as error:  # whatever a family's class makes of sizes that do not go together
        raise ModelError(f"{folder} is no {what}: {why(error)}", where="model.model_name_or_path") from error
    return model
