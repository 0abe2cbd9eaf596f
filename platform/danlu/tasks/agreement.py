"""How far what is served may be from what was evaluated: numbers of language models, in nats."""

from __future__ import annotations

from dataclasses import dataclass

from danlu.artifact.bundle import BundleMeta
from danlu.spec.tuning import Qlora


@dataclass(frozen=True)
class Tolerance:
    """Both are relative where the number itself is above 1."""

    loss: float
    """Of a text's mean loss a token."""
    logprob: float
    """Of one token's log probability; where the most probable token is less than twice as much ahead, the second may come."""


EXACT = Tolerance(loss=1e-3, logprob=2e-3)
"""float32 on both sides: kernels differ between CPUs and batch shapes."""

ROUNDED = Tolerance(loss=3e-2, logprob=0.2)
"""bf16, or weights in fewer bits: the evaluation computes in bf16 over float32 weights where the engine's weights are bf16 too."""


def tolerance(meta: BundleMeta, *, served_in_fp32: bool) -> Tolerance:
    """What a bundle's evaluation and the engine that serves it leave room for."""
    exact = meta.precision == "fp32" and meta.quantization is None and not isinstance(meta.tuning, Qlora)
    return EXACT if exact and served_in_fp32 else ROUNDED


def change(found: float, expected: float) -> float:
    """Their difference, relative where the expected number is above 1."""
    return abs(found - expected) / max(1.0, abs(expected))
