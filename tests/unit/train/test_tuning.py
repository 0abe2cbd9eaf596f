"""Every way of tuning: it learns, its bundle gives the live model's answers, and as many numbers are trained as the plan says."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from danlu.artifact.runs import open_run
from danlu.compress.load import load_judge
from danlu.compress.quantize import quantize
from danlu.data.pack import Batches, pack_rows
from danlu.errors import ModelError, SpecError
from danlu.evaluate.score import evaluate
from danlu.handover import Trained, make_bundle
from danlu.sdk import prepare
from danlu.spec.compress import Int8
from danlu.spec.task import MaskedLm, Pretrain
from danlu.spec.train import TrainJob
from danlu.spec.tuning import Adapter
from danlu.tasks import pretrain
from danlu.tasks.bottleneck import insert
from danlu.tasks.judge import DecoderJudge
from danlu.train import loop
from danlu.train.model import build
from danlu.train.optim import param_groups, set_learning_rate
from danlu.train.run import EventRecord, LocalRun, Record, StepRecord
from danlu.train.worker import work

DDP = {"kind": "ddp"}
ZERO2 = {"kind": "deepspeed", "zero_stage": 2}
ZERO3 = {"kind": "deepspeed", "zero_stage": 3}
ADALORA = {"kind": "adalora", "init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 8, "deltaT": 2, "lora_alpha": 12.0}
METHODS: dict[str, dict[str, Any]] = {
    "qlora 4": {"kind": "qlora", "r": 4, "lora_alpha": 8.0},
    "qlora 8": {"kind": "qlora", "r": 4, "lora_alpha": 8.0, "bits": 8},
    "freeze": {"kind": "freeze", "num_trainable_layers": 1},
    "rslora, lora+": {"kind": "lora", "r": 4, "lora_alpha": 8.0, "use_rslora": True, "loraplus_lr_ratio": 2.0},
    "dora": {"kind": "lora", "r": 4, "lora_alpha": 8.0, "use_dora": True},
    "pissa": {"kind": "lora", "r": 4, "lora_alpha": 8.0, "init_lora_weights": "pissa"},
    "pissa, rslora": {"kind": "lora", "r": 4, "lora_alpha": 8.0, "init_lora_weights": "pissa_niter_16", "use_rslora": True},
    "olora": {"kind": "lora", "r": 4, "lora_alpha": 8.0, "init_lora_weights": "olora"},
    "adalora": ADALORA,
    "ia3": {"kind": "ia3"},
    "pfeiffer": {"kind": "adapter", "bottleneck_size": 8, "non_linearity": "gelu"},
    "prompt": {"kind": "prompt", "num_virtual_tokens": 5},
    "p_tuning": {"kind": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 5},
    "houlsby": {"kind": "adapter", "bottleneck_size": 8, "placement": "houlsby"},
}
NOT_SHARDED = ["adalora", "prompt", "p_tuning", "prefix"]
PATIENT = {
    "global_batch_size": 64,
    "micro_batch_size": 64,
    "max_steps": 60,
    "evaluation": {"eval_steps": 60, "metric_for_best_model": "loss"},
}
"""A prompt alone has little to turn in an encoder of random weights."""
BOUND = 2e-5
"""Of logits and of a row's summed loss, float32: a merged weight is rounded once more than an adapter beside it."""


@dataclass
class Live:
    """What a run gave: its records, and what the model answered on the dev rows right after its last step."""

    job: TrainJob
    run: LocalRun
    outputs: np.ndarray
    trained: Trained

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.run.records if isinstance(record, StepRecord)]


