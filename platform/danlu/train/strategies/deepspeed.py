"""DeepSpeed ZeRO 1, 2 and 3: optimizer state, gradients and parameters sharded over the workers."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from danlu.errors import ResourceError
from danlu.spec.parallel import DeepSpeed
from danlu.train.optim import make_optimizer, set_learning_rate
from danlu.train.precision import SMALLEST, LossScale
from danlu.train.strategies.group import ensure_process_group
from danlu.train.strategies.nvme import SwapFolder, check_folder
from danlu.train.strategies.swapped import SwappedState, check_room, forget_gradients, reserve
from danlu.train.strategies.universal import TAG, converted, num_writers
from danlu.train.strategy import OneByOne, Setup, State

if TYPE_CHECKING:
    from danlu.train.adalora import RankAllocator


def deepspeed_config(spec: DeepSpeed, setup: Setup, *, largest_shard: int = 0) -> dict[str, Any]:
    """The DeepSpeed configuration. Accumulation stays 1 there: the loop says which pass is the last. `largest_shard` is the number of a
    worker's elements of the largest weight."""
    return {
        "train_micro_batch_size_per_gpu": setup.micro_batch_size,
        "train_batch_size": setup.micro_batch_size * setup.world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": setup.optim.max_grad_norm or 0.0,
        "bf16": {"enabled": setup.dtype == torch.bfloat16},
        "fp16": _fp16(setup),
        "zero_optimization": {
            "stage": spec.zero_stage,
            # Overlap needs a second stream, which a CPU does not have.
            "overlap_comm": setup.device.type == "cuda",
            "contiguous_gradients": True,
            # Each weight by itself: the least memory for swapping, and one without a gradient keeps its value, as in PyTorch.
            **({"sub_group_size": 1} if spec.uses_nvme else {}),
            # DeepSpeed 0.19's prefetch from NVMe takes a weight that is used twice for two and fails.
            **({"stage3_prefetch_bucket_size": 0} if spec.offload_param == "nvme" else {}),
            **_offload(spec, largest_shard, pin_memory=setup.device.type == "cuda"),
        },
        # Optimizers that update each number by itself are right on a shard; the spec refuses the one that does not.
        "zero_allow_untested_optimizer": True,
        # Its own CPU Adam takes minutes to compile; torch's fused one is vectorised and threaded as well.
        "zero_force_ds_cpu_optimizer": False,
        # The loop gives it exactly the step's own numbers; DeepSpeed's own prints would break the progress line.
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _fp16(setup: Setup) -> dict[str, Any]:
    """Its own dynamic loss scale, by the numbers of ours."""
    if setup.loss_scale is None:
        return {"enabled": False}
    power = round(math.log2(setup.loss_scale.scale))
    growth = setup.loss_scale.growth_interval
    return {"enabled": True, "initial_scale_power": power, "loss_scale_window": growth, "hysteresis": 1, "min_loss_scale": SMALLEST}


def _offload(spec: DeepSpeed, largest_shard: int, *, pin_memory: bool) -> dict[str, Any]:
    places = {"offload_optimizer": spec.offload_optimizer, "offload_param": spec.offload_param}
    found: dict[str, Any] = {}
    for name, device in places.items():
        if device != "none":
            found[name] = {"device": device, "pin_memory": pin_memory}
        if device == "nvme":
            found[name] |= {"nvme_path": spec.nvme_path}
    if spec.offload_param == "nvme":
        # Else it would take 5 x 0.1 billion elements for buffers, and swap nothing of a model of less than a billion.
        found["offload_param"] |= {"buffer_size": largest_shard, "max_in_cpu": 0}
    return found


def check_nvme(spec: DeepSpeed, device: torch.device) -> None:
    """ResourceError if this machine cannot offload to NVMe as `spec` asks."""
    if not spec.uses_nvme:
        return
    _import_deepspeed(device)
    if missing := _missing_async_io():
        raise ResourceError(
            f"offloading to nvme needs DeepSpeed's async_io op: {missing}",
            where="parallel.offload_param" if spec.offload_param == "nvme" else "parallel.offload_optimizer",
            fix="apt install g++ libaio-dev (yum: gcc-c++ libaio-devel) on every worker, an image of ops/docker, or offload to cpu",
        )
    assert spec.nvme_path is not None
    check_folder(spec.nvme_path)


def _missing_async_io() -> str | None:
    """Why DeepSpeed could not load this op; None if it came compiled for this accelerator, as an image's does, or can be compiled here."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from torch.utils.cpp_extension import is_ninja_available

    ours: str = get_accelerator()._name
    is_compiled = installed_ops.get("async_io")
    if is_compiled and accelerator_name == ours:
        return None
    came = f"it came compiled for {accelerator_name}, not for {ours}" if is_compiled else "it did not come compiled"
    compiler = os.environ.get("CXX", "c++").partition(" ")[0]  # as PyTorch, which compiles it
    if shutil.which(compiler) is None:
        return f"{came}, and cannot be compiled here without a C++ compiler ({compiler})"
    if not is_ninja_available():
        return f"{came}, and cannot be compiled here without ninja, which is not on the PATH"
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return f"{came}, and cannot be compiled here without libaio's library and headers"
    return None


class DeepSpeedStrategy(OneByOne):
    """bf16 and fp16 hold weights in it with float32 masters in the optimizer."""

    def __init__(self, spec: DeepSpeed) -> None:
        self.spec = spec

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        check_nvme(self.spec, setup.device)
        deepspeed = _import_deepspeed(setup.device)
        _join_process_group(deepspeed, setup)
        self.setup = setup
        if self.spec.nvme_path is not None:
            self.swap = SwapFolder(self.spec.nvme_path, setup.rank)
            self.spec = self.spec.model_copy(update={"nvme_path": str(self.swap.path)})
            check_room(self.spec, model, setup, self.swap.path)
        largest_shard = max(-(-weight.numel() // setup.world_size) for weight in model.parameters())
        with _swapped_in_its_own_type():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(setup.param_groups, setup.optim),
                config=deepspeed_config(self.spec, setup, largest_shard=largest_shard),
                dist_init_required=False,
            )
        if self.spec.uses_nvme:
            reserve(self.optimizer, model, setup)
        self.last = True
        prepared: nn.Module = self.engine
        self.model = prepared
        return prepared

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.last = last
        self.engine.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.engine.step()  # counts the pass; changes no weight

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.optimizer.param_groups, learning_rate)
        gradients = self._adapter_gradients()
        self.engine.step()
        if self.spec.offload_optimizer == "nvme":
            forget_gradients(self.optimizer)
        grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        if self.setup.loss_scale is not None:
            self._follow(self.setup.loss_scale)
            grad_norm = grad_norm if self.engine.was_step_applied() else math.inf
        if self.setup.allocator is not None and math.isfinite(grad_norm):
            self._allocate(self.setup.allocator, gradients, grad_norm)
        return grad_norm

    def _follow(self, loss_scale: LossScale) -> None:
        """Say of DeepSpeed's scale what there is to say; it is in DeepSpeed's own checkpoint."""
        loss_scale.scale, loss_scale.skipped_steps = float(self.optimizer.loss_scale), int(self.engine.skipped_steps)

    def _adapter_gradients(self) -> list[torch.Tensor]:
        """Whole gradients of what the allocator weighs: after the step they are gone."""
        if self.setup.allocator is None:
            return []
        from deepspeed.utils import safe_get_full_grad

        return [safe_get_full_grad(parameter).clone() for parameter in self.setup.allocator.parameters]

    def _allocate(self, allocator: RankAllocator, gradients: list[torch.Tensor], grad_norm: float) -> None:
        """Let the allocator see updated weights with the gradients that updated them, and put its zeros into the float32 masters."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        limit = self.setup.optim.max_grad_norm
        clip = 1.0 if limit is None else min(1.0, limit / (grad_norm + 1e-6))
        for parameter, gradient in zip(allocator.parameters, gradients, strict=True):
            parameter.grad = (gradient * clip).to(parameter.dtype)
        allocator.update()
        for parameter in allocator.parameters:
            parameter.grad = None
        for value in allocator.values.values():
            master = safe_get_full_fp32_param(value).clone()
            safe_set_full_fp32_param(value, master.masked_fill_(value.detach() == 0, 0.0))

    def state(self) -> State:
        state = DeepSpeedState(self)
        return SwappedState(self.engine, self.optimizer, self.setup, state.weights) if self.spec.uses_nvme else state


class DeepSpeedState:
    """Every rank writes its shard; whole weights are gathered from the float32 masters."""

    def __init__(self, strategy: DeepSpeedStrategy) -> None:
        self.engine, self.optimizer, self.setup = strategy.engine, strategy.optimizer, strategy.setup

    def save(self, folder: Path) -> None:
        """Collective; what could not be written is raised after the last collective."""
        with _errors_at_the_end(self.engine):
            self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        if num_writers(folder / TAG) == self.setup.world_size:
            self._load(folder)
            return
        with converted(folder / TAG, self.setup) as universal:
            # What a group's parameters share follows from the job. Stage 3 gives all groups that of the first, and one tensor as their
            # number of steps, which would then count once for every group.
            groups = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
            self.engine._config.load_universal_checkpoint = True
            try:
                self._load(universal)
            finally:
                self.engine._config.load_universal_checkpoint = False
            for group, its in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(its)
            for state in self.engine.basic_optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()

    def _load(self, folder: Path) -> None:
        # Frozen weights are not in the checkpoint: they are the pretrained ones, which the model was built with. Scales of an 8-bit base
        # are, and bitsandbytes refuses them where ZeRO-3 holds its weights.
        module = self.engine.module
        own = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
        own |= {name for name, _ in module.named_buffers(remove_duplicate=False)}

        def load(src: Mapping[str, torch.Tensor], dst: nn.Module) -> None:
            dst.load_state_dict({name: tensor for name, tensor in src.items() if name in own}, strict=False)

        self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False, custom_load_fn=load)

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        whole: dict[str, torch.Tensor] = {}
        for name, parameter in self.engine.module.named_parameters():
            if name not in names:
                continue
            if parameter.requires_grad:
                self._keep(whole, name, safe_get_full_fp32_param(parameter))
            else:
                with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    self._keep(whole, name, parameter)
        for name, buffer in self.engine.module.named_buffers():
            if name in names:
                self._keep(whole, name, buffer)
        return whole

    def _keep(self, whole: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
        if self.setup.rank == 0:
            whole[name] = tensor.detach().float().cpu().clone()


@contextmanager
def _errors_at_the_end(engine: Any) -> Iterator[None]:
    """Let DeepSpeed's save go on from a write that fails, and raise after it.

    Between and behind the writes are barriers and gathers: a rank that left early would let the others wait there for the group's timeout.
    """
    errors: list[Exception] = []

    def kept(write: Callable[..., None]) -> Callable[..., None]:
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  # raised below
                errors.append(error)

        return attempt

    writer = engine.checkpoint_engine
    writer.save, engine._copy_recovery_script = kept(writer.save), kept(engine._copy_recovery_script)
    try:
        yield
    except OSError as error:  # the copy of what is offloaded to NVMe; this is what DeepSpeed does after it
        errors.append(error)
        if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
            engine.optimizer.checkpoint_event_epilogue()
        dist.barrier()
    finally:
        del writer.save, engine._copy_recovery_script  # the classes' own again
    if errors:
        raise errors[0]


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # Else its shared-memory collectives are compiled now: for minutes, by a compiler that a pod may not have, and measured on two
        # workers they are no faster than gloo's. What is built into an image (DS_BUILD_SHM_COMM=1) is used.
        from deepspeed.git_version_info import installed_ops

        deepspeed.ops.__compatible_ops__ = dict(installed_ops)
    return deepspeed


@contextmanager
def _swapped_in_its_own_type() -> Iterator[None]:
    """DeepSpeed 0.19 swaps parameters as bfloat16 wherever there is no float16, a CPU for one, whatever their type: `Init._set_dtype` says
    `dtype or torch.float16 if fp16 else bfloat16` and means `dtype or (...)`."""
    from deepspeed.runtime.zero.partition_parameters import Init

    kept = Init._set_dtype

    def set_dtype(self: Any, ds_config: Any, dtype: torch.dtype | None) -> None:
        kept(self, ds_config, dtype)
        self.dtype = dtype or self.dtype

    Init._set_dtype = set_dtype
    try:
        yield
    finally:
        Init._set_dtype = kept


def _join_process_group(deepspeed: Any, setup: Setup) -> None:
    """DeepSpeed needs a process group even for one process, and its own handle on it."""
    backend = ensure_process_group(setup)
    # DeepSpeed reads these, whatever started the process group.
    for name, value in {"RANK": setup.rank, "WORLD_SIZE": setup.world_size, "LOCAL_RANK": setup.device.index or 0}.items():
        os.environ.setdefault(name, str(value))
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)
