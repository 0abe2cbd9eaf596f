"""An adapter of another model is refused by the headers of the files, with the module and both shapes, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lm import write_adapter, write_byte_tokenizer, write_family
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from danlu import sdk
from danlu.artifact.bundle import Bundle, BundleMeta, Lineage, write_bundle
from danlu.compress.fits import check_fits
from danlu.compress.load import load_model
from danlu.errors import ModelError
from danlu.serve.adapters import check_adapters
from danlu.serve.engines.vllm.adapters import servable_folder
from danlu.spec.serve import Service
from danlu.spec.task import Pretrain
from danlu.spec.tuning import Lora

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("base"), "qwen3")


@pytest.fixture(scope="module")
def wider(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same family with a larger feed-forward: only `down_proj` is another."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("wider") / "model")
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size += 8
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def never() -> Any:
    raise AssertionError("the headers say it all")


def bundle_of(adapter: Path, base: Path, folder: Path) -> Bundle:
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    meta = BundleMeta(name="b", task=Pretrain(), labels=[], max_length=64, precision="fp32", probes=[], lineage=lineage)
    shutil.copytree(adapter, folder / "model")
    return write_bundle(folder, meta.model_copy(update={"weights": "adapter", "tuning": Lora(), "base_model": str(base)}))


def service(model: Path, kind: str, adapter: Path) -> Service:
    engine = {"kind": kind, "model_name_or_path": str(model), "adapters": {"mine": str(adapter)}}
    return Service.model_validate({"name": "fits", "engine": engine, "storage": "unused"})


@pytest.mark.parametrize("kind", ["torch", "vllm"])
def test_adapters_of_a_service_are_looked_at_before_a_worker_starts(kind: str, base: Path, wider: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", 1, **LORA)
    check_adapters(service(base, kind, adapter))
    config = AutoConfig.from_pretrained(base)
    there, here = [config.hidden_size, config.intermediate_size], [config.hidden_size, config.intermediate_size + 8]
    with pytest.raises(ModelError) as told, sdk.serving(service(wider, kind, adapter)):
        raise AssertionError("it is served")
    assert told.value.where == "mine"
    text = f"changes model.layers.0.mlp.down_proj {there} (out, in), and the model has {here}"
    assert f"{adapter} {text}" in str(told.value)
    with pytest.raises(ModelError, match=r"down_proj \[.*\] \(out, in\), and the model has"):
        servable_folder(str(adapter), "mine", "unused", None, base=wider, max_lora_rank=8)


def test_an_adapter_of_another_family_changes_a_layer_that_is_not_there(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(other)
    adapter = write_adapter(other, tmp_path / "adapter", 1, r=2, target_modules=["c_attn"])
    check_fits(adapter, other, lambda: AutoModelForCausalLM.from_pretrained(other), source="it", where="here")
    with pytest.raises(ModelError, match=r"it changes transformer.h.0.attn.c_attn \[96, 32\] \(out, in\), and the model has no such layer"):
        check_fits(adapter, base, lambda: AutoModelForCausalLM.from_pretrained(base), source="it", where="here")


def test_headers_are_enough_where_all_is_well_and_a_tied_output_layer_is_found_in_the_class(base: Path, tmp_path: Path) -> None:
    check_fits(write_adapter(base, tmp_path / "inside", 1, **LORA), base, never, source="it", where="here")
    outputs = write_adapter(base, tmp_path / "outputs", 1, r=2, target_modules=["lm_head"])
    check_fits(outputs, base, lambda: AutoModelForCausalLM.from_pretrained(base), source="it", where="here")


def test_adalora_is_looked_at_too(base: Path, wider: Path, tmp_path: Path) -> None:
    named = {"task_type": "CAUSAL_LM", "init_r": 4, "target_r": 2, "tinit": 1, "total_step": 9, "target_modules": ["down_proj"]}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.AdaLoraConfig(**named))
    model.save_pretrained(tmp_path)
    check_fits(tmp_path, base, never, source="it", where="here")
    with pytest.raises(ModelError, match=r"changes model\.layers\.0\.mlp\.down_proj"):
        check_fits(tmp_path, wider, lambda: AutoModelForCausalLM.from_pretrained(wider), source="it", where="here")


def test_the_backbone_alone_holds_what_a_whole_models_adapter_changes(base: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).model.save_pretrained(tmp_path / "backbone")
    check_fits(write_adapter(base, tmp_path / "inside", 1, **LORA), tmp_path / "backbone", never, source="it", where="here")


@pytest.mark.parametrize("damage", ["no lora_B", "another rank", "half a file", "no file"])
def test_a_damaged_adapter_is_told(damage: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", 1, **LORA)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if key.endswith("0.self_attn.q_proj.lora_B.weight"))
    match damage:
        case "no lora_B":
            del weights[name]
            told = r"lora_A of model.layers.0.self_attn.q_proj is \[4, \d+\] and there is no lora_B"
        case "another rank":
            weights[name] = weights[name][:, :2].contiguous()
            told = r"lora_A of model.layers.0.self_attn.q_proj is \[4, \d+\] and lora_B is \[\d+, 2\]"
        case _:
            told = (
                "holds no adapter: .*not a whole safetensors file" if damage == "half a file" else "there is no adapter_model.safetensors"
            )
    if damage == "no file":
        file.unlink()
    elif damage == "half a file":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=told):
        check_adapters(service(base, "torch", adapter))


def test_a_bundles_adapter_is_not_put_on_a_base_that_has_become_another(base: Path, wider: Path, tmp_path: Path) -> None:
    home = shutil.copytree(base, tmp_path / "home")
    write_byte_tokenizer(home)
    made = bundle_of(write_adapter(home, tmp_path / "adapter", 1, **LORA), home, tmp_path / "bundle")
    assert load_model(made)
    shutil.rmtree(home)
    shutil.copytree(wider, home)
    with pytest.raises(ModelError, match=r"an adapter of .*, changes model.layers.0.mlp.down_proj .* and the model has") as told:
        load_model(made)
    assert told.value.where == "bundle.base_model"
    assert json.loads((made.path / "model" / "adapter_config.json").read_text())["r"] == 4