class Setting:
    def __init__(self, models: dict[str, Path], files: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models, self.files, self.folder, self.monkeypatch = models, files, folder, monkeypatch

    def job(self, task: str, tuning: dict[str, Any], parallel: dict[str, Any] = DDP, **overrides: Any) -> TrainJob:
        fields: dict[str, Any] = {
            "name": "tuning",
            "model": {"model_name_or_path": str(self.models[task]), "max_length": 16},
            "data": {"train": self.files["train"], "test": self.files["test"], "cache_dir": str(self.folder / "cache")},
            "task": {"kind": task},
            "optim": {"learning_rate": 0.1 if "num_virtual_tokens" in tuning else 1e-2, "schedule": {"kind": "constant"}},
            "evaluation": {"eval_steps": 24, "metric_for_best_model": "loss"},
            "precision": "fp32",
            "global_batch_size": 16,
            "micro_batch_size": 16,
            "max_steps": 24,
            "storage": str(self.folder / "storage"),
            "tuning": tuning,
            "parallel": parallel,
        }
        return TrainJob.model_validate(fields | overrides)

    def train(self, job: TrainJob) -> Live:
        """As the SDK does, in this process; what `score_rows` gives is looked at on its way."""
        torch.set_num_threads(1)
        prepared = prepare(job, calibrate=False)
        run, folder = LocalRun(torch.device("cpu")), open_run(job.storage, job.name, "digest", fresh=True)
        seen: list[np.ndarray] = []
        whole = loop.score_rows
        with self.monkeypatch.context() as patch:
            patch.setattr(loop, "score_rows", lambda *args, **named: seen.append(whole(*args, **named)) or seen[-1])
            outcome = work(job, run, folder.uri, prepared.splits)
        return Live(job, run, seen[-1], make_bundle(prepared, folder, asdict(outcome), "digest"))


@pytest.fixture
def setting(tiny_model: Path, tiny_decoder: Path, topic_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting({"classification": tiny_model, "pretrain": tiny_decoder}, topic_files, tmp_path, monkeypatch)


def assert_its_bundle_is_the_live_model(setting: Setting, live: Live) -> None:
    dev = prepare(live.job, calibrate=False).splits.dev
    judge = load_judge(live.trained.bundle)
    np.testing.assert_allclose(evaluate(judge, dev).outputs, live.outputs, rtol=BOUND, atol=BOUND)
    probes = live.trained.bundle.meta.probes
    if isinstance(judge, DecoderJudge):
        assert judge.losses([probe.text for probe in probes]) == pytest.approx([probe.loss for probe in probes], abs=1e-6)
    else:
        again = judge.predict([probe.text for probe in probes])
        assert [found.label for found in again] == [probe.label for probe in probes]
        np.testing.assert_allclose([found.probabilities for found in again], [probe.probabilities for probe in probes], atol=1e-6)


@pytest.mark.parametrize("method", NOT_SHARDED)
def test_what_zero3_cannot_train_is_refused_with_the_reason(method: str, setting: Setting) -> None:
    with pytest.raises(ValidationError, match=r"tuning.kind=\w+ does not go with parallel.zero_stage=3: .*; use "):
        setting.job("pretrain", METHODS[method], ZERO3)


FSDP = {"kind": "fsdp"}
NOT_TAKEN = {
    "ranks that FSDP cuts": (METHODS["adalora"], {"parallel": FSDP}, r"adalora does not go with parallel.kind=fsdp: .*; use "),
    "8 bits that FSDP cuts": (
        METHODS["qlora 8"],
        {"parallel": FSDP},
        r"tuning.bits=8 does not go with parallel.kind=fsdp.*; use tuning.bits=4",
    ),
    "a cache filled twice": (
        METHODS["prefix"],
        {"model": {"model_name_or_path": "m", "gradient_checkpointing": True}},
        r"model.gradient_checkpointing does not go with tuning.kind=prefix.*; leave it out",
    ),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_would_fail_in_a_worker_or_train_something_else_is_refused(name: str, setting: Setting) -> None:
    tuning, overrides, told = NOT_TAKEN[name]
    with pytest.raises(ValidationError, match=told):
        setting.job("pretrain", tuning, **overrides)


PLACES = [
    pytest.param("classification", DDP, id="labels-ddp"),
    pytest.param("classification", ZERO2, id="labels-zero2", marks=pytest.mark.soak),
    pytest.param("pretrain", DDP, id="text-ddp", marks=pytest.mark.soak),
    pytest.param("pretrain", ZERO2, id="text-zero2"),
]
"""Each method meets both kinds of model and both strategies; the other two pairs are soak tests."""


@pytest.mark.parametrize(("task", "parallel"), PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_its_bundle_answers_as_the_live_model_did(method: str, task: str, parallel: dict[str, Any], setting: Setting) -> None:
    patient = PATIENT if (method, task) == ("prompt", "classification") else {}
    live = setting.train(setting.job(task, METHODS[method], parallel, **patient))
    assert np.mean(live.losses[-4:]) < live.losses[0] - 0.05
    assert_its_bundle_is_the_live_model(setting, live)


@pytest.mark.parametrize("task", ["classification", "pretrain"])
@pytest.mark.parametrize("method", [*METHODS, "lora by name"])
def test_as_many_numbers_are_trained_as_the_plan_says(method: str, task: str, setting: Setting) -> None:
    named = ["query", "value"] if task == "classification" else ["q_proj", "down_proj"]
    tuning = METHODS.get(method, {"kind": "lora", "r": 3, "target_modules": named})
    job = setting.job(task, tuning)
    prepared = prepare(job, calibrate=False)
    trainee = build(job, prepared.folder, prepared.splits.label_names, num_steps=24)
    trained = sum(p.numel() for p in trainee.module.parameters() if p.requires_grad)
    assert prepared.plan.num_trainable == trained
    assert 0 < trained < prepared.plan.num_parameters


def test_the_frozen_layers_do_not_move_and_the_others_do(setting: Setting) -> None:
    live = setting.train(setting.job("pretrain", METHODS["freeze"]))
    after = load_judge(live.trained.bundle).model.model.state_dict()
    before = pretrain.build_model(setting.models["pretrain"]).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("model.layers.1.")} | {"model.norm.weight"}


def test_weights_that_stand_in_two_places_are_stored_once(setting: Setting) -> None:
    """As transformers stores them: of a large vocabulary the output layer is as much as all embeddings over again."""
    live = setting.train(setting.job("pretrain", {"kind": "full"}, max_steps=4))
    stored = load_file(live.trained.bundle.path / "model" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(setting.models["pretrain"])
    assert stored.keys() == {name for name, _ in model.named_parameters()} < set(model.state_dict())
    assert_its_bundle_is_the_live_model(setting, live)


def test_more_layers_than_there_are_is_refused_before_anything_starts(setting: Setting) -> None:
    with pytest.raises(SpecError, match=r"tuning.num_trainable_layers: 3 layers are to be trained; the model has 2"):
        prepare(setting.job("classification", {"kind": "freeze", "num_trainable_layers": 3}), calibrate=False)


def test_a_schedule_that_leaves_no_step_to_move_ranks_in_is_refused(setting: Setting) -> None:
    with pytest.raises(ValidationError, match="leave no step of max_steps=3"):
        setting.job("classification", ADALORA, max_steps=3)
    with pytest.raises(SpecError, match=r"tuning.tfinal: tinit=1 and tfinal=90 leave none of the \d+ steps"):
        prepare(setting.job("classification", ADALORA | {"tfinal": 90}, max_steps=None), calibrate=False)


def test_loraplus_trains_b_faster_by_the_ratio_than_a(setting: Setting) -> None:
    job = setting.job("pretrain", METHODS["rslora, lora+"])
    trainee = build(job, setting.models["pretrain"], [])
    groups = param_groups(trainee.module, job.optim, trainee.head, trainee.lr_scales)
    set_learning_rate(groups, 0.1)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in trainee.module.named_parameters() if p.requires_grad}
    peft = create_loraplus_optimizer(trainee.module.model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=2.0)
    theirs = {id(p): group["lr"] for group in peft.param_groups for p in group["params"]}
    assert found == {name: pytest.approx(theirs[id(p)]) for name, p in trainee.module.named_parameters() if p.requires_grad}
    assert set(found.values()) == {0.1, 0.2}


def test_adalora_gives_the_losses_and_ranks_of_peft_by_hand(setting: Setting) -> None:
    """Without clipping; the penalty is in what is trained and not in what is shown."""
    optim = {"learning_rate": 1e-2, "max_grad_norm": None, "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup_ratio": 0.0}}
    job = setting.job("pretrain", ADALORA, optim=optim, max_steps=12)
    live = setting.train(job)
    rows = prepare(job, calibrate=False).splits.train.encoded
    torch.manual_seed(job.seed)
    named = {name: ADALORA[name] for name in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "lora_alpha")}
    config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", total_step=12, **named)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(setting.models["pretrain"]), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-8, weight_decay=0.0)
    batches = Batches(rows, None, global_batch_size=16, micro_batch_size=16, rank=0, world_size=1, seed=job.seed)
    expected = []
    for step in range(12):
        pieces = [torch.from_numpy(rows.row(int(i)).astype(np.int64)) for i in batches.rows_of(step)]
        ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in pieces], batch_first=True)
        with torch.no_grad():
            labels = ids.masked_fill(mask == 0, -100)
            expected.append(float(model.base_model.model(input_ids=ids, attention_mask=mask, labels=labels).loss))
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    assert live.losses == pytest.approx(expected, abs=2e-4)
    last = [record.detail for record in live.run.records if isinstance(record, EventRecord) and record.event == "ranks"][-1]
    kept = {name.partition(".lora_E")[0]: sum(mask) for name, mask in model.peft_config["default"].rank_pattern.items()}
    assert last.endswith(", ".join(f"{name} {rank}" for name, rank in kept.items()))
    assert 0 < sum(kept.values()) == ADALORA["target_r"] * len(kept)
    assert len(set(kept.values())) > 1


