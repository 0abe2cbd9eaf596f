"""Training whose optimizer state or parameters are on a drive: the losses of the plain loop, whoever goes on from its checkpoints.

Where the async_io op is not built yet, its compilation takes minutes; without libaio's headers all of it is skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model
from ranks import Curve, curve, job_of, on_ranks
from test_parity import plain_curve
from transformers import AutoConfig, BertModel

from danlu.train.run import LocalRun

pytestmark = pytest.mark.soak
PLACES = 5


@pytest.fixture(scope="module")
def async_io() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio's headers: apt install libaio-dev")
    AsyncIOBuilder().load()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of its weights have shards over 1 MiB on each of two workers, no multiple of what DeepSpeed aligns to. The rest is in memory."""
    folder = write_tiny_model(tmp_path_factory.mktemp("large"))
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size, config.max_position_embeddings = 16_385, 16_400
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drive")


@pytest.fixture(scope="module")
def plain(model: Path, topic_files: dict[str, str]) -> Curve:
    return plain_curve(model, topic_files["train"])


@pytest.fixture(scope="module")
def one(
    async_io: None, model: Path, drive: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Curve, Path]:
    """One worker's curve, and where its checkpoint of step 2 is the last one."""
    folder = tmp_path_factory.mktemp("one") / "run"
    found = alone(model, topic_files["train"], drive, folder)
    lose_the_last_checkpoint(folder)
    return found, folder


@pytest.fixture(scope="module")
def two(one: tuple[Curve, Path], model: Path, drive: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("two")
    shape: dict[str, Any] = {"parallel": parallel(drive), "workers": {"num_workers": 2}}
    cases = {
        "passes-1": {**shape, "micro_batch_size": 8},
        "passes-2": {**shape, "micro_batch_size": 4},
        "two-to-two": {**shape, "micro_batch_size": 4, "goes_on_from": "passes-2"},
        "one-to-two": {**shape, "micro_batch_size": 4, "run_uri": str(one[1])},
    }
    return on_ranks(2, cases, folder, model=model, train_file=topic_files["train"]).curves, folder


def test_one_worker_equals_the_plain_loop(one: tuple[Curve, Path], plain: Curve) -> None:
    assert_equal(one[0], plain)


@pytest.mark.parametrize("passes", [1, 2])
def test_two_workers_equal_the_plain_loop(passes: int, two: Any, plain: Curve) -> None:
    assert_equal(two[0][f"passes-{passes}"], plain)


@pytest.mark.parametrize("case", ["two-to-two", "one-to-two"])
def test_two_workers_go_on_from_a_checkpoint(case: str, two: Any, plain: Curve) -> None:
    assert_equal(two[0][case], plain[2:])


def test_one_worker_goes_on_from_the_checkpoint_of_two(
    two: Any, plain: Curve, model: Path, drive: Path, topic_files: dict[str, str]
) -> None:
    folder = two[1] / "out.json.passes-1"
    lose_the_last_checkpoint(folder)
    assert_equal(alone(model, topic_files["train"], drive, folder), plain[2:])


def test_parameters_on_the_drive_too_equal_the_plain_loop(
    async_io: None, plain: Curve, model: Path, drive: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    only, both = {"offload_optimizer": "none"}, {"offload_optimizer": "nvme"}
    shape: dict[str, Any] = {"workers": {"num_workers": 2}, "micro_batch_size": 4}
    cases = {
        name: shape | {"parallel": parallel(drive) | its | {"offload_param": "nvme"}} | more
        for name, its, more in (("only", only, {}), ("both", both, {}), ("resumed", both, {"goes_on_from": "both"}))
    }
    curves = on_ranks(2, cases, tmp_path, model=model, train_file=topic_files["train"]).curves
    assert_equal(curves["only"], plain)
    assert_equal(curves["both"], plain)
    assert_equal(curves["resumed"], plain[2:])


def test_nothing_stays_on_the_drive(two: Any, drive: Path) -> None:
    assert not list(drive.glob("danlu-swap-*"))


def test_all_that_is_swapped_has_its_room_before_the_first_step(async_io: None, drive: Path) -> None:
    """On a full drive DeepSpeed's writes would be lost without an error, so none may go beyond what was taken at the start."""
    from danlu.spec.parallel import DeepSpeed
    from danlu.spec.train import Optim
    from danlu.train.strategies.deepspeed import DeepSpeedStrategy
    from danlu.train.strategies.group import ensure_process_group
    from danlu.train.strategy import Setup

    module = torch.nn.Sequential(torch.nn.Linear(901, 901), torch.nn.Linear(901, 3))
    setup = Setup(Optim(), [{"params": list(module.parameters()), "lr": 0.1}], 4, torch.float32, torch.device("cpu"), 0, 1)
    ensure_process_group(setup)
    strategy = DeepSpeedStrategy(DeepSpeed.model_validate(parallel(drive)))
    strategy.prepare(module, setup)
    before = sizes(drive)
    assert len(before) == 4  # the weight, its gradient, two moments
    with strategy.micro_step(last=True):
        strategy.backward(strategy.model(torch.ones(2, 901)).square().mean())
    strategy.step(0.1)
    assert sizes(drive) == before


@pytest.mark.parametrize("place", ["offload_optimizer", "offload_param"])
def test_what_was_lost_while_deepspeed_began_is_told_before_the_first_step(
    place: str, async_io: None, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take the drive's last bytes between the look at its room and DeepSpeed's first writes."""
    import deepspeed

    from danlu.errors import ResourceError
    from danlu.spec.parallel import DeepSpeed
    from danlu.spec.train import Optim
    from danlu.train.strategies.deepspeed import DeepSpeedStrategy
    from danlu.train.strategies.group import ensure_process_group
    from danlu.train.strategy import Setup

    begin = deepspeed.initialize

    def lose(**named: Any) -> Any:
        begun = begin(**named)
        for file in drive.rglob("*.swp"):
            os.truncate(file, 1 << 10)
        return begun

    module = torch.nn.Sequential(torch.nn.Linear(901, 901), torch.nn.Linear(901, 3))
    setup = Setup(Optim(), [{"params": list(module.parameters()), "lr": 0.1}], 4, torch.float32, torch.device("cpu"), 0, 1)
    ensure_process_group(setup)
    monkeypatch.setattr(deepspeed, "initialize", lose)
    spec = parallel(drive) | {"offload_optimizer": "none", place: "nvme"}
    with pytest.raises(
        ResourceError, match=r"parallel.nvme_path: another process took the drive's space meanwhile; worker 0 on .*No space"
    ):
        DeepSpeedStrategy(DeepSpeed.model_validate(spec)).prepare(module, setup)


def sizes(drive: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_blocks) for path in drive.rglob("*.swp")}


def parallel(drive: Path) -> dict[str, Any]:
    return {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": str(drive)}


def alone(model: Path, train_file: str, drive: Path, folder: Path) -> Curve:
    run = LocalRun(torch.device("cpu"))
    return curve(job_of(str(model), train_file, {"parallel": parallel(drive), "micro_batch_size": 8}), run, run.records, str(folder))


def lose_the_last_checkpoint(folder: Path) -> None:
    manifest = folder / "checkpoints" / "step-000004" / "manifest.json"
    assert json.loads(manifest.read_text())["shape"] == "deepspeed-zero3-nvme"
    manifest.unlink()


def assert_equal(found: list[Any], plain: Curve) -> None:
    assert len(found) == len(plain) > 0
    for ours, theirs in zip(found, plain, strict=True):
        assert [round(abs(a - b), PLACES) for a, b in zip(ours, theirs, strict=True)] == [0, 0], (found, plain)
