"""Bottleneck adapters: two small layers behind a block's output, added to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from danlu.artifact.trainable import bottleneck_modules
from danlu.spec.tuning import Adapter

CONFIG, WEIGHTS = "bottleneck_config.json", "bottleneck.safetensors"
NON_LINEARITIES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


class Bottleneck(nn.Module):
    """h + up(f(down(h))). `up` starts at zero, so the model starts as the pretrained one."""

    def __init__(self, size: int, tuning: Adapter) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(size, tuning.bottleneck_size), nn.Linear(tuning.bottleneck_size, size)
        self.non_linearity = NON_LINEARITIES[tuning.non_linearity]
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        small = self.non_linearity(self.down(hidden))
        adapted: torch.Tensor = hidden + self.up(small)
        return adapted


def insert(model: PreTrainedModel, tuning: Adapter) -> list[str]:
    """Put adapters behind the layers `tuning.placement` means; the names of their parameters. SpecError if the model has none such."""
    names = bottleneck_modules([name for name, _ in model.named_parameters()], tuning)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is no nn.Linear"
        # A child of the layer and a hook on it: every other name stays the pretrained model's.
        linear.add_module("bottleneck", Bottleneck(linear.out_features, tuning).to(linear.weight.device))
        linear.register_forward_hook(_adapt)
    return [name for name, _ in model.named_parameters() if ".bottleneck." in name]


def save(tensors: Mapping[str, torch.Tensor], tuning: Adapter, folder: Path) -> None:
    """Write the adapters, and what else was trained, with how they are built."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(tuning.model_dump(mode="json"), indent=1), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def load(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The pretrained model with the adapters of a folder that `save` wrote."""
    insert(model, Adapter.model_validate_json((folder / CONFIG).read_text(encoding="utf-8")))
    tensors = load_file(folder / WEIGHTS)
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    assert not unknown, f"{folder / WEIGHTS} holds what the model has not: {unknown}"
    return model


def _adapt(linear: nn.Module, _: object, hidden: torch.Tensor) -> torch.Tensor:
    adapted: torch.Tensor = linear.get_submodule("bottleneck")(hidden)
    return adapted