def test_an_averaged_adalora_is_scored_and_stored_with_the_ranks_that_were_decided(setting: Setting) -> None:
    """The average of a direction that was put out is not zero by itself: the bundle would have all ranks that the run began with."""
    optim = {"learning_rate": 1e-2, "ema_decay": 0.9, "schedule": {"kind": "constant"}}
    live = setting.train(setting.job("pretrain", ADALORA, optim=optim))
    assert_its_bundle_is_the_live_model(setting, live)
    stored = json.loads((live.trained.bundle.path / "model" / "adapter_config.json").read_text())["rank_pattern"]
    last = [record.detail for record in live.run.records if isinstance(record, EventRecord) and record.event == "ranks"][-1]
    ranks = [f"{name.partition('.lora_E')[0]} {sum(kept)}" for name, kept in stored.items()]
    assert sorted(last.partition(": ")[2].split(", ")) == sorted(ranks)
    assert sum(sum(kept) for kept in stored.values()) == ADALORA["target_r"] * len(ranks)


KILLED = {
    f"{method} {name}": (method, parallel)
    for name, parallel, methods in (
        ("ddp", DDP, ("adalora", "pissa")),
        ("zero2", ZERO2, ("adalora", "pissa", "qlora 8")),
        ("zero3", ZERO3, ("qlora 4", "qlora 8")),
        ("fsdp", FSDP, ("qlora 4", "prompt")),
    )
    for method in methods
}


