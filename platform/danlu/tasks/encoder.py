"""What the encoders' tasks share: loading a pretrained encoder under a head of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from danlu.data.columns import Labelled
from danlu.errors import ModelError
from danlu.tasks.config import read_config, why
from danlu.tasks.exchange import Text

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


def text_examples(texts: Labelled) -> list[Text]:
    """What is asked in rows of texts or pairs."""
    pairs: Sequence[str | None] = texts.pairs or [None] * len(texts.texts)
    return [Text(text, pair) for text, pair in zip(texts.texts, pairs, strict=True)]


def head_of(label_names: Sequence[str]) -> dict[str, Any]:
    """A head's entries in a model's config."""
    return {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
    }


def build_encoder(
    auto_class: Any,
    folder: str | Path,
    head: Mapping[str, Any],
    *,
    dropout: float | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The pretrained encoder in float32 as one of transformers' auto classes builds it, `head` set in its config.

    ModelError if the folder lacks some of the encoder.
    """
    config = read_config(folder)
    config.update(dict(head))
    if dropout is not None:
        for name in DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, dropout)
    fewer = {} if quantization is None else {"quantization_config": quantization}
    model: PreTrainedModel
    model, loaded = auto_class.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **fewer
    )
    # Only a head may be missing, or be another number of labels' own; an encoder's layer would silently start from nothing.
    unloaded = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])} - head_parameters(model)
    if unloaded:
        raise ModelError(
            f"the weights in {folder} lack or do not fit {len(unloaded)} of the encoder's parameters, such as {min(unloaded)}",
            where="model.model_name_or_path",
            fix="a folder whose config.json belongs to its weights",
        )
    return model


def encoder_skeleton(auto_class: Any, folder: str | Path, head: Mapping[str, Any]) -> PreTrainedModel:
    """The model `build_encoder` builds, with shapes and no weights."""
    config = read_config(folder)
    config.update(dict(head))
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(config)
    except Exception as error:  # whatever a family's class makes of sizes that do not go together
        raise ModelError(f"{folder} is no base of this task's models: {why(error)}", where="model.model_name_or_path") from error
    return model


def head_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that stand on top of the encoder: they start from nothing, or nearly so."""
    # A bare encoder's own parameters have no prefix.
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    layers = ("encoder.", "embeddings.", "transformer.", "layers.", "embed_tokens.")
    return {name for name, _ in model.named_parameters() if not name.startswith(prefix) or not any(part in name for part in layers)}
