"""Every way of tuning gives on two workers the losses and gradient norms it gives in one process: under DDP, ZeRO and FSDP,
LoRA and freezing also with split matrices and in a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model
from ranks import Curve, curve, job_of, on_ranks
from safetensors.torch import load_file

from danlu.train.run import EventRecord, LocalRun

PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "fsdp": {"kind": "fsdp"},
    "tensor": {"kind": "tensor"},
    "pipeline": {"kind": "pipeline"},
    "interleaved": {"kind": "pipeline", "schedule": {"kind": "interleaved_1f1b", "stages_per_worker": 2}},
}
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"kind": "qlora", "r": 4},
    "freeze": {"kind": "freeze", "num_trainable_layers": 1},
    "dora": {"kind": "lora", "r": 4, "use_dora": True, "loraplus_lr_ratio": 4.0},
    "pissa": {"kind": "lora", "r": 4, "init_lora_weights": "pissa"},
    "ia3": {"kind": "ia3"},
    "adapter": {"kind": "adapter", "bottleneck_size": 8, "placement": "houlsby"},
    "adalora": {"kind": "adalora", "init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "p_tuning": {"kind": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "lora": {"kind": "lora", "r": 4, "target_modules": "all-linear"},
    "freeze-half": {"kind": "freeze", "num_trainable_layers": 2},
    "freeze-a-layer": {"kind": "freeze", "num_trainable_layers": 3},
    "qlora-8": {"kind": "qlora", "r": 4, "bits": 8},
    "prompt": {"kind": "prompt", "num_virtual_tokens": 5},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 5},
}
STAGED = {"lora", "freeze-half", "freeze-a-layer"}
"""Of a model of four layers, the latter two: two stages of two, or four of one, where nothing is trained in one and two of them."""
TAKEN = {
    "ddp": METHODS.keys() - STAGED,
    "zero2": METHODS.keys() - STAGED,
    "zero3": METHODS.keys() - STAGED - {"adalora", "p_tuning", "prompt", "prefix"},
    "fsdp": METHODS.keys() - STAGED - {"adalora", "qlora-8"},
    "tensor": {"lora", "pissa", "freeze"},
    "pipeline": {"lora", "pissa", "dora", "freeze", "freeze-a-layer"},
    "interleaved": {"freeze-half"},
}
"""Where not all are: `lora` stands for `dora` where matrices are split, and need not run twice elsewhere."""
CASES = [(m, p) for m in METHODS for p in PARALLEL if m in TAKEN[p]]


@dataclass(frozen=True)
class Done:
    """A run: its curve, where its ranks went, and its folder."""

    curve: Curve
    ranks: list[str]
    folder: Path

    def stored(self) -> tuple[str, dict[str, torch.Tensor]]:
        """The best weights: their step and tensors."""
        (best,) = (self.folder / "best").iterdir()
        return best.name, {name: tensor for file in best.glob("*.safetensors") for name, tensor in load_file(file).items()}


def overrides(method: str, model: Path) -> dict[str, Any]:
    task = {"kind": "pretrain" if "qwen3" in str(model) else "classification"}
    return {
        "model": {"model_name_or_path": str(model), "max_length": 16},
        "task": task,
        "tuning": METHODS[method],
        "max_steps": 6,
        "evaluation": {"metric_for_best_model": "loss"},
    }


@pytest.fixture(scope="module")
def models(tiny_model: Path, tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoders and decoders in turns."""
    longer = write_tiny_model(tmp_path_factory.mktemp("longer-bert"), layers=4)
    return {m: longer if m in STAGED - {"lora"} else (tiny_model, tiny_decoder)[i % 2] for i, m in enumerate(METHODS)}


@pytest.fixture(scope="module")
def one_process(models: dict[str, Path], topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    torch.set_num_threads(1)
    found = {}
    for method, model in models.items():
        run, folder = LocalRun(torch.device("cpu")), tmp_path_factory.mktemp("one-process")
        job = job_of(str(model), topic_files["train"], overrides(method, model) | {"micro_batch_size": 16})
        losses = curve(job, run, run.records, str(folder))
        ranks = [record.detail for record in run.records if isinstance(record, EventRecord) and record.event == "ranks"]
        found[method] = Done(losses, ranks, folder)
    return found


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, Path], topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """All cases in one pair of processes."""
    shape = {"workers": {"num_workers": 2}, "micro_batch_size": 4}
    cases = {
        f"{method}-{parallel}": shape | overrides(method, models[method]) | {"folder": str(models[method]), "parallel": PARALLEL[parallel]}
        for method, parallel in CASES
    }
    folder = tmp_path_factory.mktemp("two-ranks")
    told = on_ranks(2, cases, folder, train_file=topic_files["train"])
    return {
        name: Done(told.curves[name], [detail for event, detail in told.events[name] if event == "ranks"], folder / f"out.json.{name}")
        for name in cases
    }


@pytest.mark.parametrize(("method", "parallel"), CASES)
def test_two_workers_equal_one_process(method: str, parallel: str, one_process: dict[str, Done], two_ranks: dict[str, Done]) -> None:
    found, expected = two_ranks[f"{method}-{parallel}"], one_process[method]
    assert len(found.curve) == len(expected.curve) == 6
    for (loss, norm), (their_loss, their_norm) in zip(found.curve, expected.curve, strict=True):
        assert loss == pytest.approx(their_loss, abs=2e-5)
        assert norm == pytest.approx(their_norm, rel=1e-3)
    assert found.ranks == expected.ranks
    assert bool(found.ranks) == (method == "adalora")


@pytest.mark.parametrize(("method", "parallel"), CASES)
def test_two_workers_store_what_one_process_does(
    method: str, parallel: str, one_process: dict[str, Done], two_ranks: dict[str, Done]
) -> None:
    """Whole, whoever held which part: what one process stores is held to its live model in the units."""
    (step, found), (their_step, expected) = two_ranks[f"{method}-{parallel}"].stored(), one_process[method].stored()
    assert step == their_step
    assert found.keys() == expected.keys()
    assert found
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
