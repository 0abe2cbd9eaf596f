"""How training is spread over workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from danlu.spec.base import Number, PositiveInt, Spec


class Ddp(Spec):
    """Each worker holds the whole model; gradients are averaged."""

    kind: Literal["ddp"] = "ddp"


class DeepSpeed(Spec):
    """DeepSpeed ZeRO: optimizer state (1), gradients too (2), parameters too (3) are sharded over the workers."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Annotated[Literal[1, 2, 3], Number] = 2


Parallel = Annotated[Ddp | DeepSpeed, Field(discriminator="kind")]


class Workers(Spec):
    """How many training workers, and what each one gets."""

    num_workers: PositiveInt = 1
    cpus_per_worker: PositiveInt = 1
    """Cores of one worker; also its number of compute threads."""
    gpus_per_worker: Annotated[Literal[0, 1], Number] = 0
    """A worker drives one GPU or none; several GPUs are several workers."""
