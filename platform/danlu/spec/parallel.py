"""How training is spread over workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from danlu.spec.base import PositiveInt, Spec


class Ddp(Spec):
    """Each worker holds the whole model; gradients are averaged."""

    kind: Literal["ddp"] = "ddp"


class DeepSpeed(Spec):
    """DeepSpeed ZeRO: optimizer state (1), gradients too (2), parameters too (3) are sharded over the workers."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[1, 2, 3] = 2


class Fsdp(Spec):
    """FSDP2: parameters, gradients and optimizer state are sharded over the workers, layer by layer, and gathered where they are used."""

    kind: Literal["fsdp"] = "fsdp"
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward and gather them again for its backward: less memory, half again as much traffic."""
    cpu_offload: bool = False
    """Keep the shards and the optimizer's step in host memory; a layer's weights are on the GPU only while they are used."""


Parallel = Annotated[Ddp | DeepSpeed | Fsdp, Field(discriminator="kind")]


class Workers(Spec):
    """How many training workers, and what each one gets."""

    num_workers: PositiveInt = 1
    cpus_per_worker: PositiveInt = 1
    """Cores of one worker; also its number of compute threads."""
    gpus_per_worker: Literal[0, 1] = 0
    """A worker drives one GPU or none; several GPUs are several workers."""
