"""Every strategy, any number of workers and any accumulation give the losses and gradient norms of a plain PyTorch loop."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import SLOW_S, Curve, Told, curve, job_of, on_ranks
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from danlu.spec.train import TrainJob
from danlu.tasks import classification, pretrain
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train.run import LocalRun

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "zero2-offload": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3-offload": {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    "fsdp": {"kind": "fsdp"},
    "fsdp-offload": {"kind": "fsdp", "cpu_offload": True, "reshard_after_forward": False},
}
SEVERAL = STRATEGIES | {
    "tensor": {"kind": "tensor", "tensor_parallel_size": 2},
    "pipeline": {"kind": "pipeline", "pipeline_parallel_size": 2},
}
"""Strategies of two workers."""
IN_CONTEXT = {f"context-{name}": STRATEGIES[name] | {"context_parallel_size": 2} for name in ("ddp", "zero2", "zero3", "fsdp")}
"""Two workers that share a decoder's tokens."""
IN_HALF = [*((name, "bf16") for name in SEVERAL | IN_CONTEXT), *((name, "fp16") for name in ("ddp", "fsdp", "tensor", "pipeline"))]
"""DeepSpeed has no float16 on a CPU."""
RESHAPED = ["ddp", "zero1", "zero2", "zero3", "fsdp"]
"""Strategies whose checkpoints another number of workers can go on from."""
WAITING = ["ddp", "fsdp", "pipeline"]
"""Strategies that tell how long a worker waits for others."""
PLACES = 5


def plain_curve(model_folder: Path, train_file: str, learning_rate: float = 2e-3) -> Curve:
    """The same job written by hand: padded batches, one process, no accumulation, nothing of Danlu but the rows and their order."""
    job = job_of(str(model_folder), train_file, {})
    tokenizer = load_tokenizer(model_folder)
    data = classification.splits(job.data, job.task, tokenizer, max_length=32, seed=job.seed)
    torch.manual_seed(job.seed)
    config = AutoConfig.from_pretrained(model_folder, num_labels=3)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, config=config)
    head = ["classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    groups = [
        {"params": [p], "lr": 0.0, "scale": 3.0 if name in head else 1.0, "weight_decay": 0.01 if p.ndim > 1 else 0.0}
        for name, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    order = torch.from_numpy(np.random.default_rng((job.seed, 0)).permutation(len(data.train.labels)))
    found = []
    for step in range(4):
        rows = order[step * 16 : (step + 1) * 16].tolist()
        batch = tokenizer([data.train.texts.texts[i] for i in rows], padding=True, truncation=True, max_length=32, return_tensors="pt")
        labels = torch.tensor([int(data.train.labels[i]) for i in rows])
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        warm = math.ceil(0.1 * 4)
        rate = learning_rate * (step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (4 - warm))))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found


def decoder_case(folder: Path, **overrides: Any) -> dict[str, Any]:
    return {"task": {"kind": "pretrain"}, "model": {"model_name_or_path": str(folder), "max_length": 12}, **overrides}


