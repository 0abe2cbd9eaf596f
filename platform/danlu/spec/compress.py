"""What is made smaller before serving, and how much quality that may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from danlu.spec.base import PositiveFloat, Spec


class Int8(Spec):
    """int8 weights and per-token int8 activations for encoders on CPU: a row's answer never depends on its neighbours."""

    kind: Literal["int8"] = "int8"


class BnbInt8(Spec):
    """bitsandbytes LLM.int8 (https://arxiv.org/abs/2208.07339)."""

    kind: Literal["bnb_int8"] = "bnb_int8"


class BnbNf4(Spec):
    """bitsandbytes 4-bit NormalFloat (https://arxiv.org/abs/2305.14314)."""

    kind: Literal["bnb_nf4"] = "bnb_nf4"
    double_quant: bool = True
    """Quantize the quantization constants too: 0.4 bits a weight less."""


Quantization = Annotated[Int8 | BnbInt8 | BnbNf4, Field(discriminator="kind")]


class Compress(Spec):
    """A quantized version of the trained bundle, kept only if it stays within the budget."""

    quantization: Quantization = Int8()

    max_quality_drop: Annotated[float, Field(ge=0, le=1)] = 0.005
    """How far the task's main metric may fall below the original's, as a difference of fractions."""

    min_speedup: PositiveFloat = 1.0
    """Least throughput ratio to the original that makes it worth keeping."""
