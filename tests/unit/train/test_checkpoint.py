"""A checkpoint is whole or not there; damage is found; nothing that was saved is lost."""

from __future__ import annotations

import errno
import math
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from danlu.errors import CheckpointError, StorageError
from danlu.train.checkpoint import MANIFEST, Checkpoints, Progress, after_eval, improved
from danlu.train.run import EventRecord, LocalRun


class Numbers:
    """A state of one tensor."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def save(self, folder: Path) -> None:
        torch.save(torch.full((1000,), self.value), folder / "numbers.pt")

    def load(self, folder: Path) -> None:
        self.value = float(torch.load(folder / "numbers.pt")[0])

    def weights(self, names: object) -> dict[str, torch.Tensor]:
        return {}


@pytest.fixture
def uri(any_storage: str) -> str:
    return f"{any_storage}/checkpoints"


def checkpoints(uri: str, run: LocalRun | None = None, shape: str = "ddp") -> Checkpoints:
    return Checkpoints(run or LocalRun(torch.device("cpu")), uri, shape=shape, keep=2)


def test_the_newest_one_is_restored_and_old_ones_are_dropped(uri: str) -> None:
    ours = checkpoints(uri)
    for step in (10, 20, 30):
        ours.save(Progress(step=step, best_step=10, best_value=0.5), Numbers(float(step)).save)
    assert ours.steps() == [30, 20]
    state = Numbers()
    assert checkpoints(uri).restore(state) == Progress(step=30, best_step=10, best_value=0.5)
    assert state.value == 30.0


def test_without_any_there_is_nothing_to_restore(uri: str) -> None:
    assert checkpoints(uri).restore(Numbers()) is None


def test_one_without_a_manifest_is_never_read(uri: str) -> None:
    ours = checkpoints(uri)
    ours.save(Progress(step=10), Numbers(10.0).save)
    ours.save(Progress(step=20), Numbers(20.0).save)
    ours.filesystem.rm_file(str(ours._folder(20) / MANIFEST))
    state = Numbers()
    restored = checkpoints(uri).restore(state)
    assert restored is not None
    assert (restored.step, state.value) == (10, 10.0)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_one_falls_back_to_the_one_before_and_says_so(damage: str, tmp_path: Path) -> None:
    ours = checkpoints(str(tmp_path))
    ours.save(Progress(step=10), Numbers(10.0).save)
    ours.save(Progress(step=20), Numbers(20.0).save)
    file = tmp_path / "step-000020" / "numbers.pt"
    contents = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(contents[:100])
        case "changed":
            file.write_bytes(contents[:500] + bytes([contents[500] ^ 1]) + contents[501:])
        case "missing":
            file.unlink()
    run, state = LocalRun(torch.device("cpu")), Numbers()
    restored = checkpoints(str(tmp_path), run).restore(state)
    assert restored is not None
    assert (restored.step, state.value) == (10, 10.0)
    (event,) = run.records
    assert isinstance(event, EventRecord)
    assert event.event == "checkpoint damaged"
    assert "numbers.pt" in event.detail


def test_a_full_disk_is_one_clear_error_and_the_one_before_stays(tmp_path: Path) -> None:
    ours = checkpoints(str(tmp_path))
    ours.save(Progress(step=10), Numbers(10.0).save)

    def full(folder: Path) -> None:
        (folder / "part").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"step 20 could not be saved.*No space left.*step 10 is whole") as raised:
        ours.save(Progress(step=20), full)
    assert "free some space" in str(raised.value)
    assert not (tmp_path / "step-000020").exists()
    assert checkpoints(str(tmp_path)).restore(Numbers()) == Progress(step=10)


def test_a_really_full_disk_is_the_same_error() -> None:
    """/dev/full fails each write with ENOSPC, inside torch.save."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ours = checkpoints(folder)
        with pytest.raises(StorageError, match="could not be saved"):
            ours.save(Progress(step=1), lambda _: torch.save(torch.zeros(10**6), "/dev/full"))
        assert ours.steps() == []


class TwoRanks(LocalRun):
    """One rank of two, whose other one agrees."""

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.agreements = getattr(self, "agreements", 0) + 1
        return tensor


def test_weights_that_safetensors_cannot_write_are_the_same_error(tmp_path: Path) -> None:
    """Its errors are of its own kind. A limit on files, since it would put its file in the place of /dev/full."""
    ours, before = checkpoints(str(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(StorageError, match="step 1 could not be saved: ") as raised:
            ours.save(Progress(step=1), lambda folder: save_file({"numbers": torch.zeros(10**5)}, folder / "model.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(raised.value.__cause__, SafetensorError)
    assert ours.steps() == []


def test_a_mistake_of_ours_is_shown_as_it_is_after_the_others_were_told(tmp_path: Path) -> None:
    run = TwoRanks(torch.device("cpu"))

    def wrong(folder: Path) -> None:
        run.agreements = 0
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        checkpoints(str(tmp_path), run).save(Progress(step=1), wrong)
    assert run.agreements == 1
    assert not (tmp_path / "step-000001").exists()


def test_a_manifest_that_cannot_be_written_is_the_same_error(tmp_path: Path) -> None:
    ours = checkpoints(str(tmp_path))
    ours.save(Progress(step=1), Numbers(1.0).save)

    def obstructing(folder: Path) -> None:
        Numbers(2.0).save(folder)
        (folder.parent / f".{MANIFEST}").mkdir()

    with pytest.raises(StorageError, match=r"step 2 could not be saved: .*step 1 is whole"):
        ours.save(Progress(step=2), obstructing)
    assert ours.steps() == [1]
    assert not (tmp_path / "step-000002").exists()


def test_another_shape_is_refused_with_both_named(tmp_path: Path) -> None:
    checkpoints(str(tmp_path), shape="deepspeed-zero2").save(Progress(step=5), Numbers().save)
    with pytest.raises(CheckpointError, match="deepspeed-zero2 on 1 workers; this job is ddp on 1") as raised:
        checkpoints(str(tmp_path)).restore(Numbers())
    assert "--fresh" in str(raised.value)


@pytest.mark.parametrize("shape", ["fsdp", "deepspeed-zero3", "deepspeed-zero3-nvme"])
def test_another_number_of_workers_goes_on(shape: str, tmp_path: Path) -> None:
    ours = checkpoints(str(tmp_path), shape=shape)
    ours.save(Progress(step=5), Numbers(5.0).save)
    manifest = tmp_path / "step-000005" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"world_size": 1', '"world_size": 2'))
    assert ours.restore(Numbers()) == Progress(step=5)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_best_is_the_best_number_also_after_one_that_was_none(higher_is_better: bool) -> None:
    progress, kept = Progress(), []
    for step, value in enumerate([math.nan, 0.5, math.nan, 0.6, 0.4], start=1):
        is_best = improved(progress, value, higher_is_better=higher_is_better)
        progress = after_eval(
            Progress(step, 0, progress.best_step, progress.best_value, progress.evals_without_best), value, is_best=is_best
        )
        kept += [step] * is_best
    assert kept == ([1, 2, 4] if higher_is_better else [1, 2, 5])
    assert progress.evals_without_best == (1 if higher_is_better else 0)
