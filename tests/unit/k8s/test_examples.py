"""The examples for GPUs, planned from the models' own configurations: their sizes, and that a worker's share fits the GPU it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from danlu.k8s.rayservice import ray_service
from danlu.plan import make_plan
from danlu.serve.engines.vllm.command import command
from danlu.spec.cluster import in_bytes
from danlu.spec.files import load
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob
from danlu.spec.vllm import Vllm

EXAMPLES = Path(__file__).parents[3] / "k8s" / "examples"
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "num_key_value_heads": 8}
MODELS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "qwen2.5-7b-qlora": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7_615_616_512,
        24,
        512,
    ),
    "llama-3.1-8b-zero3": (
        LLAMA | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
        8_030_261_248,
        80,
        2000,
    ),
    "llama-3.3-70b-lora": (
        LLAMA | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
        70_553_706_496,
        80,
        2000,
    ),
}
"""Configuration, the number of parameters that its authors give, gigabytes of the GPU, tokens of a row."""


@pytest.mark.parametrize("name", MODELS)
def test_a_workers_share_of_an_example_fits_its_gpu(name: str, tmp_path: Path) -> None:
    config, num_parameters, gpu_gb, mean_tokens = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    job = load(TrainJob, EXAMPLES / f"{name}.yaml")
    plan = make_plan(job, tmp_path, num_rows=10_000, mean_tokens=mean_tokens, num_labels=0, calibrate=False)
    assert plan.num_parameters == num_parameters
    assert plan.worker_bytes < 0.92 * gpu_gb * 10**9, plan.text(job)
    assert plan.num_steps == -(-10_000 // job.global_batch_size)
    assert job.cluster is not None
    if job.parallel.kind == "tensor":
        assert job.parallel.workers_per_model == job.cluster.workers_per_pod, "a layer is shared inside a node only"
        assert [config["num_attention_heads"] % 8, config["num_key_value_heads"] % 8] == [0, 0]
    assert job.workers.num_workers // job.cluster.workers_per_pod == {"qwen2.5-7b-qlora": 1, "llama-3.1-8b-zero3": 1}.get(name, 4)


def test_workers_of_the_job_on_cpus_fit_their_pods(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 with a pooler and eight labels."""
    sizes = {"vocab_size": 30_522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], **sizes}))
    job = load(TrainJob, EXAMPLES / "reuters-r8-cluster.yaml")
    plan = make_plan(job, tmp_path, num_rows=5485, mean_tokens=30, num_labels=8, calibrate=False)
    assert plan.num_parameters == 22_713_216 + 384 * 8 + 8
    assert plan.num_steps == -(-5485 // job.global_batch_size)
    assert job.cluster is not None
    assert plan.worker_bytes * job.cluster.workers_per_pod < 0.92 * in_bytes(job.cluster.memory), plan.text(job)


def test_the_service_on_vllm_has_three_adapters_and_none_to_eight_gpus(tmp_path: Path) -> None:
    service = load(Service, EXAMPLES / "assistant-vllm-service.yaml")
    engine = service.engine
    assert isinstance(engine, Vllm)
    assert len(engine.adapters) == 3 <= engine.max_loras
    (workers,) = ray_service(service)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 8)
    (pod,) = workers["template"]["spec"]["containers"]
    assert int(pod["resources"]["limits"]["nvidia.com/gpu"]) == engine.num_gpus == 1
    said = command(engine, "python", tmp_path, tmp_path / "s", dtype=engine.dtype)
    assert {"--enable-lora", "--max-loras=4", "--max-lora-rank=32", "--tensor-parallel-size=1", "--dtype=bfloat16"} <= set(said)
    # Its weights leave room for the cache: 28 layers with 4 key-value heads of 128 numbers, in 2 bytes.
    num_parameters, gpu_gb = MODELS["qwen2.5-7b-qlora"][1:3]
    left = engine.gpu_memory_utilization * gpu_gb * 1e9 - 2 * num_parameters
    assert engine.max_model_len is not None
    assert left > 4 * engine.max_model_len * 2 * 28 * 4 * 128 * 2, "four of the longest conversations"
