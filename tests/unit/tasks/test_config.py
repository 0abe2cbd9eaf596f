"""What is wrong with a model folder's config.json, its tokenizer or what its weights were rounded to is told before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from language import write_t5

from danlu import sdk
from danlu.errors import DivergedError, ModelError, SpecError, StorageError
from danlu.spec.train import TrainJob
from danlu.tasks import classification, pretrain, seq2seq
from danlu.tasks.config import check_trainable, read_config
from danlu.tasks.tokenizer import load_tokenizer

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def changed(model: Path, folder: Path, file: str = "config.json", **values: Any) -> Path:
    """A copy of a model folder with other values in a file of it; without one where it is ..."""
    made = Path(shutil.copytree(model, folder / "model"))
    written = json.loads((made / file).read_text()) | values
    (made / file).write_text(json.dumps({name: value for name, value in written.items() if value is not ...}))
    return made


CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no kind": ({"model_type": ...}, "has no model_type", '"model_type": "bert"'),
    "a misspelt kind": ({"model_type": "bertt"}, "knows no model_type 'bertt'", "did you mean 'bert'"),
    "a number": ({"model_type": 3}, "knows no model_type 3", "another model"),
    "code of its own": ({"model_type": "xnew", "auto_map": {"AutoConfig": "x.X"}}, "the code that comes with a model is not run", "own"),
    "a value of another type": ({"hidden_size": "32"}, "is no bert model's: .*Field 'hidden_size' expected int, got str", "correct it"),
    "a number type that is none": ({"dtype": "float99"}, "is no bert model's: .*float99", "correct it"),
    "another family's values": ({"model_type": "t5"}, "is no t5 model's: .*classifier_dropout", "correct it"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_transformers_cannot_read_is_told(name: str, tiny_model: Path, tmp_path: Path) -> None:
    values, told, fix = CONFIGS[name]
    folder = changed(tiny_model, tmp_path, **values)
    with pytest.raises(ModelError, match=told) as raised:
        classification.skeleton(folder, 2)
    assert str(folder / "config.json") in raised.value.problem
    assert fix in raised.value.fix
    assert raised.value.where == "model.model_name_or_path"


@pytest.mark.parametrize(("text", "told"), [("[]", "holds no object"), ("{", "cannot be read")])
def test_a_config_that_is_no_object_is_told(text: str, told: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model, tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=told):
        read_config(folder)


@pytest.mark.parametrize("values", [{"hidden_size": 0}, {"hidden_act": "gelo"}, {"_attn_implementation": "flash_attention_2"}])
def test_sizes_that_do_not_go_together_are_told(values: dict[str, Any], tiny_model: Path, tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no base of this task's models: "):
        classification.skeleton(changed(tiny_model, tmp_path / "a", **values), 2)
    if "hidden_size" not in values:
        with pytest.raises(ModelError, match="is no causal language model: "):
            pretrain.skeleton(changed(tiny_decoder, tmp_path / "b", **values))


def test_a_tokenizer_of_another_shape_is_told(tiny_model: Path, tmp_path: Path) -> None:
    folder = changed(tiny_model, tmp_path)
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError, match="no tokenizer could be loaded from"):
        load_tokenizer(folder)


def job_of(model: Path, folder: Path, **more: Any) -> TrainJob:
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"wheat rose {word}"}) + "\n" for word in "abcdefgh"))
    data = {"train": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache")}
    fields: dict[str, Any] = {
        "name": "config",
        "model": {"model_name_or_path": str(model), "max_length": 32},
        "data": data,
        "task": {"kind": "pretrain"},
        "storage": str(folder / "runs"),
        "precision": "fp32",
    }
    return TrainJob.model_validate(fields | more)


@pytest.mark.parametrize(
    ("settings", "tuning", "told", "fix"),
    [
        ({"quant_method": "gptq", "bits": 4}, {"kind": "full"}, r"are quantized \(gptq\), and cannot be trained further", "made from"),
        ({"quant_method": "awq", "bits": 4}, {"kind": "qlora"}, r"\(awq\), and cannot", "made from"),
        (BNB, {"kind": "lora"}, r"\(bitsandbytes\), and tuning.kind=lora cannot train them", "{kind: qlora, bits: 4}"),
        (BNB, {"kind": "qlora", "bits": 8}, "in 4 bits, and tuning.bits=8", "tuning.bits=4"),
    ],
)
def test_weights_of_fewer_bits_are_refused_before_anything_starts(
    settings: dict[str, Any], tuning: dict[str, Any], told: str, fix: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_decoder, tmp_path, quantization_config=settings)
    with pytest.raises(ModelError, match=told) as raised:
        sdk.prepare(job_of(folder, tmp_path, tuning=tuning), calibrate=False)
    assert fix in raised.value.fix


def test_qlora_goes_on_from_weights_of_its_own_bits(tiny_decoder: Path, tmp_path: Path) -> None:
    tuning = job_of(tiny_decoder, tmp_path, tuning={"kind": "qlora"}).tuning
    check_trainable(tiny_decoder, tuning)
    check_trainable(changed(tiny_decoder, tmp_path, quantization_config=BNB), tuning)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"decoder_start_token_id": None}, "has no decoder_start_token_id"),
        ({"decoder_start_token_id": 9999}, "decoder_start_token_id=9999 is none of the model's"),
        ({"pad_token_id": 9999}, "pad_token_id=9999 is none of the model's"),
    ],
)
def test_tokens_that_an_encoder_decoder_starts_and_pads_with_are_its_own(values: dict[str, Any], told: str, tmp_path: Path) -> None:
    model = write_t5(tmp_path / "t5")
    assert seq2seq.skeleton(model, 0) is not None
    with pytest.raises(ModelError, match=told):
        seq2seq.skeleton(changed(model, tmp_path, **values), 0)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"hidden_size": "32"}, "no qwen3 model has these values: .*'hidden_size' expected int"),
        ({"hidden_act": "x"}, "no model of this shape can be built: KeyError: 'x'"),
        ({"num_attention_heads": 0}, "no model of this shape can be built: "),
    ],
)
def test_a_shape_that_cannot_be_is_told_as_the_overrides(overrides: dict[str, Any], told: str, tiny_decoder: Path, tmp_path: Path) -> None:
    task = {"kind": "pretrain", "from_scratch": {"vocab_size": 300, "config_overrides": overrides}}
    with pytest.raises(ModelError, match=told) as raised:
        sdk.prepare(job_of(tiny_decoder, tmp_path, task=task), calibrate=False)
    assert raised.value.where == "task.from_scratch.config_overrides"


def test_a_cache_that_is_a_file_is_told(tiny_decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    task = {"kind": "pretrain", "from_scratch": {"vocab_size": 300}}
    with pytest.raises(StorageError, match="cannot be written there") as raised:
        sdk.prepare(job_of(tiny_decoder, tmp_path, task=task), calibrate=False)
    assert raised.value.where == "data.cache_dir"


def rows_of(model: Path, folder: Path, **more: Any) -> TrainJob:
    rows = [{"text": f"wheat rose {word}", "label": "ab"[i % 2]} for i, word in enumerate("abcdefghijklmnopqrst")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(folder / "rows.jsonl"), "cache_dir": str(folder / "cache")}
    batches: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 8, "max_steps": 2, "trackers": []}
    return job_of(model, folder, data=data, task={"kind": "classification"}, **(batches | more))


def test_a_last_step_that_diverges_is_told_as_that(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="after step 2, the last, what the model answers to dev rows is no number"):
        sdk.train(rows_of(tiny_model, tmp_path, optim={"learning_rate": 1e20}))


def test_an_adapter_on_the_head_alone_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    tuning = {"kind": "lora", "target_modules": ["classifier"]}
    with pytest.raises(SpecError, match=r"PEFT puts no adapter on \['classifier'\]") as raised:
        sdk.train(rows_of(tiny_model, tmp_path, tuning=tuning))
    assert raised.value.where == "tuning.target_modules"


def test_a_bundle_whose_config_was_damaged_is_told(tiny_model: Path, tmp_path: Path) -> None:
    trained = sdk.train(rows_of(tiny_model, tmp_path))
    file = trained.bundle.path / "model" / "config.json"
    file.write_text(file.read_text().replace('"', "'", 1))
    with pytest.raises(ModelError, match="cannot be read") as raised:
        sdk.predict(trained.bundle, ["wheat"])
    assert str(file) in raised.value.problem
