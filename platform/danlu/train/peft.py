"""Adapters through PEFT. Imported only where one is asked for: the library takes seconds."""

from __future__ import annotations

from collections.abc import Collection

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from danlu.errors import SpecError
from danlu.spec.tuning import Lora


def with_lora(model: PreTrainedModel, tuning: Lora) -> PeftModel:
    """The model with low-rank adapters; they and the head are trainable. SpecError if a named module is not there."""
    if tuning.target_modules != "all-linear":
        _check_targets(model, tuning.target_modules)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=tuning.r,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=tuning.target_modules,
    )
    return get_peft_model(model, config)


def _check_targets(model: PreTrainedModel, targets: Collection[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            there = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ == "Linear"})
            raise SpecError(
                f"the model has no module named {target!r}",
                where="tuning.target_modules",
                fix=f"all-linear, or some of: {', '.join(there)}",
            )
