"""The examples for GPUs, planned from the models' own configurations: their sizes, and that a worker's share fits the GPU it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from danlu.plan import make_plan
from danlu.spec.files import load
from danlu.spec.train import TrainJob

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
    assert job.workers.num_workers // job.cluster.workers_per_pod == {"qwen2.5-7b-qlora": 1, "llama-3.1-8b-zero3": 1}.get(name, 4)
