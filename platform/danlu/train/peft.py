"""Which weights are trained: `tuning:` applied to a model."""

from __future__ import annotations

from collections.abc import Collection

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from danlu.errors import SpecError
from danlu.spec.tuning import Full, Lora, Tuning


def apply_tuning(model: PreTrainedModel, tuning: Tuning) -> PreTrainedModel | PeftModel:
    """The model with exactly the weights set trainable that `tuning` asks for."""
    match tuning:
        case Full():
            if tuning.freeze_embeddings:
                for name, parameter in model.base_model.named_parameters():
                    if name.startswith("embeddings.") or name == "embed_tokens.weight":
                        parameter.requires_grad_(False)
            return model
        case Lora():
            return get_peft_model(model, lora_config(model, tuning))


def lora_config(model: PreTrainedModel, tuning: Lora) -> LoraConfig:
    """PEFT's configuration; SpecError if a named module is not there."""
    if tuning.target_modules != "all-linear":
        _check_targets(model, tuning.target_modules)
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=tuning.r,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=tuning.target_modules,
    )


def _check_targets(model: PreTrainedModel, targets: Collection[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            there = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ == "Linear"})
            raise SpecError(
                f"the model has no module named {target!r}", where="tuning.target_modules", fix=f"all-linear, or some of: {', '.join(there)}"
            )
