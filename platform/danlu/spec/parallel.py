"""How training is spread over workers."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import Number, PositiveInt, Spec


class _Parallel(Spec):
    @property
    def model_sizes(self) -> dict[str, int]:
        """The fields that say how many workers compute one model's forward together, on the same rows."""
        return {}

    @property
    def workers_per_model(self) -> int:
        """Workers that compute one model's forward together, on the same rows."""
        return math.prod(self.model_sizes.values())


class _DataParallel(_Parallel):
    context_parallel_size: PositiveInt = 1
    """Workers that share the tokens of a pass, for rows too long for one: each holds its part of them through all layers, and in attention
    all of them for its part of the heads (https://arxiv.org/abs/2309.14509). Decoders only; the heads are a multiple of it."""

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"context_parallel_size": self.context_parallel_size} if self.context_parallel_size > 1 else {}


class Ddp(_DataParallel):
    """Each worker holds the whole model; gradients are averaged."""

    kind: Literal["ddp"] = "ddp"


class DeepSpeed(_DataParallel):
    """DeepSpeed ZeRO: optimizer state (1), gradients too (2), parameters too (3) are sharded over the workers."""

    kind: Literal["deepspeed"] = "deepspeed"
    zero_stage: Annotated[Literal[1, 2, 3], Number] = 2
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Keep the optimizer's state in host memory, or, with zero_stage 3, on NVMe; its step is then the CPU's. On NVMe a weight's state is in
    memory only while the weight is updated; what is under 1 MiB on a worker stays in memory."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Keep parameters that are not being used in host memory or on NVMe; zero_stage 3 only, which is the one that shards them."""
    nvme_path: Annotated[str, Field(min_length=1)] | None = None
    """A folder on every worker's NVMe drive; needed by `nvme`, and DeepSpeed's async_io op with it."""

    @property
    def uses_nvme(self) -> bool:
        """True if something is offloaded to `nvme_path`."""
        return "nvme" in (self.offload_optimizer, self.offload_param)

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> Self:
        if self.zero_stage < 3 and self.offload_param != "none":
            raise ValueError(
                f"offload_param={self.offload_param} needs zero_stage=3: zero_stage={self.zero_stage} does not shard parameters; "
                "offload_optimizer=cpu works with it"
            )
        if self.zero_stage < 3 and self.offload_optimizer == "nvme":
            raise ValueError(
                f"offload_optimizer=nvme needs zero_stage=3: DeepSpeed's zero_stage={self.zero_stage} has no code that swaps and would "
                "keep all of it in host memory; offload_optimizer=cpu says so"
            )
        if self.uses_nvme and self.nvme_path is None:
            raise ValueError("offloading to nvme needs nvme_path, a folder on each worker's NVMe drive")
        if not self.uses_nvme and self.nvme_path is not None:
            raise ValueError(f"nvme_path={self.nvme_path} has no effect: neither offload_optimizer nor offload_param is nvme; leave it out")
        return self


class Fsdp(_DataParallel):
    """FSDP2: parameters, gradients and optimizer state are sharded over the workers, layer by layer, and gathered where they are used."""

    kind: Literal["fsdp"] = "fsdp"
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward and gather them again for its backward: less memory, half again as much traffic."""
    cpu_offload: bool = False
    """Keep the shards and the optimizer's step in host memory; a layer's weights are on the GPU only while they are used."""


class _ModelParallel(_Parallel):
    zero_stage: Annotated[Literal[0, 1], Number] = 0
    """1: each of the workers that hold the same part of the model, one in every group, keeps and updates a share of its optimizer state."""


class Tensor(_ModelParallel):
    """Tensor parallelism: the matrices of each layer are split over groups of workers; the groups are data parallel.

    It communicates in every layer: the workers of a group belong on one machine, with NVLink between them.
    """

    kind: Literal["tensor"] = "tensor"
    tensor_parallel_size: Annotated[int, Field(ge=2)] = 2
    """Workers of a group; workers.num_workers is a multiple of it."""

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"tensor_parallel_size": self.tensor_parallel_size}


class GPipe(Spec):
    """All passes forward, then all backward (https://arxiv.org/abs/1811.06965): the activations of all of them are held."""

    kind: Literal["gpipe"] = "gpipe"


class OneFOneB(Spec):
    """A backward follows each forward as soon as it can (https://arxiv.org/abs/2006.09503): fewer passes are held."""

    kind: Literal["1f1b"] = "1f1b"


class Interleaved1F1B(Spec):
    """1F1B with several shorter stages on each worker (https://arxiv.org/abs/2104.04473): less waiting, more traffic."""

    kind: Literal["interleaved_1f1b"] = "interleaved_1f1b"
    stages_per_worker: Annotated[int, Field(ge=2)] = 2


class Pipeline(_ModelParallel):
    """Pipeline parallelism: the layers are cut into stages, one after the other on the workers of a group; the groups are data parallel.

    Only hidden states travel, between neighbours, so the workers of a group may be on several machines.
    """

    kind: Literal["pipeline"] = "pipeline"
    pipeline_parallel_size: Annotated[int, Field(ge=2)] = 2
    """Workers that the layers are cut over."""
    tensor_parallel_size: PositiveInt = 1
    """Workers that the matrices of each stage are split over besides."""
    schedule: Annotated[GPipe | OneFOneB | Interleaved1F1B, Field(discriminator="kind")] = OneFOneB()

    @property
    def model_sizes(self) -> dict[str, int]:
        split = {"tensor_parallel_size": self.tensor_parallel_size} if self.tensor_parallel_size > 1 else {}
        return {"pipeline_parallel_size": self.pipeline_parallel_size} | split

    @property
    def num_stages(self) -> int:
        """Stages that the layers are cut into."""
        each = self.schedule.stages_per_worker if isinstance(self.schedule, Interleaved1F1B) else 1
        return self.pipeline_parallel_size * each

    def layers_of_stages(self, num_layers: int) -> list[range]:
        """Each stage's layers; the first stages get what is left over, since the last has the head to compute. ValueError if too few."""
        if num_layers < self.num_stages:
            raise ValueError(f"{num_layers} layers cannot be cut into {self.num_stages} stages; at most {num_layers} work")
        each, more = divmod(num_layers, self.num_stages)
        starts = [stage * each + min(stage, more) for stage in range(self.num_stages + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(starts)]

    def check_passes(self, passes: int) -> None:
        """ValueError if the schedule cannot run so many passes (accumulation steps of one group)."""
        size = self.pipeline_parallel_size
        match self.schedule:
            case OneFOneB() if passes < size:
                raise ValueError(
                    f"parallel.schedule.kind=1f1b needs at least as many passes a step as there are stages, {size}; "
                    f"global_batch_size / micro_batch_size / groups makes {passes}"
                )
            case Interleaved1F1B() if passes % (rounds := max(1, passes // size)):
                raise ValueError(
                    f"parallel.schedule.kind=interleaved_1f1b goes round {rounds} times for {passes} passes a step, no whole number each; "
                    f"a multiple of pipeline_parallel_size={size} works"
                )
            case _:
                pass


Parallel = Annotated[Ddp | DeepSpeed | Fsdp | Tensor | Pipeline, Field(discriminator="kind")]


class Workers(Spec):
    """How many training workers, and what each one gets."""

    num_workers: PositiveInt = 1
    cpus_per_worker: PositiveInt = 1
    """Cores of one worker; also its number of compute threads."""
    gpus_per_worker: Annotated[Literal[0, 1], Number] = 0
    """A worker drives one GPU or none; several GPUs are several workers."""
