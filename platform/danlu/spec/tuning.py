"""Which weights are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from danlu.spec.base import PositiveFloat, PositiveInt, Spec


class Full(Spec):
    """Every weight is trained."""

    kind: Literal["full"] = "full"

    freeze_embeddings: bool = False
    """Keep the input embeddings as they were: for a small encoder that is half the weights to communicate and to update."""


class Lora(Spec):
    """Low-rank adapters on frozen weights (https://arxiv.org/abs/2106.09685); names are PEFT's."""

    kind: Literal["lora"] = "lora"
    r: PositiveInt = 16
    lora_alpha: PositiveFloat = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter, or `all-linear`. The task's head is always trained whole."""


Tuning = Annotated[Full | Lora, Field(discriminator="kind")]
