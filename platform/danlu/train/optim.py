"""The optimizer, its parameter groups and the learning rate over the steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from danlu.artifact.trainable import is_embedding
from danlu.errors import SpecError
from danlu.spec.optim import Adafactor, AdamW, BnbAdamW, Constant, Cosine, Linear, Lion, OneCycle, Optim, Wsd
from danlu.train.compiled_adamw import CompiledAdamW

LAYER = re.compile(r"\.(?:layer|layers|h|block|blocks|albert_layers)\.(\d+)\.")


def param_groups(model: nn.Module, optim: Optim, head: Collection[str], lr_scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Trainable parameters by decay (matrices only) and by rate; `head` names those that start from nothing, `lr_scales` multiplies the
    rate of those it names."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    depth = _num_layers(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = optim.layer_learning_rate_decay ** _below_top(name, depth) * lr_scales.get(name, 1.0)
            scale = optim.head_learning_rate_multiplier if name in head else scale
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


def _num_layers(model: nn.Module) -> int:
    found = [int(match[1]) for name, _ in model.named_parameters() if (match := LAYER.search(name))]
    return max(found, default=-1) + 1


def _below_top(name: str, num_layers: int) -> int:
    """How many steps down a parameter stands: 0 above the layers, 1 the last layer, one more than the layers for the embeddings."""
    if match := LAYER.search(name):
        return num_layers - int(match[1])
    is_output = "embed_out" in name or "prompt_encoder" in name  # GPT-NeoX's output layer, and what PEFT puts before a row
    return num_layers + 1 if not is_output and ("embed" in name or is_embedding(name)) else 0


def make_optimizer(groups: list[dict[str, Any]], optim: Optim, *, compiled: bool = False) -> torch.optim.Optimizer:
    """The optimizer of a spec's `optim:`. The rate in it is only a start: `set_learning_rate` gives each step its own.

    `compiled`: by the compiled kernels, if it is one that they have.
    """
    rate = optim.learning_rate
    match optim.optimizer:
        case AdamW() as spec:
            settings: dict[str, Any] = {"lr": rate, "betas": (spec.adam_beta1, spec.adam_beta2), "eps": spec.adam_epsilon}
            return CompiledAdamW(groups, **settings) if compiled else torch.optim.AdamW(groups, **settings, fused=True)
        case BnbAdamW() as spec:
            betas = (spec.adam_beta1, spec.adam_beta2)
            made: torch.optim.Optimizer = _bitsandbytes().optim.AdamW(
                groups, lr=rate, betas=betas, eps=spec.adam_epsilon, optim_bits=spec.bits, is_paged=spec.paged
            )
            return made
        case Lion() as spec:
            betas = (spec.lion_beta1, spec.lion_beta2)
            made = _bitsandbytes().optim.Lion(groups, lr=rate, betas=betas, optim_bits=spec.bits)
            return made
        case Adafactor() as spec:
            return torch.optim.Adafactor(groups, lr=rate, beta2_decay=spec.beta2_decay, d=spec.clip_threshold)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise SpecError("bitsandbytes is not installed", where="optim.optimizer.kind", fix="pip install 'danlu[bnb]', or adamw") from error
    return bitsandbytes


def set_learning_rate(groups: list[dict[str, Any]], learning_rate: float) -> None:
    """Give each group its share of the rate."""
    for group in groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def learning_rate_at(optim: Optim, num_steps: int) -> Callable[[int], float]:
    """Learning rate of each step, 0-based: the shapes of transformers' get_scheduler and torch's OneCycleLR."""
    schedule = optim.schedule

    def cosine(done: float, start: float, end: float) -> float:
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))

    if isinstance(schedule, OneCycle):
        peak_at = schedule.warmup_ratio * num_steps - 1
        low, last = 1 / schedule.div_factor, 1 / schedule.div_factor / schedule.final_div_factor

        def one_cycle(step: int) -> float:
            if step <= peak_at:
                return optim.learning_rate * cosine(step / peak_at if peak_at > 0 else 1.0, low, 1.0)
            return optim.learning_rate * cosine((step - peak_at) / max(num_steps - 1 - peak_at, 1e-9), 1.0, last)

        return one_cycle

    warmup = math.ceil(schedule.warmup_ratio * num_steps)

    def rate(step: int) -> float:
        if step < warmup:
            return optim.learning_rate * step / warmup
        done = (step - warmup) / max(1, num_steps - warmup)
        match schedule:
            case Constant():
                factor = 1.0
            case Linear():
                factor = 1.0 - done
            case Cosine():
                factor = cosine(done, 1.0, schedule.min_ratio)
            case Wsd():
                decay = max(1, round(schedule.decay_ratio * num_steps))
                gone = step - (num_steps - decay)
                factor = 1.0 if gone < 0 else cosine(gone / decay, 1.0, schedule.min_ratio)
            case _:
                raise AssertionError(schedule)
        return optim.learning_rate * factor

    return rate
