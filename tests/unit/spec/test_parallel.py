"""What cannot be spread as asked is refused, with the reason and what would work."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from danlu.spec.parallel import Parallel
from danlu.spec.train import TrainJob

PARALLEL: TypeAdapter[Any] = TypeAdapter(Parallel)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"zero_stage": 2, "offload_param": "cpu"}, "offload_param=cpu needs zero_stage=3.*offload_optimizer=cpu works"),
        (
            {"zero_stage": 2, "offload_optimizer": "nvme", "nvme_path": "/mnt"},
            "offload_optimizer=nvme needs zero_stage=3.*has no code that swaps",
        ),
        ({"zero_stage": 1, "offload_optimizer": "nvme"}, "offload_optimizer=nvme needs zero_stage=3"),
        ({"zero_stage": 3, "offload_optimizer": "nvme"}, "needs nvme_path"),
        ({"zero_stage": 3, "offload_param": "nvme"}, "needs nvme_path"),
        ({"zero_stage": 3, "offload_param": "cpu", "nvme_path": "/mnt"}, "nvme_path=/mnt has no effect"),
        ({"zero_stage": 3, "cpu_offload": True}, "cpu_offload"),
    ],
)
def test_an_offload_that_the_stage_cannot_do_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        PARALLEL.validate_python({"kind": "deepspeed", **fields})


def job(**fields: Any) -> TrainJob:
    base = {"name": "spread", "model": {"model_name_or_path": "m"}, "data": {"train": "t.csv"}, "parallel": {"kind": "tensor"}}
    return TrainJob.model_validate({**base, "workers": {"num_workers": 4}, "global_batch_size": 16, "micro_batch_size": 4, **fields})


def test_groups_of_workers_share_the_batch() -> None:
    assert (job().num_models, job().accumulation_steps) == (2, 2)
    assert (job(parallel={"kind": "fsdp"}).num_models, job(parallel={"kind": "fsdp"}).accumulation_steps) == (4, 1)


def test_workers_that_do_not_make_whole_groups_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"num_workers=3 is not a multiple of parallel.tensor_parallel_size=2; nearest that works: 2"):
        job(workers={"num_workers": 3})


def test_a_batch_that_the_groups_cannot_share_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"4 x 4 / 2 = 8; nearest that works: 24"):
        job(global_batch_size=21)


def test_only_whole_models_frozen_ones_and_lora_are_taken_apart() -> None:
    for kind in ("tensor", "pipeline"):
        for tuning in ("freeze", "lora"):
            assert job(tuning={"kind": tuning}, parallel={"kind": kind}, micro_batch_size=1).tuning.kind == tuning
        with pytest.raises(ValidationError, match=r"full, freeze or lora, not of ia3; parallel.kind=fsdp takes it"):
            job(tuning={"kind": "ia3"}, parallel={"kind": kind}, micro_batch_size=1)
    for parallel in ({"kind": "tensor"}, {"kind": "pipeline", "tensor_parallel_size": 2}):
        with pytest.raises(ValidationError, match=r"use_dora=true measures whole rows"):
            job(tuning={"kind": "lora", "use_dora": True}, parallel=parallel, micro_batch_size=1, workers={"num_workers": 4})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"parallel": {"kind": "pipeline", "tensor_parallel_size": 3}},
            "not a multiple of parallel.pipeline_parallel_size=2 x parallel.tensor_parallel_size=3 = 6; nearest that works: 6",
        ),
        (
            {"parallel": {"kind": "pipeline", "pipeline_parallel_size": 4}, "micro_batch_size": 8},
            "1f1b needs at least as many passes a step as there are stages, 4; .* makes 2",
        ),
        (
            {"parallel": {"kind": "pipeline", "schedule": {"kind": "interleaved_1f1b"}}, "global_batch_size": 40},
            r"interleaved_1f1b goes round 2 times for 5 passes a step.*a multiple of pipeline_parallel_size=2 works",
        ),
        (
            {"parallel": {"kind": "pipeline", "pipeline_parallel_size": 4, "zero_stage": 1}, "micro_batch_size": 1},
            "zero_stage=1 has no effect: workers.num_workers=4 are one group.*num_workers=8",
        ),
        ({"parallel": {"kind": "ddp", "context_parallel_size": 2}}, "context_parallel_size .* task.kind=classification reads whole rows"),
        (
            {"parallel": {"kind": "ddp", "context_parallel_size": 2}, "task": {"kind": "pretrain", "objective": {"kind": "masked"}}},
            "context_parallel_size .* task.kind=pretrain with task.objective.kind=masked reads whole rows",
        ),
        *(
            (
                {"parallel": {"kind": kind}, "task": {"kind": "seq2seq"}},
                f"parallel.kind={kind} .* task.kind=seq2seq trains an encoder's and",
            )
            for kind in ("tensor", "pipeline")
        ),
        (
            {"parallel": {"kind": "ddp", "context_parallel_size": 2}, "task": {"kind": "pretrain"}, "tuning": {"kind": "prefix"}},
            "tuning.kind=prefix pads them; use tuning.kind=lora",
        ),
        ({"parallel": {"kind": "pipeline"}, "optim": {"ema_decay": 0.9}, "micro_batch_size": 1}, "ema_decay averages whole weights"),
        ({"parallel": {"kind": "pipeline"}, "optim": {"optimizer": {"kind": "lion"}}, "micro_batch_size": 1}, "lion is bitsandbytes'"),
    ],
)
def test_what_a_model_taken_apart_cannot_do_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        job(**fields)
