"""Offloading to NVMe is checked before anything starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from danlu.errors import CheckpointError, ResourceError
from danlu.sdk import check_machine
from danlu.spec.parallel import DeepSpeed
from danlu.spec.train import Optim, TrainJob
from danlu.train.strategies.deepspeed import check_nvme, deepspeed_config
from danlu.train.strategies.group import ensure_process_group
from danlu.train.strategies.universal import converted
from danlu.train.strategy import Setup

CPU = torch.device("cpu")


@pytest.fixture
def libaio(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with libaio's headers, or without: what DeepSpeed finds is set, what Danlu makes of it is real."""
    import deepspeed  # noqa: F401
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().get_op_builder("AsyncIOBuilder")
    monkeypatch.setattr(builder, "is_compatible", lambda *_, **__: request.param)


def spec(path: Path) -> DeepSpeed:
    return DeepSpeed(zero_stage=3, offload_param="nvme", nvme_path=str(path))


@pytest.mark.usefixtures("libaio")
@pytest.mark.parametrize("libaio", [False], indirect=True)
def test_a_machine_without_libaio_is_told_what_to_install_before_a_worker_starts(tmp_path: Path) -> None:
    job = TrainJob.model_validate(
        {"name": "nvme", "model": {"model_name_or_path": "m"}, "data": {"train": "t"}, "parallel": spec(tmp_path).model_dump()}
    )
    with pytest.raises(ResourceError, match="async_io op, which cannot be built here") as raised:
        check_machine(job)
    assert "apt install libaio-dev" in raised.value.fix


@pytest.mark.usefixtures("libaio")
@pytest.mark.parametrize("libaio", [True], indirect=True)
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="not a folder"):
        check_nvme(spec(tmp_path / "missing"), CPU)


def test_only_what_is_offloaded_stands_in_deepspeeds_configuration(tmp_path: Path) -> None:
    zero = deepspeed_config(spec(tmp_path), Setup(Optim(), [], 4, torch.float32, CPU, 0, 2))["zero_optimization"]
    assert zero["offload_param"] == {"device": "nvme", "pin_memory": False, "nvme_path": str(tmp_path)}
    assert "offload_optimizer" not in zero


def test_shards_that_cannot_be_put_together_are_one_error_and_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(Optim(), [], 4, torch.float32, CPU, 0, 1)
    ensure_process_group(setup)
    shards, temporary = tmp_path / "shards", tmp_path / "temporary"
    shards.mkdir()
    temporary.mkdir()
    for rank in range(2):
        torch.save({"optimizer_state_dict": {}}, shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with (
        pytest.raises(CheckpointError, match="checkpoint of 2 workers could not be put together for 1") as raised,
        converted(shards, setup),
    ):
        pass
    assert "workers.num_workers=2" in raised.value.fix
    assert not list(temporary.iterdir())