@pytest.mark.parametrize(("method", "parallel"), KILLED.values(), ids=KILLED)
def test_a_killed_run_goes_on_to_the_losses_and_ranks_of_the_uninterrupted_one(
    method: str, parallel: dict[str, Any], setting: Setting
) -> None:
    job = setting.job("pretrain", METHODS[method], parallel, max_steps=14, checkpoint={"save_steps": 5})
    prepared = prepare(job, calibrate=False)

    def killed(record: object) -> None:
        if isinstance(record, StepRecord) and record.step == 7:
            raise KeyboardInterrupt

    whole, rest = LocalRun(torch.device("cpu")), LocalRun(torch.device("cpu"))
    work(job, whole, str(setting.folder / "whole"), prepared.splits)
    with pytest.raises(KeyboardInterrupt):
        work(job, LocalRun(torch.device("cpu"), killed), str(setting.folder / "broken"), prepared.splits)
    work(job, rest, str(setting.folder / "broken"), prepared.splits)
    both = [
        [(r.step, r.loss) if isinstance(r, StepRecord) else (r.step, r.detail) for r in run.records if told(r)] for run in (whole, rest)
    ]
    assert both[1]
    assert both[0] == both[1]


def told(record: Record) -> bool:
    """What a resumed run must tell again, word by word."""
    return record.step > 5 and (isinstance(record, StepRecord) or (isinstance(record, EventRecord) and record.event == "ranks"))