def plain_decoder_run(model_folder: Path, train_file: str) -> tuple[Curve, dict[str, torch.Tensor]]:
    """A language model by hand: padded batches, one process; each token of the batch weighs the same. Its curve and last weights."""
    job = job_of(str(model_folder), train_file, decoder_case(model_folder))
    tokenizer = load_tokenizer(model_folder)
    data = pretrain.splits(job.data, job.task, tokenizer, max_length=12, seed=job.seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()
    groups = [{"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    order = np.random.default_rng((job.seed, 0)).permutation(len(data.train))
    found = []
    for step in range(4):
        rows = [torch.from_numpy(data.train.encoded.row(int(i)).astype(np.int64)) for i in order[step * 16 : (step + 1) * 16]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (step if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 3)))
        optimizer.step()
        found.append((float(loss.detach()), float(norm)))
    return found, model.state_dict()


@pytest.fixture(scope="module")
def plain(tiny_model: Path, topic_files: dict[str, str]) -> Curve:
    return plain_curve(tiny_model, topic_files["train"])


@pytest.fixture(scope="module")
def plain_decoder(tiny_decoder: Path, topic_files: dict[str, str]) -> tuple[Curve, dict[str, torch.Tensor]]:
    return plain_decoder_run(tiny_decoder, topic_files["train"])


@pytest.fixture(scope="module")
def two_ranks(told: Told) -> dict[str, Curve]:
    return told.curves


@pytest.fixture(scope="module")
def told(tiny_model: Path, tiny_decoder: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What two gloo ranks tell of every strategy and accumulation, in one pair of processes."""
    folder = tmp_path_factory.mktemp("two-ranks")
    cases = {
        f"{name}-{accumulation}": {"parallel": parallel, "workers": {"num_workers": 2}, "micro_batch_size": 8 // accumulation}
        for name, parallel in SEVERAL.items()
        for accumulation in (1, 2)
    }
    for name in RESHAPED:
        uri = str(folder / f"one-{name}")
        shape = {"parallel": STRATEGIES[name], "micro_batch_size": 8}
        _curve(job_of(str(tiny_model), topic_files["train"], shape), uri)
        _lose_the_last_checkpoint(uri)
        cases[f"one-to-two-{name}"] = {**shape, "workers": {"num_workers": 2}, "run_uri": uri}
        cases[f"{name}-1"]["run_uri"] = _two_ranks_wrote(tmp_path_factory, name)
    forgetful = {"folder": str(_with_dropout(tiny_model, folder)), "micro_batch_size": 8}
    cases["dropout-tensor"] = forgetful | {"parallel": SEVERAL["tensor"], "workers": {"num_workers": 2}}
    cases["lora-fsdp"] = {"parallel": STRATEGIES["fsdp"], "workers": {"num_workers": 2}, "tuning": {"kind": "lora"}}
    for name, parallel in (SEVERAL | IN_CONTEXT).items():
        shape = {"parallel": parallel, "workers": {"num_workers": 2}, "micro_batch_size": 4}
        shape["run_uri"] = _two_ranks_wrote(tmp_path_factory, f"decoder-{name}")
        cases[f"decoder-{name}"] = {"folder": str(tiny_decoder)} | decoder_case(tiny_decoder, **shape)
    for name, precision in IN_HALF:
        parallel = (SEVERAL | IN_CONTEXT)[name]
        shape = {"parallel": parallel, "workers": {"num_workers": 2}, "micro_batch_size": 8, "precision": precision}
        cases[f"{name}-{precision}"] = {"folder": str(tiny_decoder)} | decoder_case(tiny_decoder, **shape)
    for name in WAITING:
        cases[f"slow-{name}"] = {"parallel": SEVERAL[name], "workers": {"num_workers": 2}, "micro_batch_size": 8, "slow_on": 1}
    return on_ranks(2, cases, folder, model=tiny_model, train_file=topic_files["train"])


@pytest.fixture(scope="module")
def four_ranks(
    two_ranks: object, tiny_model: Path, tiny_decoder: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Curve]:
    """Two groups of two: curves from the start, and from a checkpoint of one group."""
    written = Path(_two_ranks_wrote(tmp_path_factory, "decoder-tensor"))
    resumed = tmp_path_factory.mktemp("four-ranks") / "resumed"
    shutil.copytree(written, resumed)
    _lose_the_last_checkpoint(str(resumed))
    shape: dict[str, Any] = {"parallel": SEVERAL["tensor"], "workers": {"num_workers": 4}, "micro_batch_size": 4}
    decoder = {"folder": str(tiny_decoder)} | decoder_case(tiny_decoder, **shape)
    cases = {"encoder": shape, "decoder": decoder, "resumed": decoder | {"run_uri": str(resumed)}}
    return on_ranks(4, cases, resumed.parent, model=tiny_model, train_file=topic_files["train"]).curves


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_worker_equals_the_plain_loop(
    strategy: str, accumulation: int, plain: Curve, tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    overrides = {"parallel": STRATEGIES[strategy], "micro_batch_size": 16 // accumulation}
    _assert_equal(_curve(job_of(str(tiny_model), topic_files["train"], overrides), str(tmp_path)), plain)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("strategy", SEVERAL)
def test_two_workers_equal_the_plain_loop(strategy: str, accumulation: int, plain: Curve, two_ranks: dict[str, Curve]) -> None:
    _assert_equal(two_ranks[f"{strategy}-{accumulation}"], plain)


@pytest.mark.parametrize("strategy", SEVERAL | IN_CONTEXT)
def test_a_decoder_on_two_workers_equals_the_plain_loop(
    strategy: str, plain_decoder: tuple[Curve, Any], two_ranks: dict[str, Curve]
) -> None:
    _assert_equal(two_ranks[f"decoder-{strategy}"], plain_decoder[0])


@pytest.mark.parametrize(("strategy", "precision"), IN_HALF)
def test_sixteen_bits_stay_near_the_plain_loop_in_float32(
    strategy: str, precision: str, plain_decoder: tuple[Curve, Any], two_ranks: dict[str, Curve]
) -> None:
    """bfloat16 has 8 bits, float16 has 11: 2^-8 is 0.4 %, and it adds up over a few layers and steps."""
    bound = 0.02 if precision == "bf16" else 0.005
    found = two_ranks[f"{strategy}-{precision}"]
    assert len(found) == len(plain_decoder[0])
    for ours, theirs in zip(found, plain_decoder[0], strict=True):
        assert ours == pytest.approx(theirs, rel=bound), (found, plain_decoder[0])
    assert found != plain_decoder[0]


@pytest.mark.parametrize("strategy", SEVERAL | IN_CONTEXT)
def test_a_decoder_of_two_workers_loads_in_plain_transformers_with_the_plain_loops_weights(
    strategy: str,
    plain_decoder: tuple[Any, dict[str, torch.Tensor]],
    two_ranks: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = Path(_two_ranks_wrote(tmp_path_factory, f"decoder-{strategy}")) / "best" / "step-000004"
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert loaded.keys() == plain_decoder[1].keys()
    for name, weight in plain_decoder[1].items():
        torch.testing.assert_close(loaded[name], weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", RESHAPED)
def test_two_workers_go_on_from_the_checkpoint_of_one(strategy: str, plain: Curve, two_ranks: dict[str, Curve]) -> None:
    _assert_equal(two_ranks[f"one-to-two-{strategy}"], plain[2:])


@pytest.mark.parametrize("strategy", RESHAPED)
def test_one_worker_goes_on_from_the_checkpoint_of_two(
    strategy: str,
    plain: Curve,
    two_ranks: dict[str, Curve],
    tiny_model: Path,
    topic_files: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    uri = _two_ranks_wrote(tmp_path_factory, strategy)
    _lose_the_last_checkpoint(uri)
    job = job_of(str(tiny_model), topic_files["train"], {"parallel": STRATEGIES[strategy], "micro_batch_size": 8})
    _assert_equal(_curve(job, uri), plain[2:])


def test_adapters_on_frozen_shards_learn_like_those_on_whole_weights(
    two_ranks: dict[str, Curve], tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    """The whole-weight ones are held to PEFT by hand in the loop's own tests."""
    job = job_of(str(tiny_model), topic_files["train"], {"tuning": {"kind": "lora"}})
    _assert_equal(two_ranks["lora-fsdp"], _curve(job, str(tmp_path)))


def test_a_sharded_checkpoint_is_written_by_each_worker_for_its_own_half(
    two_ranks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(_two_ranks_wrote(tmp_path_factory, "decoder-fsdp")) / "checkpoints" / "step-000004"
    first, second = sorted(path.stat().st_size for path in folder.glob("*.distcp"))
    assert second < 1.3 * first


def test_two_groups_of_two_split_matrices_equal_the_plain_loop(
    plain: Curve,
    plain_decoder: tuple[Curve, Any],
    four_ranks: dict[str, Curve],
) -> None:
    _assert_equal(four_ranks["encoder"], plain)
    _assert_equal(four_ranks["decoder"], plain_decoder[0])
    _assert_equal(four_ranks["resumed"], plain_decoder[0][2:])


def test_dropout_falls_on_the_same_places_on_all_workers_of_a_group(
    two_ranks: dict[str, Curve], tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    """Of the hidden states, that is: one process draws for all heads at once, so dropout on attention could not be compared."""
    job = job_of(str(_with_dropout(tiny_model, tmp_path)), topic_files["train"], {"micro_batch_size": 8})
    _assert_equal(two_ranks["dropout-tensor"], _curve(job, str(tmp_path / "run")))


@pytest.mark.parametrize("strategy", WAITING)
def test_what_another_worker_takes_longer_is_this_ones_communication_and_the_parts_are_the_step(
    strategy: str, told: Told, plain: Curve
) -> None:
    """Both layers of the other worker are slow, or the one layer of its stage in both passes."""
    usual, slow = told.phases[f"{strategy}-1"], told.phases[f"slow-{strategy}"]
    # A busy machine makes some steps longer, and one run more than the other: the quickest of each are compared.
    quick, waiting = (min(steps, key=lambda step: step["step"]) for steps in (usual, slow))
    waited = {name: waiting[name] - quick[name] for name in waiting}
    assert waited["communication"] > 0.8 * 2 * SLOW_S, (usual, slow)
    assert waited["communication"] == pytest.approx(waited["step"], rel=0.3), (usual, slow)
    for step in slow:
        parts = sum(seconds for name, seconds in step.items() if name != "step")
        assert 0.8 * step["step"] < parts <= step["step"]
    _assert_equal(told.curves[f"slow-{strategy}"], plain)


def test_deepspeed_does_not_tell_how_long_a_worker_waits(told: Told) -> None:
    assert all("communication" not in step for step in told.phases["zero2-1"])


def _with_dropout(model: Path, folder: Path) -> Path:
    copy = folder / "with-dropout"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.2}))
    return copy


def _curve(job: TrainJob, uri: str) -> Curve:
    run = LocalRun(torch.device("cpu"))
    return curve(job, run, run.records, uri)


def _two_ranks_wrote(tmp_path_factory: pytest.TempPathFactory, name: str) -> str:
    return str(tmp_path_factory.getbasetemp() / f"written-by-two-{name}")


def _lose_the_last_checkpoint(uri: str) -> None:
    """As if the run had been killed before step 4: what is left is the checkpoint of step 2."""
    (Path(uri) / "checkpoints" / "step-000004" / "manifest.json").unlink()


def _assert_equal(found: list[Any], plain: Curve) -> None:
    assert len(found) == len(plain) > 0
    for (loss, norm), (plain_loss, plain_norm) in zip(found, plain, strict=True):
        assert round(abs(loss - plain_loss), PLACES) == 0, (found, plain)
        assert round(abs(norm - plain_norm), PLACES) == 0, (found, plain)


def test_the_plain_losses_are_those_of_weights_that_move(plain: Curve, tiny_model: Path, topic_files: dict[str, str]) -> None:
    """Otherwise a strategy whose step does nothing would pass. The first step has a learning rate of zero."""
    assert {norm > 0.5 for _, norm in plain} == {True, False}, "gradients are clipped in some steps and not in others"
    still = plain_curve(tiny_model, topic_files["train"], learning_rate=0.0)
    assert [loss for loss, _ in plain[:2]] == [loss for loss, _ in still[:2]]
    assert all(abs(loss - before) > 10 ** -(PLACES - 2) for (loss, _), (before, _) in zip(plain[2:], still[2:], strict=True))
