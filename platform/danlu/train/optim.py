"""AdamW's parameter groups and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from danlu.spec.train import Optim


def param_groups(model: nn.Module, optim: Optim, head: Collection[str], lr_scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Trainable parameters by decay (matrices only) and by rate; `head` names those that start from nothing, `lr_scales` multiplies the
    rate of those it names."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = optim.head_learning_rate_multiplier if name in head else lr_scales.get(name, 1.0)
            groups.setdefault((_decays(name, parameter), scale), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.learning_rate,
            "weight_decay": optim.weight_decay if decays else 0.0,
            "lr_scale": scale,
        }
        for (decays, scale), parameters in groups.items()
    ]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    # IA3's factors are stored as matrices of one row or column, and start at one: decay would put activations out.
    return parameter.ndim >= 2 and ".ia3_l." not in name


def adamw(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.AdamW:
    """torch's AdamW, fused."""
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_epsilon, fused=True)


def set_learning_rate(groups: list[dict[str, Any]], learning_rate: float) -> None:
    """Give each group its share of the rate."""
    for group in groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def learning_rate_at(optim: Optim, num_steps: int) -> Callable[[int], float]:
    """Learning rate of each step, 0-based: the same shapes as transformers' get_scheduler."""
    warmup = math.ceil(optim.schedule.warmup_ratio * num_steps)

    def rate(step: int) -> float:
        if step < warmup:
            return optim.learning_rate * step / warmup if warmup > 0 else optim.learning_rate
        done = (step - warmup) / max(1, num_steps - warmup)
        match optim.schedule.kind:
            case "constant":
                factor = 1.0
            case "linear":
                factor = 1.0 - done
            case "cosine":
                factor = 0.5 * (1.0 + math.cos(math.pi * done))
        return optim.learning_rate * factor

    return rate
