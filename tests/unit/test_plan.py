"""The plan's numbers are those of the model that is then built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2Config,
    PreTrainedModel,
    Qwen3Config,
    RobertaConfig,
    RobertaModel,
)

from danlu.errors import ModelError, SpecError
from danlu.plan import Plan, duration, gib, make_plan
from danlu.spec.train import TrainJob
from danlu.tasks.packed import num_positions
from danlu.train.model import build

LABELS = ["a", "b", "c"]


def job(folder: Path, **overrides: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "name": "plan",
        "model": {"model_name_or_path": str(folder), "max_length": 32},
        "data": {"train": "train.csv"},
        "precision": "fp32",
        "global_batch_size": 32,
        "micro_batch_size": 8,
        "num_train_epochs": 3.0,
    }
    return TrainJob.model_validate(fields | overrides)


def plan(job: TrainJob, *, num_rows: int = 1000, mean_tokens: float = 20.0) -> Plan:
    folder = Path(job.model.model_name_or_path)
    return make_plan(job, folder, num_rows=num_rows, mean_tokens=mean_tokens, num_labels=len(LABELS), calibrate=False)


TUNINGS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "full", "freeze_embeddings": True},
    {"kind": "lora", "r": 4},
    {"kind": "lora", "r": 3, "target_modules": ["query", "value"]},
    {"kind": "lora", "r": 2, "target_modules": ["dense"]},
    {"kind": "lora", "r": 2, "target_modules": ["attention.output.dense"]},
]


def assert_counts_are_the_models(folder: Path, tuning: dict[str, Any]) -> None:
    spec = job(folder, tuning=tuning)
    found = plan(spec)
    module = build(spec, folder, LABELS).module
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if isinstance(module.model, PeftModel):
        peft_says, _ = module.model.get_nb_trainable_parameters()
        assert trainable == peft_says
    assert found.num_trainable == trainable
    config = AutoConfig.from_pretrained(folder, num_labels=len(LABELS))
    assert found.num_parameters == AutoModelForSequenceClassification.from_config(config).num_parameters()


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: "-".join(str(value) for value in tuning.values()))
def test_parameters_are_those_of_the_model_that_is_trained(tiny_model: Path, tuning: dict[str, Any]) -> None:
    assert_counts_are_the_models(tiny_model, tuning)


SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("family", "tuning"),
    [
        (family, tuning)
        for family in ("with a head", "masked-lm", "roberta", "distilbert", "distilbert with a head")
        for tuning in TUNINGS[:3]
    ],
)
def test_other_families_and_heads_are_counted_as_they_are_built(tmp_path: Path, family: str, tuning: dict[str, Any]) -> None:
    folder = write_tiny_model(tmp_path)
    model: PreTrainedModel
    match family:
        case "with a head":
            model = BertForSequenceClassification.from_pretrained(folder, num_labels=7)
        case "masked-lm":
            model = BertForMaskedLM.from_pretrained(folder)
        case "roberta":
            model = RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=40))
        case _:
            config = DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40, num_labels=3)
            model = (DistilBertForSequenceClassification if family.endswith("head") else DistilBertModel)(config)
    model.save_pretrained(folder)
    assert_counts_are_the_models(folder, tuning)


def test_memory_is_what_the_optimizer_holds(tiny_model: Path) -> None:
    spec = job(tiny_model)
    found = plan(spec)
    module = build(spec, tiny_model, LABELS).module
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert found.weight_bytes == found.gradient_bytes == sum(p.numel() * p.element_size() for p in module.parameters())
    assert found.optimizer_bytes == moments
    averaged = plan(job(tiny_model, optim={"ema_decay": 0.9}))
    assert averaged.optimizer_bytes == moments + found.weight_bytes
    assert averaged.checkpoint_bytes == found.checkpoint_bytes + 2 * found.weight_bytes
    assert found.worker_bytes == found.weight_bytes + found.gradient_bytes + found.optimizer_bytes + found.activation_bytes
    assert json.loads(json.dumps(found.to_dict()))["worker_bytes"] == found.worker_bytes


def zero(folder: Path, stage: int, precision: str = "bf16", workers: int = 4) -> Plan:
    parallel = {"kind": "deepspeed", "zero_stage": stage}
    return plan(job(folder, parallel=parallel, workers={"num_workers": workers}, precision=precision))


def test_each_zero_stage_shards_one_part_more(tiny_model: Path) -> None:
    stages = [zero(tiny_model, stage) for stage in (1, 2, 3)]
    parts = [(p.optimizer_bytes, p.gradient_bytes, p.weight_bytes) for p in stages]
    n = stages[0].num_parameters
    # bf16 under ZeRO: 2 bytes of weights and of gradients, 12 of moments and float32 masters (https://arxiv.org/abs/1910.02054)
    assert parts == [
        (12 * n // 4, 2 * n, 2 * n),
        (12 * n // 4, 2 * n // 4, 2 * n),
        (12 * n // 4, 2 * n // 4, 2 * n // 4),
    ]
    ddp = plan(job(tiny_model, precision="bf16", workers={"num_workers": 4}))
    assert (ddp.weight_bytes, ddp.gradient_bytes, ddp.optimizer_bytes) == (4 * n, 4 * n, 8 * n)  # autocast keeps float32 weights
    fp32 = zero(tiny_model, 2, "fp32")
    assert (fp32.weight_bytes, fp32.gradient_bytes, fp32.optimizer_bytes) == (4 * n, 4 * n // 4, 8 * n // 4)


def test_activations_grow_with_the_micro_batch_and_the_texts(tiny_model: Path) -> None:
    one = plan(job(tiny_model, micro_batch_size=4)).activation_bytes
    assert plan(job(tiny_model, micro_batch_size=8)).activation_bytes == 2 * one
    assert plan(job(tiny_model, micro_batch_size=4), mean_tokens=40.0).activation_bytes == 2 * one


def test_checkpointed_activations_are_the_inputs_of_the_layers_and_one_layers_insides(tiny_model: Path) -> None:
    checkpointed = {"model": {"model_name_or_path": str(tiny_model), "max_length": 32, "gradient_checkpointing": True}}
    one, every = (plan(job(tiny_model, **more)).activation_bytes for more in (checkpointed, {}))
    layers = json.loads((tiny_model / "config.json").read_text())["num_hidden_layers"]
    assert one / every == pytest.approx((2 * layers + 34) / (34 * layers), rel=1e-3)


def test_steps_are_those_of_the_loop(tiny_model: Path) -> None:
    assert plan(job(tiny_model), num_rows=1000).num_steps == 94  # ceil(3 * 1000 / 32)
    assert plan(job(tiny_model, max_steps=7)).num_steps == 7
    assert plan(job(tiny_model, num_train_epochs=0.01), num_rows=10).num_steps == 1
    assert plan(job(tiny_model), mean_tokens=20.0).tokens_per_step == 640


def test_the_time_is_measured_only_if_asked_for(tiny_model: Path) -> None:
    spec = job(tiny_model)
    assert plan(spec).expected_s is None
    threads = torch.get_num_threads()
    short, long = (
        make_plan(spec.model_copy(update={"max_steps": steps}), tiny_model, num_rows=10, mean_tokens=20, num_labels=3)
        for steps in (100, 100_000)
    )
    assert torch.get_num_threads() == threads
    assert short.expected_s is not None
    assert long.expected_s is not None
    assert 0 < 10 * short.expected_s < long.expected_s
    assert "GFLOP/s measured here now" in long.expected_note


def test_settings_without_effect_are_warned_of(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.tasks.device.has_native_bf16", lambda _: False)
    fields: dict[str, Any] = {"max_steps": 10, "evaluation": {"eval_steps": 11}, "checkpoint": {"save_steps": 12}, "precision": "bf16"}
    warnings = plan(job(tiny_model, **fields)).warnings
    assert len(warnings) == 3
    assert any("evaluation.eval_steps=11 is more than the 10 steps" in warning for warning in warnings)
    assert any("checkpoint.save_steps=12 is more than the 10 steps" in warning for warning in warnings)
    assert any("bf16 is several times slower" in warning for warning in warnings)
    fine = plan(job(tiny_model, max_steps=12, evaluation={"eval_steps": 11}, checkpoint={"save_steps": 12}))
    assert fine.warnings == ()


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_what_the_machine_is_good_at(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr("danlu.tasks.device.has_native_bf16", lambda _: native)
    found = plan(job(tiny_model, precision="auto"))
    assert found.precision == expected
    assert found.warnings == ()


def test_the_text_says_every_number(tiny_model: Path) -> None:
    spec = job(tiny_model, workers={"num_workers": 2}, tuning={"kind": "lora", "r": 4})
    found = plan(spec)
    text = found.text(spec)
    for said in (
        f"{found.num_parameters:,}",
        f"{found.num_trainable:,} (lora)",
        "32 = 8 x 2 accumulation x 2 workers",
        "94 of about 640 tokens",
    ):
        assert said in text


def test_a_folder_whose_config_is_no_classifiers_cannot_be_planned(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelError, match="no-such-type") as raised:
        plan(job(folder))
    assert raised.value.where == "model.model_name_or_path"


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "bart", "qwen3"])
def test_rows_longer_than_the_models_positions_are_refused_with_the_length_that_fits(tmp_path: Path, family: str) -> None:
    decoder = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
    config: Any = {
        "bert": BertConfig(**SMALL, max_position_embeddings=40),
        "roberta": RobertaConfig(**SMALL, max_position_embeddings=40),
        "distilbert": DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40),
        "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40),
        "bart": BartConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=40),
        "qwen3": Qwen3Config(**decoder, max_position_embeddings=40),
    }[family]  # fmt: skip
    model = AutoModel.from_config(config).eval()

    def reads(length: int) -> bool:
        try:
            with torch.no_grad():
                model(torch.full((1, length), 5))
        except (IndexError, RuntimeError):
            return False
        return True

    room = next((length - 1 for length in range(36, 44) if not reads(length)), None)
    assert num_positions(model) == room
    assert (room is None) == (family == "qwen3")  # it computes them
    if family in ("bert", "roberta", "distilbert"):
        assert room is not None
        write_tiny_model(tmp_path)
        model.save_pretrained(tmp_path)
        plan(job(tmp_path, model={"model_name_or_path": str(tmp_path), "max_length": room}))
        with pytest.raises(SpecError, match=f"max_length={room + 1} is longer than the {room} positions") as raised:
            plan(job(tmp_path, model={"model_name_or_path": str(tmp_path), "max_length": room + 1}))
        assert raised.value.fix == f"model.max_length={room}"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89.4, "89 s"), (90, "1 min 30 s"), (3599.9, "60 min 0 s"), (7500, "2 h 5 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_are_for_people() -> None:
    assert (gib(3 << 29), gib(50 << 20), gib(1000)) == ("1.50 GiB", "50 MiB", "0 MiB")
