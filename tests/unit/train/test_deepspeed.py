"""What is kept on NVMe: checked before anything starts, in a folder that goes, and saved so that any number of workers can read it."""

from __future__ import annotations

import os
import subprocess
import sys
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
from danlu.train.strategies.nvme import SwapFolder, check_folder, check_free, check_whole
from danlu.train.strategies.swapped import Saved
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
    with pytest.raises(ResourceError, match=r"async_io op: it did not come compiled, .* without libaio's library and headers") as raised:
        check_machine(job)
    assert raised.value.where == "parallel.offload_param"
    assert "apt install g++ libaio-dev" in raised.value.fix


@pytest.mark.usefixtures("libaio")
@pytest.mark.parametrize("libaio", [True], indirect=True)
def test_a_machine_without_what_compiles_the_op_is_told_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("CXX", "our-c++ -m64")
    with pytest.raises(ResourceError, match=r"without a C\+\+ compiler \(our-c\+\+\)"):
        check_nvme(spec(tmp_path), CPU)
    program(tools / "our-c++")
    with pytest.raises(ResourceError, match="without ninja"):
        check_nvme(spec(tmp_path), CPU)
    program(tools / "ninja")
    check_nvme(spec(tmp_path), CPU)


def test_an_op_that_came_with_deepspeed_needs_nothing_to_compile_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("deepspeed.git_version_info.installed_ops", {"async_io": 1, "pin_memory": 1})
    monkeypatch.setattr("deepspeed.git_version_info.accelerator_name", "cpu")
    check_nvme(spec(tmp_path), CPU)
    monkeypatch.setattr("deepspeed.git_version_info.accelerator_name", "cuda")  # the gpu image's, where there is none
    with pytest.raises(ResourceError, match="compiled for cuda, not for cpu, and cannot be compiled here"):
        check_nvme(spec(tmp_path), CPU)


def program(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


@pytest.mark.usefixtures("libaio")
@pytest.mark.parametrize("libaio", [True], indirect=True)
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"missing does not exist; it has to be a folder") as raised:
        check_nvme(spec(tmp_path / "missing"), CPU)
    assert raised.value.where == "parallel.nvme_path"
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="file is a file"):
        check_nvme(spec(tmp_path / "file"), CPU)


def test_memory_is_no_drive() -> None:
    if not os.path.isdir("/sys"):
        pytest.skip("needs a folder that takes no files")
    with pytest.raises(ResourceError, match=r"cannot be written to|does not take direct writes"):
        check_folder("/sys")


def test_a_full_drive_is_said_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"GiB free; what the workers keep there takes 1048576.0 GiB"):
        check_free(str(tmp_path), 1 << 50)


def test_a_swap_file_that_a_full_drive_has_cut_short_or_left_a_hole_in_is_no_whole_one(tmp_path: Path) -> None:
    """DeepSpeed does not look at what its writes return; threads write a file's parts, so that its length alone does not tell."""
    file = tmp_path / "1.tensor.swp"
    file.write_bytes(b"x" * (1 << 16))
    check_whole(file, 1 << 16)
    with pytest.raises(OSError, match="No space left"):
        check_whole(file, (1 << 16) + 1)
    with file.open("wb") as parts:
        parts.write(b"x" * (1 << 14))
        parts.seek(3 << 14)
        parts.write(b"x" * (1 << 14))
    assert file.stat().st_size == 1 << 16
    with pytest.raises(OSError, match="No space left"):
        check_whole(file, 1 << 16)


def test_a_swap_folder_goes_with_its_owner_and_after_a_kill_with_the_next_one(tmp_path: Path) -> None:
    ours = SwapFolder(str(tmp_path), 0)
    code = f"""
import os, signal
from danlu.train.strategies.nvme import SwapFolder
folder = SwapFolder({str(tmp_path)!r}, 1)
(folder.path / "moments").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (killed,) = tmp_path.glob("danlu-swap-rank1-*/moments")
    third = SwapFolder(str(tmp_path), 1)
    assert not killed.exists()
    assert ours.path.exists()  # its owner lives
    del third
    ours.remove()
    assert not list(tmp_path.glob("danlu-swap-*"))


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_any_number_of_workers_reads_the_shards_that_three_wrote(readers: int, tmp_path: Path) -> None:
    """10 elements: 4, 4 and 2 on three workers, as ZeRO-3 cuts them."""
    whole = torch.arange(10.0)
    for rank, part in enumerate(whole.split(4)):
        torch.save({"w": {"weight": part, "exp_avg": part + 100, "step": torch.tensor(7.0)}}, tmp_path / f"shard-{rank:05d}-00000.pt")
    found = []
    for part in whole.split(-(-10 // readers)):
        values = Saved(tmp_path, 3).read("w", 10, int(part[0]), int(part[-1]) + 1)
        assert values["step"] == 7
        torch.testing.assert_close(values["exp_avg"], part + 100)
        found.append(values["weight"])
    torch.testing.assert_close(torch.cat(found), whole)


def test_only_what_is_offloaded_stands_in_deepspeeds_configuration(tmp_path: Path) -> None:
    zero = deepspeed_config(spec(tmp_path), Setup(Optim(), [], 4, torch.float32, CPU, 0, 2))["zero_optimization"]
    assert zero["offload_param"] == {"device": "nvme", "pin_memory": False, "nvme_path": str(tmp_path), "buffer_size": 0, "max_in_cpu": 0}
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
