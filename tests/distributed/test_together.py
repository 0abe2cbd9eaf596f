"""Settings that meet each other: what is right alone is right together, on two workers, and when another number of workers goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model
from ranks import Curve, curve, job_of, on_ranks
from test_parity import PLACES, decoder_case
from transformers import AutoModelForSequenceClassification

from danlu.errors import CheckpointError
from danlu.train.run import LocalRun

TWO: dict[str, Any] = {"workers": {"num_workers": 2}, "micro_batch_size": 4}
"""Two passes a step on each of two workers."""
PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "fsdp": {"kind": "fsdp"},
    "tensor": {"kind": "tensor"},
    "pipeline": {"kind": "pipeline"},
}
CONTEXT = {"context": {"kind": "fsdp", "context_parallel_size": 2}}
RATES = {"learning_rate": 2e-3, "max_grad_norm": 0.5, "schedule": {"kind": "cosine"}}
SCHEDULES: dict[str, dict[str, Any]] = {
    "wsd": {"kind": "wsd", "warmup_ratio": 0.25, "decay_ratio": 0.5, "min_ratio": 0.1},
    "one_cycle": {"kind": "one_cycle", "warmup_ratio": 0.5},
}
ONE: dict[str, dict[str, Any]] = {
    "averaged, one_cycle": {"optim": RATES | {"ema_decay": 0.7, "schedule": SCHEDULES["one_cycle"]}},
    "wsd": {"optim": RATES | {"schedule": SCHEDULES["wsd"]}},
    "grouped": {"group_by_length": True},
    "8 bits": {"optim": RATES | {"optimizer": {"kind": "bnb_adamw"}}},
    "by layer": {
        "tuning": {"kind": "lora", "r": 4},
        "optim": RATES | {"layer_learning_rate_decay": 0.4, "head_learning_rate_multiplier": 4.0},
    },
    "checkpointed": {},
    "lora, checkpointed": {"tuning": {"kind": "lora", "r": 4}},
    "unclipped": {"optim": RATES | {"max_grad_norm": None, "schedule": SCHEDULES["wsd"]}},
    "by no layer": {"tuning": {"kind": "lora", "r": 4}, "optim": RATES},
}
"""Jobs of one process that two workers are compared with, and one that shows that a setting makes a difference."""
GOES_ON = {"averaged, one_cycle": ["ddp"], "wsd": ["zero2", "fsdp"], "grouped": ["ddp", "zero3"], "8 bits": ["ddp"]}
"""Which of them are gone on with by another number of workers, and under what."""
SPREAD = {
    "by layer": [*PARALLEL],
    "unclipped": [*PARALLEL],
    "checkpointed": [*PARALLEL, "context"],
    "lora, checkpointed": [*PARALLEL],
}
"""Which of them are trained under every strategy."""
DECODERS = {"checkpointed", "lora, checkpointed"}
"""Jobs of language models; one process makes nothing again in the backward."""


def overrides(name: str, decoder: Path) -> dict[str, Any]:
    return decoder_case(decoder, **ONE[name]) if name in DECODERS else ONE[name]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bitsandbytes keeps the state of weights of less than 4,096 elements in 32 bits, whatever it is told."""
    return write_tiny_model(tmp_path_factory.mktemp("wide-bert"), hidden_size=64)


