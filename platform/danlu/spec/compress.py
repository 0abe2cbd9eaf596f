"""What is made smaller before serving, and how much quality that may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from danlu.spec.base import Number, PositiveFloat, Spec


class Int8(Spec):
    """int8 weights, a scale for each output. Of an encoder on CPU also activations, a scale for each token, so that a row's answer never
    depends on its neighbours; of a language model weights alone."""

    kind: Literal["int8"] = "int8"


class Int4(Spec):
    """Weights of 4 bits, for language models; the head has 8."""

    kind: Literal["int4"] = "int4"
    group_size: Annotated[Literal[32, 64, 128], Number] = 32
    """Inputs that share a scale: fewer are nearer to the original, and half a bit a weight (32) instead of an eighth (128)."""


class BnbInt8(Spec):
    """bitsandbytes LLM.int8 (https://arxiv.org/abs/2208.07339), of an encoder or a language model: for GPUs, and slow on a CPU."""

    kind: Literal["bnb_int8"] = "bnb_int8"


class BnbNf4(Spec):
    """bitsandbytes 4-bit NormalFloat (https://arxiv.org/abs/2305.14314), of an encoder or a language model, whose head and embeddings stay
    whole: for GPUs. On a CPU `int4` is the faster one."""

    kind: Literal["bnb_nf4"] = "bnb_nf4"
    double_quant: bool = True
    """Quantize the quantization constants too: 0.4 bits a weight less."""


Quantization = Annotated[Int8 | Int4 | BnbInt8 | BnbNf4, Field(discriminator="kind")]


class Compress(Spec):
    """A quantized version of the trained bundle, kept only if it stays within the budget."""

    quantization: Quantization = Int8()

    max_quality_drop: Annotated[float, Field(ge=0, le=1)] = 0.005
    """How far the task's main metric may fall below the original's, as a difference of fractions; how far a loss may rise, in nats."""

    min_speedup: PositiveFloat = 1.0
    """Least throughput ratio to the original that makes it worth keeping: of an encoder rows a second, of a language model the tokens that
    one answer makes a second."""
