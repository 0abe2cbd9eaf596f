"""The model a job trains: built from the pretrained weights, and written back as a folder anybody can load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from danlu.errors import ModelError
from danlu.spec.train import TrainJob
from danlu.spec.tuning import Full, Lora
from danlu.tasks.packed import PackedModel
from danlu.tasks.task import task_file

PREFIX = "model."
"""A task's wrapper holds the Hugging Face model as `.model`."""


@dataclass(frozen=True)
class Trainee:
    """A model ready to train. `head` names parameters that start from nothing, `exported` what `export` has to be given."""

    module: PackedModel
    head: frozenset[str]
    exported: frozenset[str]


def build(job: TrainJob, folder: Path, label_names: list[str]) -> Trainee:
    """The pretrained model of `folder` with a head for these labels and `job.tuning` applied; the same on every rank."""
    task = task_file(job.task)
    torch.manual_seed(job.seed)
    try:
        model = task.build_model(folder, label_names, dropout=job.model.hidden_dropout)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} could not be loaded: {error}", where="model.model_name_or_path") from error
    if job.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = task.wrap(model)
    head = {PREFIX + name for name in task.head_parameters(model)}
    exported = set(module.state_dict())
    match job.tuning:
        case Full():
            if job.tuning.freeze_embeddings:
                for name, parameter in model.base_model.named_parameters():
                    if name.startswith("embeddings.") or name == "embed_tokens.weight":
                        parameter.requires_grad_(False)
        case Lora():
            from danlu.train.peft import with_lora

            module.model = with_lora(model, job.tuning)
            # What PEFT copied for training whole is the head; the adapters take the body's rate.
            head = {name for name, p in module.named_parameters() if p.requires_grad and ".modules_to_save." in name}
            exported = {name for name, p in module.named_parameters() if p.requires_grad}
    return Trainee(module, frozenset(head), frozenset(exported))


def export(trainee: Trainee, weights: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `weights` (named as in the module) as a Hugging Face folder, or as a PEFT adapter's; the tokenizer beside them."""
    state = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    model = trainee.module.model
    attention = model.config._attn_implementation
    try:
        # The folder must load anywhere, and nobody else knows the packed attention.
        model.config._attn_implementation = None
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config._attn_implementation = attention
    tokenizer.save_pretrained(folder)
