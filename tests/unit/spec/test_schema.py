"""The JSON Schema and pydantic: the same documents, the same verdicts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from jsonschema import Draft7Validator
from pydantic import BaseModel, ValidationError

from danlu.spec import cluster, compress, data, model, optim, parallel, serve, task, train, tuning, yaml12
from danlu.spec.base import Spec
from danlu.spec.files import dump, parse
from danlu.spec.schema import schema
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

Document = dict[str, Any]
ROOT = Path(__file__).parents[3]
VALIDATORS = {kind: Draft7Validator(schema(kind)) for kind in (TrainJob, Service)}

JOB: Document = {"name": "topics", "model": {"model_name_or_path": "m"}, "data": {"train": "t.csv"}}
SERVICE: Document = {"name": "topics", "bundle": "topics@v1"}

PODS: Document = {
    "image": "registry/danlu:1",
    "image_pull_policy": "Always",
    "image_pull_secrets": ["registry"],
    "namespace": "research",
    "service_account": "danlu",
    "memory": "64Gi",
    "shared_memory": "4Gi",
    "gpu_type": "NVIDIA-A10G",
    "node_selector": {"pool": "a"},
    "tolerations": [{"key": "example.com/team", "value": "a", "effect": "NoSchedule"}],
    "head": {"cpus": 4, "memory": "32Gi", "node_selector": {"pool": "b"}},
    "priority_class": "high",
    "scheduler": {"kind": "kueue", "queue": "research"},
    "env": {"HF_ENDPOINT": "https://hub.example.com"},
    "secret_env": [{"name": "HF_TOKEN", "secret": "hub", "key": "token"}],
    "secret_volumes": [{"secret": "danlu-keys", "mount_path": "/etc/danlu-keys"}],
    "tls": {"ca_secret": "ray-ca"},
    "volumes": [{"claim": "storage", "mount_path": "/data", "read_only": True}],
}
FULL_JOB: Document = {
    "kind": "train",
    "name": "topics",
    "model": {"model_name_or_path": "m", "revision": "main", "max_length": 64, "hidden_dropout": 0.1, "gradient_checkpointing": True},
    "data": {
        "train": ["a.csv", "b.csv"],
        "dev": "dev.csv",
        "test": ["test.csv"],
        "format": "csv",
        "columns": {"text": "a", "text_pair": "b", "label": "c"},
        "dev_size": 0.2,
        "max_rows": 100,
        "streaming": True,
        "cache_dir": "cache",
    },
    "task": {"kind": "classification", "labels": ["a", "b"], "label_smoothing": 0.1},
    "tuning": {"kind": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query", "value"]},
    "parallel": {"kind": "deepspeed", "zero_stage": 3},
    "workers": {"num_workers": 2, "cpus_per_worker": 3, "gpus_per_worker": 1},
    "optim": {
        "learning_rate": 1e-8,
        "head_learning_rate_multiplier": 5,
        "weight_decay": 0,
        "optimizer": {"kind": "adamw", "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6},
        "layer_learning_rate_decay": 0.9,
        "max_grad_norm": None,
        "schedule": {"kind": "cosine", "warmup_ratio": 0.2},
    },
    "evaluation": {"eval_steps": 5, "metric_for_best_model": "loss", "early_stopping_patience": 3, "batch_tokens": 100},
    "checkpoint": {"save_steps": 7, "save_total_limit": 4},
    "precision": "bf16",
    "global_batch_size": 16,
    "micro_batch_size": 4,
    "num_train_epochs": 0.5,
    "max_steps": 9,
    "seed": 0,
    "max_failures": 2,
    "trackers": ["tensorboard", "wandb", "mlflow"],
    "budget_usd": 120.5,
    "storage": "s3://bucket/runs",
    "compress": {"quantization": {"kind": "bnb_nf4", "double_quant": False}, "max_quality_drop": 1, "min_speedup": 1.5},
    "serve": {
        "engine": {
            "kind": "encoder",
            "dtype": "fp32",
            "max_batch_tokens": 9,
            "batch_wait_ms": 1.5,
            "num_threads": 2,
            "num_gpus": 1,
            "step_timeout_s": 5,
        },
        "autoscaling": {
            "min_replicas": 0,
            "max_replicas": 3,
            "target_ongoing_requests": 2.5,
            "upscale_delay_s": 1,
            "downscale_delay_s": 2,
        },
        "limits": {
            "max_ongoing_requests": 1,
            "max_queued_requests": 2,
            "max_inputs": 3,
            "max_body_bytes": 4,
            "request_timeout_s": 5,
            "drain_timeout_s": 6,
        },
        "http": {"host": "0.0.0.0", "port": 0, "haproxy": True, "allowed_origins": ["https://chat.example"]},
        "cluster": {
            **PODS,
            "scheduler": {"kind": "kai", "queue": "research"},
            "replicas_per_pod": 2,
            "spread_over": "kubernetes.io/hostname",
            "upgrade": {
                "kind": "incremental",
                "gateway_class": "istio",
                "step_size_percent": 10,
                "interval_s": 5,
                "max_surge_percent": 50,
            },
            "redis": {"address": "redis:6379", "password_secret": "redis"},
        },
    },
    "cluster": {
        **PODS,
        "workers_per_pod": 2,
        "same_topology": "topology.kubernetes.io/zone",
        "spot": "gke",
        "pre_running_deadline_s": 600,
        "active_deadline_s": 3600,
        "backoff_limit": 2,
        "cleanup": {"kind": "ttl", "ttl_seconds_after_finished": 0},
    },
}
FULL_SERVICE: Document = {
    "kind": "service",
    "name": "topics",
    "bundle": "topics@v1",
    "storage": "elsewhere",
    **FULL_JOB["serve"],
}

GOOD: dict[str, tuple[type[Spec], Document]] = {
    "a small job": (TrainJob, JOB),
    "a whole job": (TrainJob, FULL_JOB),
    "a small service": (Service, SERVICE),
    "a whole service": (Service, FULL_SERVICE),
    "an echo": (Service, {"name": "e", "engine": {"kind": "echo"}}),
    "a slow echo": (Service, {"kind": "service", "name": "e-2", "engine": {"kind": "echo", "labels": ["a"], "latency_ms": 2.5}}),
    "a fake language model": (
        Service,
        {
            "name": "e",
            "engine": {
                "kind": "echo_text",
                "time_to_first_token_ms": 20,
                "time_per_output_token_ms": 5.5,
                "max_model_len": 64,
                "adapters": {"a": "/folder"},
                "allow_runtime_lora_updating": True,
            },
        },
    ),
    "holders of a key only": (Service, SERVICE | {"auth": {"keys_file": "keys.json"}}),
    "a language model from a bundle": (
        Service,
        {"name": "w", "bundle": "w@v1", "engine": {"kind": "torch", "max_model_len": None, "kernels": "off"}},
    ),
    "a language model that vLLM serves": (
        Service,
        {
            "name": "w",
            "engine": {
                "kind": "vllm",
                "model_name_or_path": "org/model",
                "revision": "main",
                "python": "/opt/vllm/bin/python",
                "device": "gpu",
                "tensor_parallel_size": 2,
                "num_threads": 4,
                "dtype": "fp16",
                "quantization": "fp8",
                "max_model_len": 8192,
                "max_num_seqs": 128,
                "gpu_memory_utilization": 0.85,
                "enable_prefix_caching": False,
                "adapters": {"a": "a@v1"},
                "max_loras": 4,
                "max_lora_rank": 64,
                "allow_runtime_lora_updating": True,
                "start_timeout_s": 60,
                "args": ["--kv-cache-dtype", "fp8", "--compilation-config.level", "3", "--seed", "-1", "--no-enable-log-requests"],
            },
        },
    ),
    "a bundle that vLLM serves": (Service, {"name": "w", "bundle": "w@v1", "engine": {"kind": "vllm", "device": "cpu"}}),
    "a language model as it is": (
        Service,
        {
            "name": "w",
            "engine": {
                "kind": "torch",
                "model_name_or_path": "org/model",
                "revision": "main",
                "dtype": "bf16",
                "max_model_len": 2048,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 512,
                "prefill_chunk_tokens": 96,
                "kv_cache_memory_gb": 1.5,
                "enable_prefix_caching": False,
                "adapters": {"formal": "runs/formal"},
                "max_loras": 2,
                "allow_runtime_lora_updating": True,
                "num_threads": 2,
                "num_gpus": 1,
                "step_timeout_s": 30,
                "num_speculative_tokens": 0,
            },
        },
    ),
    "a draft model": (
        Service,
        SERVICE | {"engine": {"kind": "torch", "num_speculative_tokens": 5, "draft_model": "org/small"}},
    ),
    "an engine by its tag alone": (Service, SERVICE | {"engine": {"kind": "encoder"}}),
    "the default variant, said": (TrainJob, JOB | {"tuning": {"kind": "full"}, "parallel": {"kind": "ddp"}}),
    "a frozen full": (TrainJob, JOB | {"tuning": {"kind": "full", "freeze_embeddings": True}}),
    "another variant's defaults": (TrainJob, JOB | {"tuning": {"kind": "lora"}, "parallel": {"kind": "deepspeed"}}),
    "all linears": (TrainJob, JOB | {"tuning": {"kind": "lora", "target_modules": "all-linear", "r": 1}}),
    **{
        f"tuning: {tuning}": (TrainJob, JOB | {"tuning": tuning})
        for tuning in (
            {"kind": "freeze", "num_trainable_layers": 1},
            {"kind": "lora", "use_rslora": True, "use_dora": True, "loraplus_lr_ratio": 16, "init_lora_weights": "gaussian"},
            {
                "kind": "qlora",
                "bits": 4,
                "bnb_4bit_quant_type": "fp4",
                "bnb_4bit_use_double_quant": False,
                "r": 2,
                "lora_alpha": 4,
                "lora_dropout": 0.1,
                "target_modules": ["query"],
                "use_rslora": True,
                "use_dora": False,
                "loraplus_lr_ratio": 2,
            },
            {"kind": "qlora", "bits": 8},
            {
                "kind": "adalora",
                "init_r": 6,
                "target_r": 3,
                "lora_alpha": 8,
                "lora_dropout": 0.1,
                "target_modules": "all-linear",
                "tinit": 1,
                "tfinal": 2,
                "deltaT": 3,
                "beta1": 0.9,
                "beta2": 0.9,
                "orth_reg_weight": 0,
            },
            {"kind": "ia3", "target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
            {"kind": "adapter", "bottleneck_size": 8, "non_linearity": "gelu", "placement": "houlsby"},
            {"kind": "prompt", "num_virtual_tokens": 5, "prompt_tuning_init": "random"},
            {"kind": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 16},
            {"kind": "prefix", "num_virtual_tokens": 5},
        )
    },
    "its labels": (TrainJob, JOB | {"task": {"kind": "classification", "labels": ["b", "a", "c"]}}),
    "calibrated, and what its answers cost": (
        TrainJob,
        JOB
        | {
            "task": {
                "kind": "classification",
                "labels": ["good", "bad"],
                "calibration": {"kind": "temperature", "temperature": 1.5},
                "decision": {"costs": {"bad": {"good": 20}, "good": {"bad": 1.5}}, "threshold": 0.1},
            }
        },
    ),
    **{
        f"task: {task}": (TrainJob, JOB | {"task": task, "data": {"train": "a.json", "columns": columns}})
        for task, columns in (
            ({"kind": "multi_label_classification", "labels": ["a", "b"], "separator": "|", "threshold": 0.4}, {"label": "l"}),
            ({"kind": "regression"}, {"text_pair": "other"}),
            (
                {
                    "kind": "extractive_qa",
                    "doc_stride": 32,
                    "max_answer_length": 40,
                    "n_best_size": 3,
                    "version_2_with_negative": True,
                    "null_score_diff_threshold": -1.5,
                },
                {"question": "q", "context": "c", "answers": "a"},
            ),
            ({"kind": "multiple_choice"}, {"options": "choices", "label": "right"}),
            ({"kind": "multiple_choice"}, {"options": ["first", "second"]}),
            ({"kind": "token_classification", "labels": ["O", "B-X"]}, {"tokens": "words"}),
            ({"kind": "embedding", "pooling": "cls", "temperature": 0.1}, {"positive": "near", "negative": "far"}),
        )
    },
    "the tags of a corpus": (TrainJob, JOB | {"task": {"kind": "token_classification"}, "data": {"train": "a.bio", "format": "conll"}}),
    "cleaning": (
        TrainJob,
        JOB
        | {
            "data": {
                "train": "t.csv",
                "clean": [
                    {"kind": "drop_broken"},
                    {"kind": "strip_markup"},
                    {"kind": "normalize", "width": "all", "collapse_whitespace": False},
                    {"kind": "filter_length", "min_characters": 0, "max_characters": 9},
                    {"kind": "filter_language", "languages": ["zh", "en", "und"]},
                    {"kind": "deduplicate_exact", "decontaminate": False},
                    {"kind": "deduplicate_near", "threshold": 0.9, "decontaminate": False},
                ],
            }
        },
    ),
    **{
        f"data: {fields}": (TrainJob, JOB | {"data": {"train": "t.csv", **fields}})
        for fields in (
            {"clean": [{"kind": "repair_broken"}]},
            {"dev": "d.csv", "split": {"kind": "given"}},
            {"split": {"kind": "ratio", "dev_size": 0.2, "test_size": 0.1}},
            {"dev": "d.csv", "split": {"kind": "stratified", "dev_size": 0, "test_size": 0.1}},
            {"test": "d.csv", "split": {"kind": "group", "column": "author", "dev_size": 0.2, "test_size": 0}},
            {"split": {"kind": "time", "column": "day", "dev_size": 0.2, "test_size": 0.1}},
        )
    },
    **{
        f"task: {task}": (TrainJob, JOB | {"task": task})
        for task in (
            {"kind": "pretrain", "objective": {"kind": "masked", "mlm_probability": 0.3, "whole_word_mask": True}},
            {"kind": "pretrain", "objective": {"kind": "causal"}, "from_scratch": {"vocab_size": 500, "config_overrides": {"d": 1}}},
            {"kind": "chat", "row_format": "sharegpt", "assistant_turns": "each"},
            {"kind": "preference", "loss": {"kind": "dpo", "beta": 0.2, "label_smoothing": 0.1}},
            {"kind": "preference", "loss": {"kind": "ipo", "beta": 1}},
            {"kind": "preference", "loss": {"kind": "orpo", "beta": 0.5}},
            {"kind": "preference", "loss": {"kind": "kto", "beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 0.5}},
            {
                "kind": "seq2seq",
                "source_lang": "en",
                "target_lang": "zh",
                "source_prefix": "translate: ",
                "max_target_length": 9,
                "num_beams": 4,
            },
        )
    },
    "a language model": (TrainJob, JOB | {"task": {"kind": "pretrain"}, "group_by_length": True}),
    **{
        f"optim: {optim}": (TrainJob, JOB | {"optim": optim})
        for optim in (
            {"optimizer": {"kind": "bnb_adamw", "bits": 32, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6}},
            {"optimizer": {"kind": "lion", "bits": 8, "lion_beta1": 0.95, "lion_beta2": 0.98}},
            {"optimizer": {"kind": "adafactor", "beta2_decay": -0.5, "clip_threshold": 2}},
            {"ema_decay": 0.99, "schedule": {"kind": "wsd", "warmup_ratio": 0.2, "decay_ratio": 0.8, "min_ratio": 0.1}},
            {"schedule": {"kind": "one_cycle", "warmup_ratio": 0.5, "div_factor": 10, "final_div_factor": 100}},
            {"schedule": {"kind": "cosine", "min_ratio": 0.1}},
            {"schedule": {"kind": "linear", "warmup_ratio": 0}},
            {"schedule": {"kind": "constant", "warmup_ratio": 0.3}},
        )
    },
    **{
        f"shared rows: {parallel}": (TrainJob, JOB | {"parallel": parallel, "workers": {"num_workers": 4}, "task": {"kind": "pretrain"}})
        for parallel in ({"kind": kind, "context_parallel_size": 2} for kind in ("ddp", "deepspeed", "fsdp"))
    },
    "float16": (TrainJob, JOB | {"precision": "fp16"}),
    "PyTorch alone": (TrainJob, JOB | {"kernels": "off"}),
    **{
        f"parallel: {parallel}": (
            TrainJob,
            JOB | {"parallel": parallel, "workers": {"num_workers": 4}, "global_batch_size": 64, "micro_batch_size": 4},
        )
        for parallel in (
            {"kind": "fsdp", "cpu_offload": True, "reshard_after_forward": False},
            {"kind": "tensor", "tensor_parallel_size": 2},
            {"kind": "tensor", "zero_stage": 1},
            {"kind": "pipeline", "pipeline_parallel_size": 2, "tensor_parallel_size": 2, "schedule": {"kind": "gpipe"}},
            {"kind": "pipeline", "zero_stage": 1, "schedule": {"kind": "interleaved_1f1b", "stages_per_worker": 3}},
            {"kind": "pipeline", "schedule": {"kind": "1f1b"}},
            {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"},
            {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme", "nvme_path": "/mnt/nvme"},
            {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/mnt/nvme"},
        )
    },
    "a paged optimizer on GPUs": (
        TrainJob,
        JOB | {"optim": {"optimizer": {"kind": "bnb_adamw", "paged": True}}, "workers": {"gpus_per_worker": 1}},
    ),
    **{
        f"cluster: {cluster}": (TrainJob, JOB | {"cluster": {"image": "i"} | cluster})
        for cluster in (
            {},
            {"scheduler": {"kind": "volcano", "queue": "q"}},
            {"scheduler": {"kind": "yunikorn", "queue": "root.a.b"}},
            {"scheduler": {"kind": "kai", "queue": "q"}, "env": {}},
            {"cleanup": {"kind": "rules", "after_success_s": 1, "workers_after_failure_s": 2, "head_after_failure_s": 3}},
            {"spot": "aks", "backoff_limit": 1},
        )
    },
    **{
        f"pods of a service: {upgrade}": (Service, SERVICE | {"cluster": {"image": "i", "upgrade": upgrade}})
        for upgrade in ({"kind": "new_cluster"}, {"kind": "in_place"})
    },
    "int8": (TrainJob, JOB | {"compress": {"quantization": {"kind": "int8"}}}),
    "bitsandbytes int8": (TrainJob, JOB | {"compress": {"quantization": {"kind": "bnb_int8"}, "max_quality_drop": 0}}),
    "bitsandbytes nf4 of a decoder": (TrainJob, JOB | {"task": {"kind": "chat"}, "compress": {"quantization": {"kind": "bnb_nf4"}}}),
    "bitsandbytes nf4": (TrainJob, JOB | {"compress": {"quantization": {"kind": "bnb_nf4"}}}),
    **{
        f"a chat in {quantization}": (TrainJob, JOB | {"task": {"kind": "chat"}, "compress": {"quantization": quantization}})
        for quantization in ({"kind": "int8"}, {"kind": "int4", "group_size": 64})
    },
    "a model that is rounded when it is loaded": (
        Service,
        {"name": "w", "engine": {"kind": "torch", "model_name_or_path": "m", "quantization": "int4"}},
    ),
    "compress by default": (TrainJob, JOB | {"compress": {}}),
    "serve by default": (TrainJob, JOB | {"serve": {}}),
    **{
        f"a {task['kind']} that is served by {engine}": (TrainJob, JOB | {"task": task, "serve": {"engine": engine}})
        for task in ({"kind": "chat"}, {"kind": "preference"}, {"kind": "pretrain"})
        for engine in (None, {"kind": "torch", "max_num_seqs": 8}, {"kind": "vllm", "tensor_parallel_size": 2})
    },
    **{
        f"a {kind} text's model that is served by {engine}": (TrainJob, JOB | {"task": task, "serve": {"engine": engine}})
        for kind, task, engines in (
            ("masked", {"kind": "pretrain", "objective": {"kind": "masked"}}, (None, {"kind": "encoder"})),
            (
                "written",
                {"kind": "seq2seq"},
                (
                    None,
                    {
                        "kind": "encoder_decoder",
                        "dtype": "bf16",
                        "max_num_seqs": 4,
                        "batch_wait_ms": 0.5,
                        "step_timeout_s": 20,
                        "num_threads": 2,
                        "num_gpus": 1,
                    },
                ),
            ),
        )
        for engine in engines
    },
    "empty mappings": (
        TrainJob,
        JOB | {name: {} for name in ("workers", "optim", "evaluation", "checkpoint", "serve", "compress")},
    ),
    "nothing where nothing may be": (
        TrainJob,
        JOB | {"max_steps": None, "compress": None, "serve": None, "optim": {"max_grad_norm": None}, "data": {"train": "a", "dev": None}},
    ),
    "the longest name": (TrainJob, JOB | {"name": "a" + "-" * 45 + "9"}),
    "the shortest name": (TrainJob, JOB | {"name": "a"}),
    "limits": (
        TrainJob,
        JOB
        | {
            "optim": {"weight_decay": 0, "optimizer": {"kind": "adamw", "adam_beta1": 0, "adam_beta2": 0.999999}},
            "data": {"train": ["a"], "dev_size": 0, "max_rows": 0},
        },
    ),
    "texts that look like numbers": (TrainJob, JOB | {"model": {"model_name_or_path": "1e5", "revision": "12e4567"}, "storage": "0o7"}),
    "other scripts": (TrainJob, JOB | {"task": {"kind": "classification", "labels": ["体育", "naïve: yes", "#", "yes", "1"]}}),
}

BAD: dict[str, tuple[type[Spec], Document, str, object]] = {
    **{f"{path}={value!r}": (TrainJob, FULL_JOB, path, value) for path, values in {
        "kind": ["service", None, 1],
        "name": ["", "A", "-a", "a-", "1a", "a_b", "a b", "a" * 48, None, 3],
        "model": ["m", None, {}, {"max_length": 4}],
        "model.model_name_or_path": ["", None, 3, ["m"]],
        "model.max_length": [3, 0, -1, "64", 64.5, None, True],
        "model.hidden_dropout": [1, -0.1, "0.1"],
        "data.train": [[], [""], [1], None, 3, {}],
        "data.format": ["xml", None, ""],
        "data.dev_size": [1, 1.5, -0.1, None, "0.1"],
        "data.max_rows": [-1, 1.5],
        "data.clean": [
            None, {"kind": "normalize"}, ["normalize"], [{}], [{"kind": "tidy"}], [{"kind": "normalize", "width": "half"}],
            [{"kind": "filter_length", "min_characters": -1}], [{"kind": "filter_language"}],
            [{"kind": "filter_language", "languages": []}],
            [{"kind": "filter_language", "languages": ["xx"]}], [{"kind": "deduplicate_near", "threshold": 1}],
            [{"kind": "deduplicate_exact", "threshold": 0.9}],
        ],
        "data.split": [{}, "ratio", {"kind": "given", "dev_size": 0.1}, {"kind": "group"}, {"kind": "ratio", "column": "a"},
                       {"kind": "time", "column": ""}, {"kind": "ratio", "dev_size": 1}],
        "data.columns": [None, "text", {"txt": "a"}],
        "task": [{"labels": ["a", "b"]}, {"kind": "pretrain", "labels": ["a", "b"]}, {"kind": "chat", "assistant_turns": "first"}],
        "task.kind": ["diffusion", None],
        "task.labels": [["a"], [], "a", ["a", 1], ["a", "a"]],
        "task.label_smoothing": [1, -0.5, None],
        "tuning": [None, "lora", {}, {"r": 4}, {"kind": "loora"}, {"kind": None}, {"kind": "full", "r": 4}],
        "tuning.freeze_embeddings": [True],
        "tuning.r": [0, 1.5, "4", None],
        "tuning.lora_alpha": [0, -1, None],
        "tuning.lora_dropout": [1],
        "tuning.target_modules": ["query", [1], [], None],
        "parallel": [
            {"kind": "ddp", "zero_stage": 2}, {"zero_stage": 2}, {"kind": "fsdp", "zero_stage": 2}, {"kind": "tensor", "cpu_offload": True},
            {"kind": "tensor", "zero_stage": 2}, {"kind": "pipeline", "schedule": "1f1b"},
            {"kind": "pipeline", "pipeline_parallel_size": 1},
            {"kind": "pipeline", "schedule": {"kind": "gpipe", "stages_per_worker": 2}}, {"kind": "tensor", "context_parallel_size": 2},
        ],
        "parallel.zero_stage": [0, 4, "2", True, None],
        "workers.num_workers": [0, 1.5, None],
        "workers.gpus_per_worker": [2, -1, True, False, "0"],
        "optim.learning_rate": [0, -1e-4, "1e-4", None, True],
        "optim.optimizer": ["adamw", {}, {"kind": "sgd"}, {"kind": "lion", "adam_beta1": 0.9}, {"kind": "bnb_adamw", "bits": 16}],
        "optim.optimizer.adam_beta1": [1, -0.1],
        "optim.layer_learning_rate_decay": [0, 1.1],
        "optim.ema_decay": [0, 1],
        "optim.max_grad_norm": [0, -1],
        "optim.schedule": ["cosine", {"kind": "step"}, {"warmup_ratio": 0.5}, {"kind": "wsd", "decay_ratio": 0}],
        "evaluation.eval_steps": [0, 2.5],
        "evaluation.metric_for_best_model": ["bleu", 1],
        "checkpoint.save_total_limit": [1, 0],
        "precision": ["fp8", None, 32],
        "kernels": ["on", False, None],
        "global_batch_size": [0, "32", 31.5, None],
        "num_train_epochs": [0, None],
        "max_steps": [0],
        "seed": [-1, 1.5, None],
        "trackers": ["tensorboard", ["neptune"], [1]],
        "budget_usd": [0, -1, "120 USD"],
        "storage": [None, 3],
        "compress.quantization": [{}, None, "int8", {"kind": "int3"}, {"kind": "int8", "double_quant": True},
                                  {"kind": "int4", "group_size": 16}],
        "compress.max_quality_drop": [1.1, -0.1],
        "compress.min_speedup": [0],
        "serve.engine": [{"kind": "echo"}, {"kind": None}, {"num_threads": 2}, "torch"],
        "serve.http.port": [-1, 65536, "80", 80.5],
        "serve.http.haproxy": ["yes", 1, None],
        "serve.http.allowed_origins": ["*", ["chat.example"], ["https://chat.example/"], [""], None],
        "serve.bundle": ["a@v1"],
        "learning_rate": [1e-4],
        "cluster": [{}, {"image": ""}, {"image": "i", "gpus": 8}, "k8s"],
        "cluster.memory": ["64", "64G", "64 Gi", 64, "0Gi", None],
        "cluster.namespace": ["Research", "a_b", "-a", ""],
        "cluster.image_pull_policy": ["always"],
        "cluster.node_selector": [{"pool": 1}, None, ["pool"]],
        "cluster.tolerations": [None, [{}], [{"key": "a b"}], [{"key": "a", "effect": "noschedule"}], [{"key": "a", "operator": "Exists"}]],
        "cluster.scheduler": [{"kind": "slurm"}, {"queue": "a"}, {"kind": "kueue"}, {"kind": "yunikorn", "queue": "research"}, "kueue"],
        "cluster.secret_env": [[{"name": "1A", "secret": "s", "key": "k"}], [{"name": "A", "value": "s"}]],
        "cluster.volumes": [[{"claim": "c", "mount_path": "data"}], [{"claim": "c", "mount_path": "/"}], [{"mount_path": "/data"}]],
        "cluster.tls": [{}, {"ca_secret": ""}, {"secret": "ca"}, "ray-ca"],
        "cluster.secret_volumes": [[{"secret": "s"}], [{"secret": "s", "mount_path": "keys"}], [{"claim": "c", "mount_path": "/a"}], None],
        "cluster.spot": ["azure", True],
        "cluster.cleanup": [{}, {"kind": "ttl", "after_success_s": 1}, {"kind": "rules", "after_success_s": -1}],
        "cluster.active_deadline_s": [0, -1, 1.5],
        "cluster.replicas_per_pod": [1],
        "serve.cluster.upgrade": [{"kind": "incremental"}, {"kind": "new_cluster", "gateway_class": "g"}, None],
        "serve.cluster.backoff_limit": [1],
    }.items() for value in values},
    **{f"service: {path}={value!r}": (Service, FULL_SERVICE, path, value) for path, values in {
        "kind": ["train"],
        "name": ["A"],
        "bundle": [3],
        "engine": [{}, {"num_threads": 1}, {"kind": "sglang"}, {"kind": "echo", "num_threads": 1}, None],
        "engine.labels": [["a"]],
        "engine.dtype": ["fp16", None],
        "engine.batch_wait_ms": [-1],
        "engine.step_timeout_s": [0, -1, "5"],
        "engine.num_gpus": [2, True],
        "autoscaling.min_replicas": [-1, 1.5],
        "autoscaling.max_replicas": [0],
        "autoscaling.target_ongoing_requests": [0],
        "limits.max_inputs": [0],
        "limits.request_timeout_s": [0, None],
        "model": ["m"],
    }.items() for value in values},
}  # fmt: skip

SPANNING = {
    "is not a multiple of micro_batch_size x workers.num_workers": (TrainJob, JOB | {"global_batch_size": 30}),
    "so one is enough": (TrainJob, JOB | {"data": {"train": "t", "clean": [{"kind": "drop_broken"}, {"kind": "repair_broken"}]}}),
    "no text is kept": (
        TrainJob,
        JOB | {"data": {"train": "t", "clean": [{"kind": "filter_length", "min_characters": 5, "max_characters": 4}]}},
    ),
    "dev_size has no effect beside split": (TrainJob, JOB | {"data": {"train": "t", "dev_size": 0.2, "split": {"kind": "ratio"}}}),
    "split.kind=given needs a file in dev": (TrainJob, JOB | {"data": {"train": "t", "split": {"kind": "given"}}}),
    "draws dev rows, and dev names a file": (TrainJob, JOB | {"data": {"train": "t", "dev": "d", "split": {"kind": "ratio"}}}),
    "leaves no dev row": (TrainJob, JOB | {"data": {"train": "t", "split": {"kind": "ratio", "dev_size": 0}}}),
    "leaves no training row": (TrainJob, JOB | {"data": {"train": "t", "split": {"kind": "ratio", "dev_size": 0.5, "test_size": 0.5}}}),
    "is more than max_replicas": (Service, SERVICE | {"autoscaling": {"min_replicas": 2}}),
    "bundle is needed by engine.kind=encoder": (Service, {"name": "topics"}),
    "bundle is needed by engine.kind=encoder_decoder": (Service, {"name": "topics", "engine": {"kind": "encoder_decoder"}}),
    "bundle has no effect with engine.kind=echo": (Service, SERVICE | {"engine": {"kind": "echo"}}),
    "data.columns.context has no effect with task.kind=classification": (
        TrainJob,
        JOB | {"data": {"train": "a.csv", "columns": {"context": "c"}}},
    ),
    "task.doc_stride=300 is more than half of model.max_length": (TrainJob, JOB | {"task": {"kind": "extractive_qa", "doc_stride": 300}}),
    "micro_batch_size=1 leaves task.kind=embedding no other texts": (
        TrainJob,
        JOB | {"task": {"kind": "embedding"}, "micro_batch_size": 1},
    ),
    "null_score_diff_threshold has no effect without": (
        TrainJob,
        JOB | {"task": {"kind": "extractive_qa", "null_score_diff_threshold": 1}},
    ),
    "serve.engine.kind=encoder answers with what an encoder's head says, and task.kind=seq2seq": (
        TrainJob,
        JOB | {"task": {"kind": "seq2seq"}, "serve": {"engine": {"kind": "encoder"}}},
    ),
    "serve.engine.kind=torch continues texts": (TrainJob, JOB | {"serve": {"engine": {"kind": "torch"}}}),
    "serve.engine.model_name_or_path is in the way": (
        TrainJob,
        JOB | {"task": {"kind": "chat"}, "serve": {"engine": {"kind": "torch", "model_name_or_path": "m"}}},
    ),
    "serve.engine.kind=encoder answers with": (TrainJob, JOB | {"task": {"kind": "chat"}, "serve": {"engine": {"kind": "encoder"}}}),
    "puts no virtual tokens before a text": (TrainJob, JOB | {"task": {"kind": "chat"}, "tuning": {"kind": "prompt"}, "serve": {}}),
    "compress takes an encoder's or a decoder's task": (TrainJob, JOB | {"task": {"kind": "seq2seq"}, "compress": {}}),
    "compress.quantization.kind=int4 is not for task.kind=classification": (
        TrainJob,
        JOB | {"compress": {"quantization": {"kind": "int4"}}},
    ),
    "serve.engine.quantization=int8 makes weights that nobody evaluates": (
        TrainJob,
        JOB | {"task": {"kind": "chat"}, "serve": {"engine": {"kind": "torch", "quantization": "int8"}}},
    ),
    "serve.engine.kind=vllm continues texts": (TrainJob, JOB | {"serve": {"engine": {"kind": "vllm"}}}),
    "serve.engine.kind=vllm cannot serve tuning.kind=qlora": (
        TrainJob,
        JOB | {"task": {"kind": "chat"}, "tuning": {"kind": "qlora"}, "serve": {"engine": {"kind": "vllm"}}},
    ),
    "serve.engine.kind=vllm cannot serve what compress makes": (
        TrainJob,
        JOB | {"task": {"kind": "chat"}, "compress": {}, "serve": {"engine": {"kind": "vllm"}}},
    ),
    "engine.quantization=int8 would serve other weights than the bundle's": (
        Service,
        {"name": "w", "bundle": "w@v1", "engine": {"kind": "torch", "quantization": "int8"}},
    ),
    "draft_model has no effect with num_speculative_tokens=0": (
        Service,
        {"name": "w", "bundle": "w@v1", "engine": {"kind": "torch", "draft_model": "m", "num_speculative_tokens": 0}},
    ),
    "puts a prompt in front of a text": (TrainJob, JOB | {"task": {"kind": "multiple_choice"}, "tuning": {"kind": "prefix"}}),
    "with task.objective.kind=masked does not take": (
        TrainJob,
        JOB | {"task": {"kind": "pretrain", "objective": {"kind": "masked"}}, "tuning": {"kind": "prefix"}},
    ),
    "does not start as; tuning.kind=lora, or task.loss.kind=orpo": (
        TrainJob,
        JOB | {"task": {"kind": "preference"}, "tuning": {"kind": "prefix"}},
    ),
    "leaves nothing to tune by": (TrainJob, JOB | {"task": {"kind": "pretrain", "from_scratch": {}}, "tuning": {"kind": "lora"}}),
    "reads: rows of known forms": (TrainJob, JOB | {"task": {"kind": "chat"}, "data": {"train": "a.csv", "columns": {"text": "t"}}}),
    "is not a multiple of cluster.workers_per_pod": (TrainJob, JOB | {"cluster": {"image": "i", "workers_per_pod": 2}}),
    "is part of a pod's memory": (TrainJob, JOB | {"cluster": {"image": "i", "shared_memory": "8Gi"}}),
    "cuts a tensor-parallel group": (
        TrainJob,
        JOB | {"parallel": {"kind": "tensor"}, "workers": {"num_workers": 4}, "cluster": {"image": "i"}},
    ),
    "has no effect with workers.gpus_per_worker=0": (TrainJob, JOB | {"cluster": {"image": "i", "gpu_type": "NVIDIA-A10G"}}),
    "nodes are taken away at times": (TrainJob, JOB | {"cluster": {"image": "i", "spot": "eks"}}),
    "cleanup.kind=rules does not go with": (
        TrainJob,
        JOB | {"cluster": {"image": "i", "scheduler": {"kind": "kueue", "queue": "q"}, "cleanup": {"kind": "rules"}}},
    ),
    "the workers go first": (
        TrainJob,
        JOB | {"cluster": {"image": "i", "cleanup": {"kind": "rules", "workers_after_failure_s": 2, "head_after_failure_s": 1}}},
    ),
    "has no effect with engine.num_gpus=0": (Service, SERVICE | {"cluster": {"image": "i", "gpu_type": "NVIDIA-A10G"}}),
    "a fixed number of pods": (
        Service,
        SERVICE | {"autoscaling": {"max_replicas": 2}, "cluster": {"image": "i", "scheduler": {"kind": "kueue", "queue": "q"}}},
    ),
    "incremental needs Ray's autoscaler": (
        Service,
        SERVICE
        | {
            "autoscaling": {"max_replicas": 2},
            "cluster": {
                "image": "i",
                "scheduler": {"kind": "kueue", "queue": "q"},
                "upgrade": {"kind": "incremental", "gateway_class": "g"},
            },
        },
    ),
    "cluster.upgrade.kind=incremental moves replicas": (
        Service,
        SERVICE | {"cluster": {"image": "i", "upgrade": {"kind": "incremental", "gateway_class": "g"}}},
    ),
    "has room for all replicas": (
        Service,
        SERVICE
        | {
            "autoscaling": {"max_replicas": 2},
            "cluster": {"image": "i", "replicas_per_pod": 2, "upgrade": {"kind": "incremental", "gateway_class": "g"}},
        },
    ),
    "requests move to pods that are up": (
        Service,
        SERVICE
        | {
            "autoscaling": {"max_replicas": 2},
            "cluster": {"image": "i", "upgrade": {"kind": "incremental", "gateway_class": "g", "max_surge_percent": 20}},
        },
    ),
}
"""The rules that no schema of single fields can hold, by what pydantic says; and a document for each."""


def refusals(kind: type[Spec], document: object) -> list[str]:
    """pydantic's, as `type: message (input)`; none if it accepts."""
    try:
        kind.model_validate(document)
    except ValidationError as error:
        return [f"{found['type']}: {found['msg']} ({found['input']!r})" for found in error.errors()]
    return []