def test_a_decoders_prompt_gives_the_losses_of_peft_by_hand(setting: Setting) -> None:
    """The first token of a row is no target, though behind a prompt it could be one."""
    for method in ("prompt", "p_tuning", "prefix"):
        job = setting.job("pretrain", METHODS[method])
        trainee = build(job, setting.models["pretrain"], [])
        rows = prepare(job, calibrate=False).splits.train.encoded
        batch = pack_rows(rows, [0, 1, 2])
        ours = trainee.module.eval()(batch.input_ids, batch.position_ids, batch.cu_seqlens)
        for index in range(3):
            ids = torch.from_numpy(rows.row(index).astype(np.int64))[None]
            model = trainee.module.model
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
            loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
            assert float(ours[index]) == pytest.approx(float(loss), rel=1e-5)


def test_a_prompt_that_does_not_fit_in_front_of_the_longest_row_is_refused(setting: Setting) -> None:
    with pytest.raises(SpecError, match=r"50 virtual tokens and model.max_length=16 are more than the model's 64 positions"):
        prepare(setting.job("classification", {"kind": "prompt", "num_virtual_tokens": 50}), calibrate=False)


@pytest.mark.parametrize("task", ["classification", "pretrain"])
def test_ia3_finds_the_feed_forward_and_bottlenecks_start_as_the_pretrained_model(task: str, setting: Setting) -> None:
    ia3 = build(setting.job(task, METHODS["ia3"]), setting.models[task], ["a", "b"])
    factors = {name.rpartition(".ia3_l")[0]: tuple(p.shape) for name, p in ia3.module.named_parameters() if ".ia3_l." in name}
    second = ".output.dense" if task == "classification" else ".mlp.down_proj"
    assert {shape[0] == 1 for name, shape in factors.items() if name.endswith(second)} == {True}
    assert {shape[1] == 1 for name, shape in factors.items() if not name.endswith(second)} == {True}
    outputs = []
    for method in ("houlsby", "freeze"):
        trainee = build(setting.job(task, METHODS[method]), setting.models[task], ["a", "b"])
        batch = pack_rows(prepare(setting.job(task, METHODS[method]), calibrate=False).splits.train.encoded, [0, 1, 2])
        with torch.no_grad():
            outputs.append(trainee.module.eval()(batch.input_ids, batch.position_ids, batch.cu_seqlens))
    assert torch.equal(outputs[0], outputs[1])


def test_a_bottleneck_is_the_two_layers_of_the_paper(setting: Setting) -> None:
    torch.manual_seed(0)
    model = pretrain.build_model(setting.models["pretrain"])
    insert(model, Adapter(bottleneck_size=8, non_linearity="silu"))
    layer = model.model.layers[1].mlp.down_proj
    torch.nn.init.normal_(layer.bottleneck.up.weight)
    x = torch.randn(3, 64)
    h = x @ layer.weight.T
    inner = h @ layer.bottleneck.down.weight.T + layer.bottleneck.down.bias
    expected = h + (inner * torch.sigmoid(inner)) @ layer.bottleneck.up.weight.T + layer.bottleneck.up.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("method", ["dora", "pfeiffer"])
def test_a_pooler_that_the_weights_file_has_not_is_stored_with_the_adapter(method: str, setting: Setting, tmp_path: Path) -> None:
    """It starts at random: a bundle without it would answer differently at every load."""
    shutil.copytree(setting.models["classification"], tmp_path / "no-pooler")
    weights = load_file(tmp_path / "no-pooler" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "no-pooler" / "model.safetensors", {"format": "pt"})
    setting.models["classification"] = tmp_path / "no-pooler"
    assert_its_bundle_is_the_live_model(setting, setting.train(setting.job("classification", METHODS[method], max_steps=4)))


def test_what_cannot_be_merged_is_not_quantized(setting: Setting) -> None:
    live = setting.train(setting.job("classification", METHODS["pfeiffer"], max_steps=2))
    with pytest.raises(ModelError, match="was tuned by adapter, which does not end in full-precision weights"):
        quantize(live.trained.bundle, Int8(), setting.folder / "int8")
    with pytest.raises(ValidationError, match="compress takes full-precision weights"):
        setting.job("classification", METHODS["prompt"], compress={})


