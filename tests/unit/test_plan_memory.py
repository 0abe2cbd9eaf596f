"""The plan's memory: what a worker holds under each way of spreading a model, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_tiny_model
from transformers import AutoConfig, AutoModel

from danlu.errors import SpecError
from danlu.plan import Plan, make_plan
from danlu.spec.train import TrainJob


def plan(
    folder: Path, parallel: dict[str, Any], *, workers: int = 2, precision: str = "bf16", gpus: int = 0, task: dict[str, Any] | None = None
) -> Plan:
    job = TrainJob.model_validate(
        {
            "name": "plan",
            "model": {"model_name_or_path": str(folder), "max_length": 32},
            "data": {"train": "unused.csv"},
            "parallel": parallel,
            "task": task or {"kind": "classification"},
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


def test_of_what_is_on_nvme_memory_keeps_the_buffers_and_the_small_shards(tmp_path: Path) -> None:
    """The word embeddings are large enough to be swapped by two workers, nothing else is."""
    folder = write_tiny_model(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = 16_385
    config.save_pretrained(folder)
    swapped = 16_385 * 32
    zero3 = {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/mnt/nvme"}
    found = plan(folder, zero3, precision="fp32")
    # A copy of the weight and two moments; on the drive its gradient too.
    assert found.nvme_bytes == pytest.approx(16 * swapped / 2, abs=4)
    assert found.offloaded_bytes == 0  # the four buffers take what a single swapped weight frees
    assert plan(folder, zero3, precision="fp32", gpus=1).offloaded_bytes == found.optimizer_bytes
    assert plan(folder, zero3, precision="fp32", workers=4).nvme_bytes == 0


def test_split_matrices_and_whole_embeddings(tiny_model: Path) -> None:
    number, embeddings = counted(tiny_model)
    held = embeddings + (number - embeddings) // 2
    found = plan(tiny_model, {"kind": "tensor"})
    assert (found.weight_bytes, found.gradient_bytes, found.optimizer_bytes) == (4 * held, 4 * held, 8 * held)
    shared = plan(tiny_model, {"kind": "tensor", "zero_stage": 1}, workers=4)
    assert (shared.weight_bytes, shared.optimizer_bytes) == (4 * held, 8 * held // 2)


def test_the_fullest_stage_is_what_a_pipeline_has_to_hold(tiny_model: Path, tiny_decoder: Path) -> None:
    encoder, decoder = AutoModel.from_pretrained(tiny_model), AutoModel.from_pretrained(tiny_decoder)
    layer = sum(p.numel() for p in encoder.encoder.layer[0].parameters())
    embeddings = sum(p.numel() for p in encoder.embeddings.parameters())
    last = layer + sum(p.numel() for p in encoder.pooler.parameters()) + 33 * 3
    assert plan(tiny_model, {"kind": "pipeline"}).weight_bytes == 4 * max(layer + embeddings, last)
    # Tied: the last stage holds the embeddings as well.
    layer = sum(p.numel() for p in decoder.layers[0].parameters())
    both = layer + decoder.embed_tokens.weight.numel() + decoder.norm.weight.numel()
    found = plan(tiny_decoder, {"kind": "pipeline", "zero_stage": 1}, workers=4, task={"kind": "pretrain"})
    assert (found.weight_bytes, found.optimizer_bytes) == (4 * both, 8 * both // 2)


def test_what_is_held_between_passes_follows_the_schedule(tiny_model: Path, tiny_decoder: Path) -> None:
    one = plan(tiny_model, {"kind": "pipeline"}).activation_bytes
    assert one == plan(tiny_model, {"kind": "ddp"}).activation_bytes
    assert plan(tiny_model, {"kind": "pipeline", "schedule": {"kind": "gpipe"}}).activation_bytes == 2 * one  # four passes, two workers
    with pytest.raises(SpecError, match="2 layers cannot be cut into 4 stages"):
        plan(tiny_model, {"kind": "pipeline", "schedule": {"kind": "interleaved_1f1b"}})
    shared = plan(tiny_decoder, {"kind": "fsdp", "context_parallel_size": 2}, task={"kind": "pretrain"})
    assert shared.activation_bytes == plan(tiny_decoder, {"kind": "fsdp"}, task={"kind": "pretrain"}).activation_bytes // 2