def changed(document: Document, path: str, value: object) -> Document:
    found = copy.deepcopy(document)
    *parents, last = path.split(".")
    place = found
    for part in parents:
        place = place[part]
    place[last] = value
    return found


def paths(document: Document, prefix: str = "") -> Iterator[str]:
    for name, value in document.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{name}.")


@pytest.mark.parametrize("kind", VALIDATORS)
def test_a_schema_is_a_draft_07_schema(kind: type[Spec]) -> None:
    document = schema(kind)
    Draft7Validator.check_schema(document)
    text = json.dumps(document)
    assert document["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert "$defs" not in text
    assert "discriminator" not in text


@pytest.mark.parametrize("kind", VALIDATORS)
def test_a_reference_stands_alone_and_leads_somewhere(kind: type[Spec]) -> None:
    """In draft-07 whatever stands beside a $ref is ignored."""
    document = schema(kind)

    def visit(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(reference := node.get("$ref"), str):
                assert list(node) == ["$ref"]
                assert reference.removeprefix("#/definitions/") in document["definitions"]
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(document)


@pytest.mark.parametrize("name", GOOD)
def test_both_accept_what_is_good(name: str) -> None:
    kind, document = GOOD[name]
    assert refusals(kind, document) == []
    assert [error.message for error in VALIDATORS[kind].iter_errors(document)] == []


@pytest.mark.parametrize("name", BAD)
def test_both_refuse_what_is_bad(name: str) -> None:
    kind, document, path, value = BAD[name]
    bad = changed(document, path, value)
    assert refusals(kind, bad)
    assert not VALIDATORS[kind].is_valid(bad)


@pytest.mark.parametrize("rule", SPANNING)
def test_a_rule_that_spans_fields_is_pydantics_alone(rule: str) -> None:
    kind, document = SPANNING[rule]
    (said,) = refusals(kind, document)
    assert rule in said
    assert VALIDATORS[kind].is_valid(document)


ODD: list[object] = [None, True, False, 0, 1, 2, 3, -1, 0.5, 1.5, 8.0, 100_000, "", "1", "a", "auto", "encoder", [], ["a"], ["a", "a"], [1]]
ODD += [{}, {"kind": "lora"}, {"kind": "full"}, {"kind": "echo"}, {"x": 1}]


@pytest.mark.parametrize(
    ("kind", "path"), [(kind, path) for kind, full in ((TrainJob, FULL_JOB), (Service, FULL_SERVICE)) for path in paths(full)]
)
def test_both_say_the_same_of_any_value_anywhere(kind: type[Spec], path: str) -> None:
    full = FULL_JOB if kind is TrainJob else FULL_SERVICE
    for value in ODD:
        document = changed(full, path, value)
        said = refusals(kind, document)
        if VALIDATORS[kind].is_valid(document) == (not said):
            continue
        assert VALIDATORS[kind].is_valid(document), f"only the schema refuses {path}: {value!r}"
        spans = all(line.startswith("value_error") and any(rule in line for rule in SPANNING) for line in said)
        # To JSON Schema 8.0 is an integer; YAML's 8.0 is none, and the message says to write 8.
        assert spans or (value == 8.0 and all(line.startswith("int_type") for line in said)), (
            f"only pydantic refuses {path}: {value!r}: {said}"
        )


@pytest.mark.parametrize("kind", VALIDATORS)
def test_both_say_the_same_when_a_field_is_missing_or_one_too_many(kind: type[Spec]) -> None:
    full = FULL_JOB if kind is TrainJob else FULL_SERVICE
    for path in paths(full):
        *parents, last = path.split(".")
        without = copy.deepcopy(full)
        place = without
        for part in parents:
            place = place[part]
        del place[last]
        said = [line for line in refusals(kind, without) if not any(rule in line for rule in SPANNING)]
        assert VALIDATORS[kind].is_valid(without) == (not said), path
        place["zzz"] = 1
        assert refusals(kind, without)
        assert not VALIDATORS[kind].is_valid(without), path


def test_the_documents_set_every_field_of_every_spec() -> None:
    found: set[tuple[str, str]] = set()

    def collect(spec: BaseModel) -> None:
        for name in spec.model_fields_set:
            found.update((parent.__name__, name) for parent in type(spec).__mro__)
            value = getattr(spec, name)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, BaseModel):
                    collect(part)

    for kind, document in GOOD.values():
        collect(kind.model_validate(document))
    specs = {
        part
        for module in (cluster, compress, data, model, optim, parallel, serve, task, train, tuning)
        for value in vars(module).values()
        for part in (value, *get_args(value))
        if isinstance(part, type) and issubclass(part, Spec) and part is not Spec
    }
    assert {(spec.__name__, name) for spec in specs for name in spec.model_fields} - found == set()


@pytest.mark.parametrize("name", GOOD)
def test_a_dump_loads_back_equal_in_either_version_of_yaml(name: str) -> None:
    kind, document = GOOD[name]
    spec = kind.model_validate(document)
    text = dump(spec)
    assert parse(kind, text) == spec
    assert kind.model_validate(yaml.safe_load(text)) == spec
    assert VALIDATORS[kind].is_valid(yaml.safe_load(text))
    assert dump(parse(kind, text)) == text


@pytest.mark.parametrize(("name", "kind"), [("train", TrainJob), ("service", Service)])
def test_the_committed_schema_is_the_one_that_is_made(name: str, kind: type[Spec]) -> None:
    committed = json.loads((ROOT / "k8s" / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8"))
    assert committed == schema(kind)
    for path in (ROOT / "k8s" / "examples").glob("*.yaml"):
        example, _ = yaml12.read(path.read_text(encoding="utf-8"), path.name)
        assert example.get("kind") != name or Draft7Validator(committed).is_valid(example)
