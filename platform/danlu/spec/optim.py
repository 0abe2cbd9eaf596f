"""How weights are updated: the optimizer, its learning rate over the steps and over the layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from danlu.spec.base import Fraction, Number, PositiveFloat, Spec


class Linear(Spec):
    """Up to the peak, then down to zero in a straight line."""

    kind: Literal["linear"] = "linear"
    warmup_ratio: Fraction = 0.1


class Cosine(Spec):
    """Up to the peak, then down along half a cosine (https://arxiv.org/abs/1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup_ratio: Fraction = 0.1
    min_ratio: Fraction = 0.0
    """Where it ends, as a share of the peak."""


class Constant(Spec):
    """Up to the peak, and stay there."""

    kind: Literal["constant"] = "constant"
    warmup_ratio: Fraction = 0.1


class Wsd(Spec):
    """Warm up, stay, decay along a cosine at the end (https://arxiv.org/abs/2404.06395): the stable part can be gone on with."""

    kind: Literal["wsd"] = "wsd"
    warmup_ratio: Fraction = 0.1
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps that decay; with warmup_ratio at most 1."""
    min_ratio: Fraction = 0.0


class OneCycle(Spec):
    """Up and down along cosines (https://arxiv.org/abs/1708.07120), from peak / div_factor to peak / div_factor / final_div_factor."""

    kind: Literal["one_cycle"] = "one_cycle"
    warmup_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3
    div_factor: Annotated[float, Field(ge=1)] = 25.0
    final_div_factor: Annotated[float, Field(ge=1)] = 1e4


Schedule = Annotated[Linear | Cosine | Constant | Wsd | OneCycle, Field(discriminator="kind")]


class AdamW(Spec):
    """AdamW (https://arxiv.org/abs/1711.05101), torch's fused one."""

    kind: Literal["adamw"] = "adamw"
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: PositiveFloat = 1e-8


class BnbAdamW(Spec):
    """bitsandbytes' AdamW: its state in 8 bits by blocks (https://arxiv.org/abs/2110.02861), or in pages that a full GPU can put aside."""

    kind: Literal["bnb_adamw"] = "bnb_adamw"
    bits: Annotated[Literal[8, 32], Number] = 8
    paged: bool = False
    """Needs a GPU: on a CPU there is nothing to page to."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: PositiveFloat = 1e-8


class Lion(Spec):
    """Lion (https://arxiv.org/abs/2302.06675), through bitsandbytes: one state, at about a third of AdamW's learning rate."""

    kind: Literal["lion"] = "lion"
    bits: Annotated[Literal[8, 32], Number] = 32
    lion_beta1: Fraction = 0.9
    lion_beta2: Fraction = 0.99


class Adafactor(Spec):
    """Adafactor (https://arxiv.org/abs/1804.04235), torch's: the second moment as a row and a column, no first moment."""

    kind: Literal["adafactor"] = "adafactor"
    beta2_decay: Annotated[float, Field(le=0)] = -0.8
    clip_threshold: PositiveFloat = 1.0
    """Bound on the root mean square of an update (d in the paper)."""


Optimizer = Annotated[AdamW | BnbAdamW | Lion | Adafactor, Field(discriminator="kind")]


class Optim(Spec):
    """The optimizer and what it is given."""

    optimizer: Optimizer = AdamW()
    learning_rate: PositiveFloat = 5e-5
    head_learning_rate_multiplier: PositiveFloat = 1.0
    """The task's head starts from nothing: a larger rate there saves steps. Language models and embeddings have no head of their own."""
    layer_learning_rate_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer below the top learns this much slower than the one above it, the embeddings slowest (https://arxiv.org/abs/2003.10555)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Applied to matrices, not to biases and norms."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm to this; null does not clip."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Score and store a running average of the weights, which keeps this share of itself at each step; unset: the weights themselves."""
    schedule: Schedule = Linear()
