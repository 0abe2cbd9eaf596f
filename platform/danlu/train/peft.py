"""Adapters through PEFT. Imported only where one is asked for: the library takes seconds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel

from danlu.artifact.trainable import HEADS, ia3_modules
from danlu.errors import SpecError
from danlu.spec.task import (
    Classification,
    Embed,
    EncoderTask,
    ExtractiveQA,
    MaskedLm,
    MultiLabelClassification,
    MultipleChoice,
    Pretrain,
    Regression,
    Seq2Seq,
    Task,
    TokenClassification,
)
from danlu.spec.tuning import Adalora, Ia3, Lora, Prefix, Prompt, PTuning, Qlora

ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""


def with_adapter(
    model: PreTrainedModel, tuning: Lora | Qlora | Adalora | Ia3, task: Task, *, whole: Collection[str] = (), num_steps: int = 0
) -> PeftModel:
    """The model with adapters; they, the head and the modules named `whole` are trainable. SpecError if a target is not there."""
    named = tuning.target_modules
    if named is not None and named != "all-linear":
        _check_targets(model, named)
    config: IA3Config | LoraConfig
    shared: dict[str, Any] = {
        "task_type": _task_type(task),
        # PEFT trains the head that it knows whole of its own accord.
        "modules_to_save": sorted(name for name in whole if name.split(".")[0] not in HEADS or name == "qa_outputs") or None,
    }
    match tuning:
        case Ia3():
            targets, feedforward = ia3_modules([name for name, _ in model.named_parameters()], tuning)
            config = IA3Config(**shared, target_modules=list(targets), feedforward_modules=list(feedforward))
        case _:
            config = _low_rank(tuning, shared, num_steps)
            if named == "all-linear" and isinstance(task, EncoderTask):
                # PEFT puts a head it trains whole around each of these, and cannot where there is an adapter already.
                unused = ("pooler.dense",) if isinstance(task, Embed) else ()
                config.exclude_modules = sorted(name for name, _ in model.named_modules() if name.endswith((*HEADS, *unused))) or None
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if named is None:
            raise
        told, fix = f"PEFT puts no adapter on {named}: {error}", "layers of the model's body; its head is trained whole beside them"
        raise SpecError(told, where="tuning.target_modules", fix=fix) from error


def _low_rank(tuning: Lora | Qlora | Adalora, shared: dict[str, Any], num_steps: int) -> LoraConfig:
    shared = shared | {name: getattr(tuning, name) for name in ("lora_alpha", "lora_dropout", "target_modules")}
    match tuning:
        case Adalora():
            named = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
            return AdaLoraConfig(**shared, **{name: getattr(tuning, name) for name in named}, total_step=num_steps)
        case Lora() | Qlora():
            start = tuning.init_lora_weights if isinstance(tuning, Lora) and tuning.init_lora_weights != "default" else True
            rank = {"r": tuning.r, "use_rslora": tuning.use_rslora, "use_dora": tuning.use_dora}
            return LoraConfig(**shared, **rank, init_lora_weights=start)


def _task_type(task: Task) -> TaskType | None:
    """What PEFT finds the head by; None is its plain model, for what it has no name for."""
    match task:
        case TokenClassification():
            return TaskType.TOKEN_CLS
        case ExtractiveQA() | Embed():
            # PEFT's own class for questions drops position_ids and token_type_ids (0.21).
            return TaskType.FEATURE_EXTRACTION
        case Classification() | MultiLabelClassification() | Regression() | MultipleChoice():
            return TaskType.SEQ_CLS
        case Seq2Seq():
            return TaskType.SEQ_2_SEQ_LM
        case Pretrain(objective=MaskedLm()):
            return None
        case _:
            return TaskType.CAUSAL_LM


def with_prompt(model: PreTrainedModel, tuning: Prompt | PTuning | Prefix, task: Task) -> PeftModel:
    """The model with a prompt in front of each row; it and the head are trainable."""
    shared: dict[str, Any] = {"task_type": _task_type(task), "num_virtual_tokens": tuning.num_virtual_tokens}
    match tuning:
        case Prompt():
            config: PeftConfig = PromptTuningConfig(**shared, prompt_tuning_init=tuning.prompt_tuning_init.upper())
        case PTuning():
            config = PromptEncoderConfig(**shared, encoder_hidden_size=tuning.encoder_hidden_size)
        case Prefix():
            config = PrefixTuningConfig(**shared)
    return get_peft_model(model, config)


@torch.no_grad()
def export_prompt(model: PeftModel, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the prompt as PEFT does: what the network made of it, so that nobody who loads it needs the network."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder, prefix = model.prompt_encoder[ADAPTER], f"prompt_encoder.{ADAPTER}."
    weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    tokens = torch.arange(model.peft_config[ADAPTER].num_virtual_tokens)
    whole = f".modules_to_save.{ADAPTER}."
    # PEFT's own way to gather these would compute the prompt of the live weights, which a strategy may have cut apart.
    tensors = {name.replace(whole, "."): tensor for name, tensor in state.items() if whole in name}
    tensors["prompt_embeddings"] = torch.func.functional_call(encoder, weights, (tokens,))
    _write(tensors, model.peft_config[ADAPTER], folder)


def _write(tensors: Mapping[str, torch.Tensor], config: PeftConfig, folder: Path) -> None:
    stored = copy(config)
    stored.inference_mode = True
    stored.save_pretrained(folder)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", {"format": "pt"})


def adapter_start(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's matrices now, by name in `model`."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def for_untouched_base(model: PeftModel, start: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter `state` as one of twice the rank for the pretrained weights.

    PiSSA and OLoRA start with W - s B0 A0 frozen, so the trained W - s B0 A0 + s B A is W + s [B, -B0] [A; A0]
    (https://arxiv.org/abs/2404.02948, appendix C).
    """
    doubled = dict(state)
    for name, first in start.items():
        if ".lora_A." in name:
            doubled[name] = torch.cat([state[name], first.cpu().float()], dim=0)
        else:
            doubled[name] = torch.cat([state[name], -first.cpu().float()], dim=1)
    config = model.peft_config[ADAPTER]
    scale = 2**0.5 if config.use_rslora else 2.0
    kept = ("task_type", "target_modules", "exclude_modules", "modules_to_save", "lora_dropout", "use_rslora")
    stored = LoraConfig(
        **{name: getattr(config, name) for name in kept},
        r=2 * config.r,
        lora_alpha=config.lora_alpha * scale,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write(get_peft_model_state_dict(model, state_dict=doubled), stored, folder)


def _check_targets(model: PreTrainedModel, targets: Collection[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            there = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})
            raise SpecError(
                f"the model has no module named {target!r}",
                where="tuning.target_modules",
                fix=f"all-linear, or some of: {', '.join(there)}",
            )
