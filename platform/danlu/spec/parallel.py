"""How training is spread over workers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import Number, PositiveInt, Spec


class _Parallel(Spec):
    @property
    def workers_per_model(self) -> int:
        """Workers that compute one model's forward together, on the same rows."""
        return 1


class Ddp(_Parallel):
    """Each worker holds the whole model; gradients are averaged."""

    kind: Literal["ddp"] = "ddp"


class DeepSpeed(_Parallel):
    """DeepSpeed ZeRO: optimizer state (1), gradients too (2), parameters too (3) are sharded over the workers."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Annotated[Literal[1, 2, 3], Number] = 2
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep the optimizer's state and its step in host memory. Not on NVMe: DeepSpeed's checkpoints then leave out what was not swapped."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Keep parameters that are not being used in host memory or on NVMe; zero_stage 3 only, which is the one that shards them."""
    nvme_path: Annotated[str, Field(min_length=1)] | None = None
    """A folder on every worker's NVMe drive; needed by `nvme`, and DeepSpeed's async_io op with it."""

    @property
    def uses_nvme(self) -> bool:
        """True if something is offloaded to `nvme_path`."""
        return self.offload_param == "nvme"

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> Self:
        if self.zero_stage < 3 and self.offload_param != "none":
            raise ValueError(
                f"offload_param={self.offload_param} needs zero_stage=3: zero_stage={self.zero_stage} does not shard parameters; "
                "offload_optimizer=cpu works with it"
            )
        if self.uses_nvme and self.nvme_path is None:
            raise ValueError("offloading to nvme needs nvme_path, a folder on each worker's NVMe drive")
        if not self.uses_nvme and self.nvme_path is not None:
            raise ValueError(f"nvme_path={self.nvme_path} has no effect: offload_param is not nvme; leave it out")
        return self


class Fsdp(_Parallel):
    """FSDP2: parameters, gradients and optimizer state are sharded over the workers, layer by layer, and gathered where they are used."""

    kind: Literal["fsdp"] = "fsdp"
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward and gather them again for its backward: less memory, half again as much traffic."""
    cpu_offload: bool = False
    """Keep the shards and the optimizer's step in host memory; a layer's weights are on the GPU only while they are used."""


class Tensor(_Parallel):
    """Tensor parallelism: the matrices of each layer are split over groups of workers; the groups are data parallel.

    It communicates in every layer: the workers of a group belong on one machine, with NVLink between them.
    """

    kind: Literal["tensor"] = "tensor"
    tensor_parallel_size: Annotated[int, Field(ge=2)] = 2
    """Workers of a group; workers.num_workers is a multiple of it."""

    @property
    def workers_per_model(self) -> int:
        """Workers that compute one model's forward together, on the same rows."""
        return self.tensor_parallel_size


Parallel = Annotated[Ddp | DeepSpeed | Fsdp | Tensor, Field(discriminator="kind")]


class Workers(Spec):
    """How many training workers, and what each one gets."""

    num_workers: PositiveInt = 1
    cpus_per_worker: PositiveInt = 1
    """Cores of one worker; also its number of compute threads."""
    gpus_per_worker: Annotated[Literal[0, 1], Number] = 0
    """A worker drives one GPU or none; several GPUs are several workers."""