@pytest.fixture(scope="module")
def one(
    tiny_model: Path, wide_model: Path, tiny_decoder: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Curve of each job in one process, which accumulates nothing, and where it was written."""
    found = {}
    for name in ONE:
        model = tiny_decoder if name in DECODERS else wide_model if name == "8 bits" else tiny_model
        folder = tmp_path_factory.mktemp("one")
        found[name] = alone(model, topic_files["train"], overrides(name, tiny_decoder) | {"micro_batch_size": 16}, folder), folder
    return found


@pytest.fixture(scope="module")
def two(
    one: dict[str, Any],
    tiny_model: Path,
    wide_model: Path,
    tiny_decoder: Path,
    topic_files: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Curve], Path]:
    """Curves of two workers, from the start and from a checkpoint of one, in one pair of processes; and where they were written."""
    folder = tmp_path_factory.mktemp("two")
    cases: dict[str, dict[str, Any]] = {}
    for name, its in GOES_ON.items():
        for parallel in its:
            model = wide_model if name == "8 bits" else tiny_model
            job = TWO | ONE[name] | {"parallel": PARALLEL[parallel]}
            cases[f"{name} {parallel}"] = job | {"folder": str(model)}
            before = folder / f"before {name} {parallel}"
            alone(model, topic_files["train"], job | {"workers": {"num_workers": 1}}, before)
            lose_the_last_checkpoint(before)
            cases[f"{name} {parallel} resumed"] = job | {"folder": str(model), "run_uri": str(before)}
    for name, its in SPREAD.items():
        for parallel in its:
            cases[f"{name} {parallel}"] = TWO | overrides(name, tiny_decoder) | {"parallel": (PARALLEL | CONTEXT)[parallel]}
            if name in DECODERS:
                sparing = cases[f"{name} {parallel}"]["model"] | {"gradient_checkpointing": True}
                cases[f"{name} {parallel}"] |= {"folder": str(tiny_decoder), "model": sparing}
    cases["8 bits zero2"] = TWO | ONE["8 bits"] | {"parallel": PARALLEL["zero2"]}
    return on_ranks(2, cases, folder, model=tiny_model, train_file=topic_files["train"]).curves, folder


@pytest.mark.parametrize(("name", "parallel"), [(name, parallel) for name, its in (GOES_ON | SPREAD).items() for parallel in its])
def test_two_workers_equal_one_process(name: str, parallel: str, one: dict[str, Any], two: tuple[dict[str, Curve], Path]) -> None:
    assert_equal(two[0][f"{name} {parallel}"], one[name][0])


@pytest.mark.parametrize(("name", "parallel"), [(name, parallel) for name, its in GOES_ON.items() for parallel in its])
def test_two_workers_go_on_from_the_checkpoint_of_one(
    name: str, parallel: str, one: dict[str, Any], two: tuple[dict[str, Curve], Path]
) -> None:
    assert_equal(two[0][f"{name} {parallel} resumed"], one[name][0][2:])


@pytest.mark.parametrize(("name", "parallel"), [(name, parallel) for name, its in GOES_ON.items() for parallel in its])
def test_one_worker_goes_on_from_the_checkpoint_of_two(
    name: str,
    parallel: str,
    one: dict[str, Any],
    two: tuple[dict[str, Curve], Path],
    tiny_model: Path,
    wide_model: Path,
    topic_files: dict[str, str],
    tmp_path: Path,
) -> None:
    run = shutil.copytree(f"{two[1]}/out.json.{name} {parallel}", tmp_path / "run")
    lose_the_last_checkpoint(run)
    model = wide_model if name == "8 bits" else tiny_model
    job = TWO | ONE[name] | {"parallel": PARALLEL[parallel], "workers": {"num_workers": 1}}
    assert_equal(alone(model, topic_files["train"], job, run), one[name][0][2:])


def test_the_average_is_the_same_on_two_workers_and_when_two_go_on_with_it(one: dict[str, Any], two: tuple[dict[str, Curve], Path]) -> None:
    """The best weights are the average; only the last evaluation writes them."""
    name = "averaged, one_cycle"
    expected = best_weights(one[name][1])
    for run in (f"{two[1]}/out.json.{name} ddp", f"{two[1]}/before {name} ddp"):
        found = best_weights(Path(run))
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, atol=1e-4, rtol=1e-4)
        live = torch.load(Path(run) / "checkpoints" / "step-000004" / "ddp.pt")["weights"]["model.classifier.weight"]
        assert float((live - expected["classifier.weight"]).abs().max()) > 1e-3, "it is not the weights themselves"


def test_each_setting_makes_a_difference_that_would_be_seen(one: dict[str, Any]) -> None:
    for name, other in (("wsd", "unclipped"), ("by layer", "by no layer"), ("averaged, one_cycle", "wsd"), ("grouped", "wsd")):
        losses = [[loss for loss, _ in one[its][0]] for its in (name, other)]
        assert max(abs(a - b) for a, b in zip(*losses, strict=True)) > 10 ** -(PLACES - 2), (name, losses)


def test_a_state_in_bytes_is_not_cut_for_another_number_of_workers_under_deepspeed(
    two: tuple[dict[str, Curve], Path], tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    run = shutil.copytree(f"{two[1]}/out.json.8 bits zero2", tmp_path / "run")
    lose_the_last_checkpoint(run)
    job = TWO | ONE["8 bits"] | {"parallel": PARALLEL["zero2"], "workers": {"num_workers": 1}}
    with pytest.raises(
        CheckpointError, match=r"written by 2 workers, and DeepSpeed cannot put the state of .*=bnb_adamw together for 1"
    ) as told:
        alone(tiny_model, topic_files["train"], job, run)
    assert told.value.fix.startswith("workers.num_workers=2")


def alone(model: Path, train_file: str, job: dict[str, Any], folder: Path) -> Curve:
    torch.set_num_threads(1)
    run = LocalRun(torch.device("cpu"))
    return curve(job_of(str(model), train_file, job), run, run.records, str(folder))


def best_weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForSequenceClassification.from_pretrained(run / "best" / "step-000004").state_dict()
    return state


def lose_the_last_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step-000004" / "manifest.json").unlink()


def assert_equal(found: Curve, expected: Curve) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=10**-PLACES), (found, expected)
