"""Optimizers, schedules, parameter groups and the average of the weights: each beside its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model
from pydantic import TypeAdapter, ValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    GPTNeoXConfig,
    T5Config,
    get_scheduler,
)

from danlu.artifact.trainable import num_layers, trained_names
from danlu.spec import optim as spec
from danlu.spec.optim import Optim
from danlu.spec.train import TrainJob
from danlu.spec.tuning import Freeze
from danlu.tasks import classification
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train.ema import Ema
from danlu.train.loop import train
from danlu.train.optim import learning_rate_at, make_optimizer, param_groups
from danlu.train.run import EvalRecord, LocalRun, StepRecord

CPU = torch.device("cpu")


def rates(optim: Optim, steps: int) -> list[float]:
    at = learning_rate_at(optim, steps)
    return [at(step) for step in range(steps)]


def stepped(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


SCHEDULES: dict[str, tuple[spec.Schedule, str, dict[str, Any]]] = {
    "linear": (spec.Linear(warmup_ratio=0.15), "linear", {}),
    "cosine": (spec.Cosine(warmup_ratio=0.15), "cosine", {}),
    "cosine with a floor": (
        spec.Cosine(warmup_ratio=0.15, min_ratio=0.1), "cosine_with_min_lr", {"scheduler_specific_kwargs": {"min_lr_rate": 0.1}},
    ),
    "constant": (spec.Constant(warmup_ratio=0.15), "constant_with_warmup", {}),
    "wsd": (
        spec.Wsd(warmup_ratio=0.15, decay_ratio=0.25),
        "warmup_stable_decay",
        {"scheduler_specific_kwargs": {"num_decay_steps": 5}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_those_of_transformers(name: str) -> None:
    schedule, theirs, extra = SCHEDULES[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=3, num_training_steps=20, **extra)
    assert rates(Optim(learning_rate=0.5, schedule=schedule), 20) == pytest.approx(stepped(scheduler, optimizer, 20))


@pytest.mark.parametrize("steps", [10, 20, 101])
def test_one_cycle_is_torchs(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=steps, pct_start=0.3, cycle_momentum=False)
    expected = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(Optim(learning_rate=0.5, schedule=spec.OneCycle()), steps) == pytest.approx(expected, rel=1e-6)


def lion_by_hand(weight: torch.Tensor, grads: list[torch.Tensor], rate: float, decay: float) -> torch.Tensor:
    momentum = torch.zeros_like(weight)
    for grad in grads:
        weight = weight * (1 - rate * decay) - rate * torch.sign(0.9 * momentum + 0.1 * grad)
        momentum = 0.99 * momentum + 0.01 * grad
    return weight


def adamw_by_hand(weight: torch.Tensor, grads: list[torch.Tensor], rate: float, decay: float) -> torch.Tensor:
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, start=1):
        weight = weight * (1 - rate * decay)
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        weight = weight - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


@pytest.mark.parametrize(
    ("optimizer", "by_hand", "bound"),
    [
        ({"kind": "adamw"}, adamw_by_hand, 1e-6),
        ({"kind": "bnb_adamw", "bits": 32}, adamw_by_hand, 1e-5),
        ({"kind": "bnb_adamw", "bits": 8}, adamw_by_hand, 5e-3),
        ({"kind": "lion"}, lion_by_hand, 1e-6),
    ],
)
def test_an_optimizer_moves_weights_as_its_paper_says(optimizer: dict[str, Any], by_hand: Any, bound: float) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 80))
    grads = [torch.randn(64, 80) for _ in range(5)]
    expected = by_hand(weight.detach().clone(), grads, 0.01, 0.1)
    start = weight.detach().clone()
    optim = TypeAdapter(Optim).validate_python({"optimizer": optimizer, "learning_rate": 0.01})
    ours = make_optimizer([{"params": [weight], "weight_decay": 0.1}], optim)
    for grad in grads:
        weight.grad = grad
        ours.step()
    assert (weight - expected).abs().mean() < bound
    assert (start - expected).abs().mean() > 0.01


def test_adafactor_is_torchs_and_learns() -> None:
    torch.manual_seed(0)
    weight, target = torch.nn.Parameter(torch.randn(16, 16)), torch.randn(16, 16)
    optim = Optim(optimizer=spec.Adafactor(), learning_rate=0.1)
    ours = make_optimizer([{"params": [weight], "weight_decay": 0.0}], optim)
    assert isinstance(ours, torch.optim.Adafactor)
    before = float((weight - target).square().mean().detach())
    for _ in range(50):
        loss = (weight - target).square().mean()
        ours.zero_grad()
        loss.backward()
        ours.step()
    assert float(loss.detach()) < before / 10


def test_each_layer_learns_slower_than_the_one_above_it(tiny_model: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    head = classification.head_parameters(model)
    optim = Optim(layer_learning_rate_decay=0.5, head_learning_rate_multiplier=4.0)
    scales = {id(p): group["lr_scale"] for group in param_groups(model, optim, head, {}) for p in group["params"]}
    by_name = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name["classifier.weight"] == 4.0
    assert by_name["bert.encoder.layer.1.output.dense.weight"] == 0.5
    assert by_name["bert.encoder.layer.0.output.dense.bias"] == 0.25
    assert by_name["bert.embeddings.word_embeddings.weight"] == 0.125
    decays = {id(p): group["weight_decay"] for group in param_groups(model, optim, head, {}) for p in group["params"]}
    assert decays[id(model.classifier.bias)] == 0.0
    assert decays[id(model.classifier.weight)] == 0.01


WITHOUT_A_HEAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "chat": ({"kind": "chat"}, {"kind": "full"}, "task.kind=chat trains pretrained weights only and has no head; leave it out"),
    "preference": ({"kind": "preference"}, {"kind": "lora"}, "has no head"),
    "seq2seq": ({"kind": "seq2seq"}, {"kind": "full"}, "has no head"),
    "causal": ({"kind": "pretrain"}, {"kind": "full"}, "task.objective.kind=causal trains pretrained weights only"),
    "embedding": ({"kind": "embedding"}, {"kind": "full"}, "has no head"),
    "a frozen output layer": (
        {"kind": "pretrain", "objective": {"kind": "masked"}},
        {"kind": "lora"},
        "tuning.kind=lora leaves the output layer of task.kind=pretrain with task.objective.kind=masked as it is.*tuning.kind=full",
    ),
}
WITH_A_HEAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "labels": ({"kind": "classification"}, {"kind": "lora"}),
    "questions": ({"kind": "extractive_qa"}, {"kind": "adapter"}),
    "masked": ({"kind": "pretrain", "objective": {"kind": "masked"}}, {"kind": "freeze"}),
}


@pytest.mark.parametrize("case", [*WITHOUT_A_HEAD, *WITH_A_HEAD])
def test_a_rate_of_a_head_is_refused_where_there_is_none(case: str, tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    def job(multiplier: float) -> TrainJob:
        task, tuning = (WITHOUT_A_HEAD | WITH_A_HEAD)[case][:2]  # type: ignore[operator]
        fields = {"task": task, "tuning": tuning, "optim": {"head_learning_rate_multiplier": multiplier}}
        return job_of(tiny_model, topic_files, tmp_path, **fields)

    assert job(1.0).optim.head_learning_rate_multiplier == 1.0
    if case in WITH_A_HEAD:
        assert job(5.0).optim.head_learning_rate_multiplier == 5.0
        return
    with pytest.raises(ValidationError, match=r"optim.head_learning_rate_multiplier=5 has no effect: .*" + WITHOUT_A_HEAD[case][2]):
        job(5.0)


def test_rates_by_layer_are_refused_where_nothing_in_the_layers_is_trained(
    tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    optim = {"layer_learning_rate_decay": 0.9}
    for kind in ("prompt", "p_tuning", "prefix"):
        with pytest.raises(ValidationError, match=rf"layer_learning_rate_decay=0.9 has no effect: tuning.kind={kind} .*tuning.kind=lora"):
            job_of(tiny_model, topic_files, tmp_path, optim=optim, tuning={"kind": kind})
    assert job_of(tiny_model, topic_files, tmp_path, optim=optim, tuning={"kind": "lora"})


FAMILIES = {
    "t5": (T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40), "shared.weight", "encoder.block.0."),
    "bart": (
        BartConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            vocab_size=40,
            max_position_embeddings=32,
        ),
        "model.shared.weight",
        "model.encoder.layers.0.",
    ),
    "gpt_neox": (
        GPTNeoXConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40),
        "gpt_neox.embed_in.weight",
        "gpt_neox.layers.0.",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_found_in_other_families_whatever_they_are_called(family: str) -> None:
    """They learn slowest, and stay where only the last layers are trained; an output layer of its own is not one of them."""
    config, embeddings, first = FAMILIES[family]
    kind = AutoModelForCausalLM if family == "gpt_neox" else AutoModelForSeq2SeqLM
    model = kind.from_config(config)
    names = [name for name, _ in model.named_parameters()]
    groups = param_groups(model, Optim(layer_learning_rate_decay=0.5), set(), {})
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    by_name = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name[embeddings] == 0.125
    assert {scale for name, scale in by_name.items() if name.startswith(first)} == {0.25}
    assert by_name.get("embed_out.weight", 1.0) == 1.0
    trained = trained_names(names, Freeze(num_trainable_layers=1))
    assert trained
    assert embeddings not in trained
    assert not any(name.startswith(first) for name in trained)
    assert num_layers(config.to_dict()) == (2 if family == "gpt_neox" else 4)


def job_of(model: Path, files: dict[str, str], folder: Path, **overrides: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "name": "optim",
        "model": {"model_name_or_path": str(model), "max_length": 32},
        "data": {"train": files["train"], "cache_dir": str(folder / "cache")},
        "optim": {"learning_rate": 3e-3},
        "precision": "fp32",
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "max_steps": 12,
    }
    return TrainJob.model_validate(fields | overrides)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bitsandbytes keeps the state of weights of less than 4,096 elements in 32 bits, whatever it is told."""
    return write_tiny_model(tmp_path_factory.mktemp("wide-bert"), hidden_size=64)


