"""Offloading to NVMe is checked before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.errors import ResourceError
from danlu.sdk import check_machine
from danlu.spec.parallel import DeepSpeed
from danlu.spec.train import TrainJob
from danlu.train.strategies.deepspeed import check_nvme, deepspeed_config
from danlu.train.strategy import Setup

CPU = torch.device("cpu")


def async_io_can_be_built() -> bool:
    import deepspeed  # noqa: F401
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False))


def spec(path: Path) -> DeepSpeed:
    return DeepSpeed(zero_stage=3, offload_optimizer="nvme", nvme_path=str(path))


def test_a_machine_without_libaio_is_told_what_to_install_before_a_worker_starts(tmp_path: Path) -> None:
    if async_io_can_be_built():
        pytest.skip("this machine has libaio's headers")
    job = TrainJob.model_validate(
        {"name": "nvme", "model": {"model_name_or_path": "m"}, "data": {"train": "t"}, "parallel": spec(tmp_path).model_dump()}
    )
    with pytest.raises(ResourceError, match="async_io op, which cannot be built here") as raised:
        check_machine(job)
    assert "apt install libaio-dev" in raised.value.fix


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    if not async_io_can_be_built():
        pytest.skip("this machine lacks libaio's headers, which is said first")
    with pytest.raises(ResourceError, match="not a folder"):
        check_nvme(spec(tmp_path / "missing"), CPU)


def test_only_what_is_offloaded_stands_in_deepspeeds_configuration(tmp_path: Path) -> None:
    from danlu.spec.train import Optim

    zero = deepspeed_config(spec(tmp_path), Setup(Optim(), [], 4, False, CPU, 0, 2))["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": False, "nvme_path": str(tmp_path)}
    assert "offload_param" not in zero