SHARED = {
    "lora": {"kind": "lora", "r": 4, "target_modules": ["q_proj", "lm_head"]},
    "pissa": {"kind": "lora", "r": 4, "init_lora_weights": "pissa", "target_modules": ["embed_tokens"]},
    "adalora": ADALORA | {"target_modules": ["lm_head"]},
    "ia3": {"kind": "ia3", "target_modules": ["lm_head", "k_proj"]},
}


@pytest.mark.parametrize("method", SHARED)
def test_an_adapter_of_weights_that_stand_in_two_places_is_refused_before_anything_starts(method: str, setting: Setting) -> None:
    """Live it changes one of the two, merged it would change both."""
    with pytest.raises(SpecError, match="shares its weights with") as told:
        prepare(setting.job("pretrain", SHARED[method]), calibrate=False)
    assert told.value.where == "tuning.target_modules"
    beside = {"kind": "qlora", "r": 4, "target_modules": ["q_proj", "lm_head"]}
    assert prepare(setting.job("pretrain", beside), calibrate=False)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_an_output_layer_or_embeddings_of_their_own_is_stored_as_it_is(target: str, setting: Setting, tmp_path: Path) -> None:
    untied = shutil.copytree(setting.models["pretrain"], tmp_path / "untied")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(untied, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(untied)
    setting.models["pretrain"] = untied
    live = setting.train(setting.job("pretrain", {"kind": "lora", "r": 4, "target_modules": [target]}))
    assert_its_bundle_is_the_live_model(setting, live)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_more_directions_than_weights_have_are_refused_before_anything_starts(method: str, setting: Setting) -> None:
    with pytest.raises(SpecError, match=r"takes r=17 directions out of weights that have no more than 16"):
        prepare(setting.job("pretrain", METHODS[method] | {"r": 17}), calibrate=False)
    assert prepare(setting.job("pretrain", METHODS[method] | {"r": 16}), calibrate=False)


def masked(setting: Setting, method: str) -> TrainJob:
    return setting.job("classification", METHODS[method]).model_copy(update={"task": Pretrain(objective=MaskedLm())})


@pytest.mark.parametrize("method", ["rslora, lora+", "qlora 4", "qlora 8", "adalora", "ia3", "pfeiffer", "freeze"])
def test_a_masked_language_models_bundle_answers_as_the_live_model_did(method: str, setting: Setting, tmp_path: Path) -> None:
    bert = shutil.copytree(setting.models["classification"], tmp_path / "masked")
    torch.manual_seed(1)
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(bert)).save_pretrained(bert)
    setting.models["classification"] = bert
    job = masked(setting, method)
    live = setting.train(job)
    dev = prepare(job, calibrate=False).splits.dev
    outputs = evaluate(load_judge(live.trained.bundle), dev).outputs
    np.testing.assert_allclose(outputs, live.outputs, rtol=BOUND, atol=10 * BOUND)


def test_a_rate_of_an_output_layer_that_a_bottleneck_leaves_alone_is_refused_before_anything_starts(
    setting: Setting, tmp_path: Path
) -> None:
    """Where the weights file has none, the adapter trains one whole, at that rate."""
    setting.models["classification"] = bert = shutil.copytree(setting.models["classification"], tmp_path / "masked")
    job = masked(setting, "pfeiffer")
    job = job.model_copy(update={"optim": job.optim.model_copy(update={"head_learning_rate_multiplier": 3.0})})
    assert prepare(job, calibrate=False)
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(bert)).save_pretrained(bert)
    with pytest.raises(SpecError, match=r"multiplier: 3 has no effect: the output layer is pretrained"):
        prepare(job, calibrate=False)


@pytest.mark.parametrize("method", ["rslora, lora+", "qlora 4", "adalora", "ia3"])
def test_an_output_layer_that_starts_from_nothing_is_not_an_adapters_to_store(method: str, setting: Setting) -> None:
    with pytest.raises(SpecError, match="its output layer starts from nothing"):
        prepare(masked(setting, method), calibrate=False)
    assert prepare(masked(setting, "pfeiffer"), calibrate=False)