def run_of(job: TrainJob, model: Path, uri: str, listener: Any = None) -> LocalRun:
    run = LocalRun(CPU, listener)
    tokenizer = load_tokenizer(model)
    data = classification.splits(job.data, job.task, tokenizer, max_length=32, seed=job.seed)
    train(job, data, model, tokenizer, run, uri)
    return run


@pytest.mark.parametrize(
    ("optimizer", "rate", "parallel"),
    [
        ({"kind": "bnb_adamw"}, 5e-3, {"kind": "deepspeed", "zero_stage": 2}),
        ({"kind": "lion"}, 2e-3, {"kind": "deepspeed", "zero_stage": 1}),
        ({"kind": "lion", "bits": 8}, 2e-3, {"kind": "ddp"}),
        ({"kind": "adafactor"}, 3e-2, {"kind": "ddp"}),
    ],
)
def test_every_optimizer_learns_in_the_loop(
    optimizer: dict[str, Any], rate: float, parallel: dict[str, Any], wide_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    optim = {"optimizer": optimizer, "learning_rate": rate, "schedule": {"kind": "constant"}}
    job = job_of(wide_model, topic_files, tmp_path, optim=optim, parallel=parallel, max_steps=40)
    found = [record.loss for record in run_of(job, wide_model, str(tmp_path / "run")).records if isinstance(record, StepRecord)]
    assert sum(found[-5:]) / 5 < 0.6 * sum(found[:5]) / 5


class Killed(Exception):
    pass


def test_the_average_is_what_is_scored_and_a_resumed_run_has_the_same(
    tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    optim = {"learning_rate": 3e-3, "ema_decay": 0.8}
    job = job_of(tiny_model, topic_files, tmp_path, optim=optim, checkpoint={"save_steps": 4}, evaluation={"eval_steps": 3})

    def scores(run: LocalRun) -> dict[int, float]:
        return {record.step: record.metrics["loss"] for record in run.records if isinstance(record, EvalRecord)}

    whole = scores(run_of(job, tiny_model, str(tmp_path / "whole")))

    def killer(record: object) -> None:
        if isinstance(record, StepRecord) and record.step == 7:
            raise Killed

    with pytest.raises(Killed):
        run_of(job, tiny_model, str(tmp_path / "broken"), killer)
    rest = scores(run_of(job, tiny_model, str(tmp_path / "broken")))
    assert rest == pytest.approx({step: loss for step, loss in whole.items() if step > 4}, abs=1e-6)
    without = job_of(tiny_model, topic_files, tmp_path, evaluation={"eval_steps": 3})
    assert scores(run_of(without, tiny_model, str(tmp_path / "without")))[12] != pytest.approx(whole[12], abs=1e-4)


ZERO2 = {"kind": "deepspeed", "zero_stage": 2}
RESUMED: dict[str, dict[str, Any]] = {
    "8 bits": {"optim": {"optimizer": {"kind": "bnb_adamw"}}},
    "8 bits, ZeRO-2": {"optim": {"optimizer": {"kind": "bnb_adamw"}}, "parallel": ZERO2},
    "8 bits, ZeRO-3": {"optim": {"optimizer": {"kind": "bnb_adamw"}}, "parallel": ZERO2 | {"zero_stage": 3}},
    "lion": {"optim": {"optimizer": {"kind": "lion"}}, "parallel": ZERO2},
    "lion in 8 bits": {"optim": {"optimizer": {"kind": "lion", "bits": 8}}},
    "adafactor": {"optim": {"optimizer": {"kind": "adafactor"}, "learning_rate": 3e-2}},
    "wsd": {"optim": {"schedule": {"kind": "wsd", "decay_ratio": 0.6}}},
    "one_cycle": {"optim": {"schedule": {"kind": "one_cycle", "warmup_ratio": 0.5}}},
    "by layer, averaged": {
        "optim": {"layer_learning_rate_decay": 0.5, "head_learning_rate_multiplier": 4.0, "ema_decay": 0.8, "max_grad_norm": 0.2},
        "tuning": {"kind": "lora", "r": 4},
        "micro_batch_size": 4,
    },
    "by length": {"group_by_length": True, "micro_batch_size": 4},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_goes_on_as_if_it_had_not_been(name: str, wide_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    fields = {"learning_rate": 5e-3} | RESUMED[name].get("optim", {})
    shape = {"max_steps": 8, "checkpoint": {"save_steps": 3}, "evaluation": {"eval_steps": 8}}
    job = job_of(wide_model, topic_files, tmp_path, **shape | RESUMED[name] | {"optim": fields})

    def told(run: LocalRun) -> dict[int, tuple[float, ...]]:
        """Of each step after the checkpoint; the evaluation's under 0."""
        steps = [record for record in run.records if isinstance(record, StepRecord) and record.step > 3]
        scored = [record.metrics["loss"] for record in run.records if isinstance(record, EvalRecord)]
        return {record.step: (record.loss, record.learning_rate, record.grad_norm) for record in steps} | {0: tuple(scored)}

    def killer(record: object) -> None:
        if isinstance(record, StepRecord) and record.step == 5:
            raise Killed

    whole = told(run_of(job, wide_model, str(tmp_path / "whole")))
    with pytest.raises(Killed):
        run_of(job, wide_model, str(tmp_path / "broken"), killer)
    assert told(run_of(job, wide_model, str(tmp_path / "broken"))) == {
        step: pytest.approx(found, abs=1e-6) for step, found in whole.items()
    }
    assert whole.keys() == {0, 4, 5, 6, 7, 8}
    if name in ("8 bits", "lion in 8 bits"):
        assert torch.uint8 in stored_types(tmp_path / "whole")


def stored_types(run: Path) -> set[torch.dtype]:
    """Of the optimizer's state in the last checkpoint; bitsandbytes puts a weight's into a mapping of its own."""
    file = max((run / "checkpoints").glob("step-*/ddp.pt"))
    states = [its for state in torch.load(file, weights_only=True)["optimizer"]["state"].values() for its in (state, *state.values())]
    return {value.dtype for state in states if isinstance(state, dict) for value in state.values() if torch.is_tensor(value)}


def test_the_average_is_torchs_ema() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)
    ours = Ema(module, 0.9)
    reference = [parameter.detach().clone() for parameter in module.parameters()]
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(step)
        share = max(0.1, 1 / (step + 1))
        reference = [(1 - share) * old + share * new.detach() for old, new in zip(reference, module.parameters(), strict=True)]
    live = [parameter.detach().clone() for parameter in module.parameters()]
    with ours.applied():
        torch.testing.assert_close(list(module.parameters()), reference)
    torch.testing.assert_close(list(module.parameters()), live)


@pytest.mark.parametrize(
    ("optim", "parallel", "told"),
    [
        ({"optimizer": {"kind": "adafactor"}}, {"kind": "deepspeed"}, "adafactor"),
        (
            {"optimizer": {"kind": "bnb_adamw"}},
            {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/mnt"},
            "bits=8 keeps its state in bytes.*bits=32, or offload to cpu",
        ),
        ({"ema_decay": 0.9}, {"kind": "deepspeed"}, "optim.ema_decay"),
        ({"optimizer": {"kind": "bnb_adamw", "paged": True}}, {"kind": "ddp"}, "paged"),
        ({"schedule": {"kind": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}}, {"kind": "ddp"}, "at most 1"),
    ],
)
def test_what_cannot_work_is_refused(
    optim: dict[str, Any], parallel: dict[str, Any], told: str, tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=told):
        job_of(tiny_model, topic_files, tmp_path, optim=optim, parallel=parallel)
