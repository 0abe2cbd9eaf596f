"""How many numbers a job trains: from the names and shapes in a weights file, without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from danlu.artifact.pretrained import Weight
from danlu.errors import SpecError
from danlu.spec.tuning import Adalora, Freeze, Full, Lora, Qlora, Tuning

LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks)\.(\d+)\.")
EMBEDDINGS = ("embeddings.", "embed_tokens.", "wte.", "wpe.", "word_embedding")


def is_embedding(name: str) -> bool:
    """True for the weights that turn token ids into vectors."""
    return any(part in name for part in EMBEDDINGS)


def num_layers(config: Mapping[str, Any]) -> int:
    """Layers of a model, as its config.json says."""
    return next((int(config[name]) for name in ("num_hidden_layers", "n_layers", "n_layer") if config.get(name)), 0)


def trained_names(names: Sequence[str], tuning: Freeze, layers: int) -> list[str]:
    """The parameters, out of a model's or of a weights file's, that `freeze` trains. SpecError if the model has not as many layers."""
    if tuning.num_trainable_layers > layers:
        raise SpecError(
            f"{tuning.num_trainable_layers} layers are to be trained; the model has {layers}",
            where="tuning.num_trainable_layers",
            fix=f"at most {layers}, or tuning.kind=full",
        )
    numbers = {name: int(found.group(1)) for name in names if (found := LAYER.search(name))}
    if not numbers:
        fix = "tuning.kind=full or lora"
        raise SpecError("the model's layers are not numbered, so there are no last ones", where="tuning.num_trainable_layers", fix=fix)
    first = layers - tuning.num_trainable_layers
    return [name for name in names if not is_embedding(name) and numbers.get(name, layers) >= first]


def num_trainable(tuning: Tuning, shapes: Mapping[str, Weight], config: Mapping[str, Any], *, head: int) -> int:
    """Numbers trained in a model of these weights; `head` is the size of what the task puts on top."""
    match tuning:
        case Full():
            return head + sum(w.num_elements for name, w in shapes.items() if not (tuning.freeze_embeddings and is_embedding(name)))
        case Freeze():
            return head + sum(shapes[name].num_elements for name in trained_names(list(shapes), tuning, num_layers(config)))
        case Lora() | Qlora():
            chosen = targets(shapes, tuning.target_modules)
            return head + sum(tuning.r * (rows + columns) + (rows if tuning.use_dora else 0) for rows, columns in chosen.values())
        case Adalora():
            chosen = targets(shapes, tuning.target_modules)
            return head + sum(tuning.init_r * (rows + columns + 1) for rows, columns in chosen.values())


def targets(shapes: Mapping[str, Weight], names: Sequence[str] | str) -> dict[str, tuple[int, int]]:
    """Shape (rows, columns) of each linear layer that gets an adapter. The output layer gets one only if it is named."""
    found: dict[str, tuple[int, int]] = {}
    for name, weight in shapes.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or len(weight.shape) != 2 or is_embedding(name):
            continue
        everything = names == "all-linear" and module not in ("lm_head", "score", "classifier")
        if everything or (names != "all-linear" and any(module == target or module.endswith(f".{target}") for target in names)):
            found[module] = (weight.shape[0], weight.shape[1])
    return found
