"""A disk that is full while saving is one StorageError on every worker, at once; the checkpoint before stays whole and is gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Told, on_ranks

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
    "fsdp": {"kind": "fsdp"},
    "tensor": {"kind": "tensor", "tensor_parallel_size": 2},
    "pipeline": {"kind": "pipeline"},
}
CASES = [*((name, 1) for name in STRATEGIES if name != "ddp"), ("ddp", 0), ("zero2", 0), ("fsdp", 0)]
"""Every worker writes its shards; the first one also what belongs to all of them, and under DDP everything."""
WITH_BEST = ["ddp", "zero3"]


@pytest.fixture(scope="module")
def outcomes(tiny_model: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What two ranks raised, and what happened when each job was started again with the disk free; all in one pair of processes."""
    folder = tmp_path_factory.mktemp("full-disk")
    cases: dict[str, dict[str, Any]] = {}
    for name, rank, kind in [(*case, "checkpoint") for case in CASES] + [(name, 0, "best") for name in WITH_BEST]:
        shape = {"parallel": STRATEGIES[name], "workers": {"num_workers": 2}, "max_steps": 3, "checkpoint": {"save_steps": 1}}
        shape |= {"evaluation": {"eval_steps": 2 if kind == "best" else 3}, "run_uri": str(folder / f"{name}-{rank}-{kind}")}
        cases[f"{name}-{rank}-{kind}"] = shape | {"full_disk_on": rank}
        cases[f"{name}-{rank}-{kind}-again"] = shape
    return on_ranks(2, cases, folder, model=tiny_model, train_file=topic_files["train"])


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_a_worker_whose_disk_is_full_ends_the_save_of_all(name: str, rank: int, outcomes: Told) -> None:
    assert_told_and_resumed(outcomes, f"{name}-{rank}-checkpoint", rank)


@pytest.mark.parametrize("name", WITH_BEST)
def test_a_disk_that_is_full_for_the_best_weights_ends_it_too(name: str, outcomes: Told) -> None:
    assert_told_and_resumed(outcomes, f"{name}-0-best", 0)


def assert_told_and_resumed(outcomes: Told, case: str, rank: int) -> None:
    raised = outcomes.errors[case]
    for text, seconds in raised:
        assert "the checkpoint of step 2 could not be saved: " in text
        assert "try: free some space" in text
        assert seconds < 30
    told = "there is no earlier one" if case.endswith("best") else "the checkpoint of step 1 is whole"
    assert all(told in text for text, _ in raised)
    assert "another worker failed" in raised[1 - rank][0] or "too large" in raised[1 - rank][0].lower()
    assert "another worker failed" not in raised[rank][0]
    events = outcomes.events[f"{case}-again"]
    assert ["resumed", "from the checkpoint of step 1"] in events
    assert events[-1] == ["checkpoint", "step 3"]
