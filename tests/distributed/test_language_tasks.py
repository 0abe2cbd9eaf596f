"""The language tasks on two workers, however these share the work, give the losses and gradient norms they give in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from language import preferences, talks, translations, write_chat_model, write_rows, write_t5
from ranks import Curve, curve, job_of, on_ranks

from danlu.train.run import LocalRun

PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "fsdp": {"kind": "fsdp"},
    "context": {"kind": "ddp", "context_parallel_size": 2},
    "tensor": {"kind": "tensor", "tensor_parallel_size": 2},
    "pipeline": {"kind": "pipeline", "pipeline_parallel_size": 2},
}
TASKS: dict[str, dict[str, Any]] = {
    "chat": {"task": {"kind": "chat"}},
    "dpo": {"task": {"kind": "preference", "loss": {"kind": "dpo", "beta": 0.5}}, "tuning": {"kind": "lora", "r": 4}},
    "dpo-full": {"task": {"kind": "preference", "loss": {"kind": "dpo", "beta": 0.5}}},
    "masked": {"task": {"kind": "pretrain", "objective": {"kind": "masked"}}},
    "seq2seq": {"task": {"kind": "seq2seq"}},
}
CASES = [
    *((name, parallel) for name in ("chat", "dpo", "masked", "seq2seq") for parallel in ("ddp", "zero3")),
    ("seq2seq", "fsdp"),
    ("chat", "context"),
    ("chat", "pipeline"),
    ("dpo-full", "context"),
    ("dpo-full", "tensor"),
    ("dpo-full", "pipeline"),
    ("masked", "tensor"),
    ("masked", "pipeline"),
]


@pytest.fixture(scope="module")
def jobs(tiny_model: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each task changes of the small job."""
    folder = tmp_path_factory.mktemp("language")
    chat, t5 = write_chat_model(folder / "chat"), write_t5(folder / "t5")
    files = {
        "chat": (chat, write_rows(folder / "talks.jsonl", talks(40))),
        "dpo": (chat, write_rows(folder / "pairs.jsonl", preferences(40))),
        "dpo-full": (chat, str(folder / "pairs.jsonl")),
        "masked": (tiny_model, topic_files["train"]),
        "seq2seq": (t5, write_rows(folder / "numbers.jsonl", translations(60))),
    }
    return {
        name: {
            **TASKS[name],
            "model": {"model_name_or_path": str(model), "max_length": 64},
            "data": {"train": rows, "cache_dir": str(folder / "cache")},
            "evaluation": {"metric_for_best_model": "loss"},
            "max_steps": 3,
        }
        for name, (model, rows) in files.items()
    }


@pytest.fixture(scope="module")
def one_process(jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    torch.set_num_threads(1)
    found = {}
    for name, job in jobs.items():
        run, folder = LocalRun(torch.device("cpu")), tmp_path_factory.mktemp("one-process")
        job_alone = job_of(job["model"]["model_name_or_path"], "unused.csv", job | {"micro_batch_size": 16})
        found[name] = curve(job_alone, run, run.records, str(folder))
    return found


@pytest.fixture(scope="module")
def two_ranks(jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """All cases in one pair of processes."""
    shape = {"workers": {"num_workers": 2}, "micro_batch_size": 4}
    cases = {
        f"{name}-{parallel}": shape | jobs[name] | {"folder": jobs[name]["model"]["model_name_or_path"], "parallel": PARALLEL[parallel]}
        for name, parallel in CASES
    }
    return on_ranks(2, cases, tmp_path_factory.mktemp("two-ranks")).curves


@pytest.mark.parametrize(("name", "parallel"), CASES)
def test_two_workers_equal_one_process(name: str, parallel: str, one_process: dict[str, Curve], two_ranks: dict[str, Curve]) -> None:
    found, expected = two_ranks[f"{name}-{parallel}"], one_process[name]
    assert len(found) == len(expected) == 3
    for (loss, norm), (their_loss, their_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(their_loss, abs=2e-5)
        assert norm == pytest.approx(their_norm, rel=1e-3)
