"""The plan's memory: what a worker holds under each way of spreading a model, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

from danlu.plan import Plan, make_plan
from danlu.spec.train import TrainJob


def plan(folder: Path, parallel: dict[str, Any], *, workers: int = 2, precision: str = "bf16", gpus: int = 0) -> Plan:
    job = TrainJob.model_validate(
        {
            "name": "plan",
            "model": {"model_name_or_path": str(folder)},
            "data": {"train": "unused.csv"},
            "parallel": parallel,
            "workers": {"num_workers": workers, "gpus_per_worker": gpus},
            "precision": precision,
            "global_batch_size": 16,
            "micro_batch_size": 4,
        }
    )
    return make_plan(job, folder, num_rows=100, mean_tokens=10.0, num_labels=3, calibrate=False)


def counted(folder: Path) -> tuple[int, int]:
    """All weights of a three-label classifier, and those of its embeddings."""
    model = AutoModel.from_pretrained(folder)
    return sum(p.numel() for p in model.parameters()) + 33 * 3, sum(p.numel() for p in model.embeddings.parameters())


@pytest.mark.parametrize(
    ("parallel", "weights", "gradients", "optimizer"),
    [
        ({"kind": "ddp"}, 4.0, 4.0, 8.0),
        ({"kind": "deepspeed", "zero_stage": 1}, 2.0, 2.0, 6.0),
        ({"kind": "deepspeed", "zero_stage": 2}, 2.0, 1.0, 6.0),
        ({"kind": "deepspeed", "zero_stage": 3}, 1.0, 1.0, 6.0),
        ({"kind": "fsdp", "reshard_after_forward": False}, 4.0, 2.0, 4.0),
    ],
)
def test_bytes_of_a_weight_on_each_of_two_workers_in_bf16(
    tiny_model: Path, parallel: dict[str, Any], weights: float, gradients: float, optimizer: float
) -> None:
    number, _ = counted(tiny_model)
    found = plan(tiny_model, parallel)
    assert (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes) == (weights * number, gradients * number, optimizer * number)
    assert found.worker_bytes == found.weight_bytes + found.gradient_bytes + found.optimizer_bytes + found.activation_bytes


def test_fsdp_gathers_the_embeddings_and_a_layer_at_a_time(tiny_model: Path) -> None:
    number, embeddings = counted(tiny_model)
    assert plan(tiny_model, {"kind": "fsdp"}, precision="fp32").weight_bytes == pytest.approx(
        4 * number / 2 + 4 * (embeddings + (number - embeddings) / 2), abs=4
    )


def test_what_is_offloaded_is_not_in_the_gpus_memory(tiny_model: Path) -> None:
    number, _ = counted(tiny_model)
    offloaded = plan(tiny_model, {"kind": "fsdp", "cpu_offload": True}, gpus=1)
    assert offloaded.offloaded_bytes == (4 + 4 + 8) * number / 2
    assert offloaded.worker_bytes == plan(tiny_model, {"kind": "fsdp"}, gpus=1).worker_bytes - offloaded.offloaded_bytes
    zero3 = {"kind": "deepspeed", "zero_stage": 3, "offload_param": "nvme", "offload_optimizer": "cpu", "nvme_path": "/mnt/nvme"}
    assert plan(tiny_model, zero3, gpus=1).offloaded_bytes == (12 + 2) * number / 2
    assert plan(tiny_model, zero3, gpus=1).offloaded_to == "host memory and /mnt/nvme"
    # A worker without a GPU computes in host memory: nothing is gained.
    assert plan(tiny_model, {"kind": "fsdp", "cpu_offload": True}).offloaded_bytes == 0


def test_split_matrices_and_whole_embeddings(tiny_model: Path) -> None:
    number, embeddings = counted(tiny_model)
    held = embeddings + (number - embeddings) // 2
    found = plan(tiny_model, {"kind": "tensor"})
    assert (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes) == (4 * held, 4 * held, 8 * held)
