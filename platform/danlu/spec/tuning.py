"""Which weights are trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import NonNegativeInt, PositiveFloat, PositiveInt, Spec

OpenFraction = Annotated[float, Field(gt=0, lt=1)]
TargetModules = Annotated[list[str], Field(min_length=1)]


class Full(Spec):
    """Every weight is trained."""

    kind: Literal["full"] = "full"

    freeze_embeddings: bool = False
    """Keep the input embeddings as they were: for a small encoder that is half the weights to communicate and to update."""


class Freeze(Spec):
    """The last layers are trained, and all that stands behind them: final norm, pooler, head. What is before them stays."""

    kind: Literal["freeze"] = "freeze"

    num_trainable_layers: PositiveInt = 2
    """How many of the model's last layers are trained. An output layer that shares its weights with the embeddings stays frozen."""


class LowRank(Spec):
    """What every kind of LoRA has."""

    r: PositiveInt = 16
    lora_alpha: PositiveFloat = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: TargetModules | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter, or `all-linear`. The task's head is always trained whole."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r (https://arxiv.org/abs/2312.03732): a higher rank keeps learning."""
    use_dora: bool = False
    """Train each weight's length apart from its direction (https://arxiv.org/abs/2402.09353)."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+ (https://arxiv.org/abs/2402.12354): the B matrices learn at so many times the A matrices' rate; the paper's choice is 16."""


class Lora(LowRank):
    """Low-rank adapters on frozen weights (https://arxiv.org/abs/2106.09685); names are PEFT's."""

    kind: Literal["lora"] = "lora"
    init_lora_weights: Literal["default", "gaussian", "pissa", "pissa_niter_16", "olora"] = "default"
    """`default`: A random, B zero. `pissa` takes the largest singular directions out of the frozen weights into the adapter
    (https://arxiv.org/abs/2404.02948; `pissa_niter_16` finds them by a faster approximation), `olora` those of a QR decomposition
    (https://arxiv.org/abs/2406.01775). What is stored is an adapter of twice the rank for the untouched weights."""

    @property
    def moves_base(self) -> bool:
        """True if starting changes the frozen weights."""
        return self.init_lora_weights not in ("default", "gaussian")

    @model_validator(mode="after")
    def _dora_starts_from_the_pretrained_weights(self) -> Self:
        if self.use_dora and self.moves_base:
            raise ValueError(
                f"use_dora=true does not go with init_lora_weights={self.init_lora_weights}: lengths would be those of weights that "
                "the adapter was taken out of; use init_lora_weights=default, or use_dora=false"
            )
        return self


class Qlora(LowRank):
    """LoRA on a base that is held in 4 or 8 bits by bitsandbytes (https://arxiv.org/abs/2305.14314).

    The bundle is the adapter: it is scored, and loaded again, on the same quantized base. It is never merged into quantized weights.
    """

    kind: Literal["qlora"] = "qlora"
    bits: Literal[4, 8] = 4
    """4: each weight is one of 16 values. 8: LLM.int8 (https://arxiv.org/abs/2208.07339)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Which 16 values: those of a normal distribution, or 4-bit floats."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too: 0.4 bits a weight less."""

    @model_validator(mode="after")
    def _four_bit_fields_are_for_four_bits(self) -> Self:
        if self.bits == 8:
            for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}={value} has no effect with bits=8; leave it out, or use bits=4")
        return self


class Adalora(Spec):
    """LoRA whose rank moves to where it matters while it trains (https://arxiv.org/abs/2303.10512); names are PEFT's."""

    kind: Literal["adalora"] = "adalora"
    init_r: PositiveInt = 12
    """Rank every module starts with."""
    target_r: PositiveInt = 8
    """Rank the modules have at the end, on average."""
    lora_alpha: PositiveFloat = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: TargetModules | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter, or `all-linear`. The task's head is always trained whole."""
    tinit: NonNegativeInt = 0
    """Steps before the first rank is taken away."""
    tfinal: NonNegativeInt = 0
    """Steps at the end in which the ranks stay."""
    deltaT: PositiveInt = 1
    """Steps from one allocation to the next."""
    beta1: OpenFraction = 0.85
    """Smoothing of a weight's importance."""
    beta2: OpenFraction = 0.85
    """Smoothing of how uncertain that is."""
    orth_reg_weight: Annotated[float, Field(ge=0)] = 0.5
    """How strongly the directions of a module are kept at right angles; added to the loss that is trained, not to the one shown."""

    @model_validator(mode="after")
    def _ranks_shrink(self) -> Self:
        if self.target_r >= self.init_r:
            raise ValueError(f"target_r={self.target_r} is not below init_r={self.init_r}: there is no rank to move; lora has a fixed one")
        return self


class Ia3(Spec):
    """A factor for each of some activations (https://arxiv.org/abs/2205.05638): the fewest numbers to train; names are PEFT's.

    A rate ten times LoRA's is usual, and weight decay is not applied: it would pull the factors from one to zero.
    """

    kind: Literal["ia3"] = "ia3"
    target_modules: TargetModules | None = None
    """Names of the linear layers whose outputs get factors. Unset: keys, values and the feed-forward's second layer, as in the paper."""
    feedforward_modules: list[str] | None = None
    """Which of them get factors on their inputs instead. Unset, with target_modules unset: the feed-forward's second layer."""

    @model_validator(mode="after")
    def _feedforward_modules_are_targets(self) -> Self:
        if other := sorted(set(self.feedforward_modules or ()) - set(self.target_modules or ())):
            raise ValueError(f"feedforward_modules names {other}, which target_modules does not; name them in both")
        return self


class Adapter(Spec):
    """Small layers behind the frozen ones (https://arxiv.org/abs/1902.00751).

    They cannot be merged: the bundle is these layers, put behind the pretrained ones again whenever it is loaded.
    """

    kind: Literal["adapter"] = "adapter"
    bottleneck_size: PositiveInt = 64
    """Width of the inner layer."""
    non_linearity: Literal["relu", "gelu", "silu"] = "relu"
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """`houlsby`: behind every layer's attention and feed-forward; `pfeiffer` (https://arxiv.org/abs/2005.00247): behind the latter only."""


class VirtualTokens(Spec):
    """What every kind of prompt learning has. Rows are padded instead of packed, and the prompt counts as part of each."""

    num_virtual_tokens: PositiveInt = 20
    """Length of what is learned, in tokens."""


class Prompt(VirtualTokens):
    """Embeddings in front of every row (https://arxiv.org/abs/2104.08691)."""

    kind: Literal["prompt"] = "prompt"
    prompt_tuning_init: Literal["sample_vocab", "random"] = "sample_vocab"
    """Start as the embeddings of tokens drawn from the vocabulary, which the paper finds better, or as random numbers."""


class PTuning(VirtualTokens):
    """Embeddings in front of every row, made by a small network while training (https://arxiv.org/abs/2103.10385)."""

    kind: Literal["p_tuning"] = "p_tuning"
    encoder_hidden_size: PositiveInt = 128
    """Width of that network."""


class Prefix(VirtualTokens):
    """Keys and values in front of every row's, in each layer (https://arxiv.org/abs/2101.00190)."""

    kind: Literal["prefix"] = "prefix"


Tuning = Annotated[Full | Freeze | Lora | Qlora | Adalora | Ia3 | Adapter | Prompt | PTuning | Prefix, Field(discriminator="kind")]


def is_merged(tuning: Tuning) -> bool:
    """True if a bundle's weights are full-precision ones in the model's own shape once it is loaded."""
    return not isinstance(tuning, Qlora | Adapter | VirtualTokens)
