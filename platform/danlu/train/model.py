"""The model a job trains: built from the pretrained weights, and written back as a folder anybody can load."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from danlu.artifact.trainable import HEADS, is_embedding, new_parameters, trained_names
from danlu.errors import ModelError
from danlu.spec.train import TrainJob
from danlu.spec.tuning import Adalora, Adapter, Freeze, Full, Ia3, Lora, Prefix, Prompt, PTuning, Qlora
from danlu.tasks.packed import PackedModel
from danlu.tasks.task import task_file

if TYPE_CHECKING:
    from danlu.train.adalora import RankAllocator

PREFIX = "model."
"""A task's wrapper holds the Hugging Face model as `.model`."""

Write = Callable[[Mapping[str, torch.Tensor], Path], None]


@dataclass(frozen=True)
class Trainee:
    """A model ready to train.

    `head` names parameters that start from nothing, `exported` what `export` has to be given, `lr_scales` parameters with a rate of their
    own; `write` puts exported tensors (named as in the Hugging Face model) into a folder.
    """

    module: PackedModel
    head: frozenset[str]
    exported: frozenset[str]
    write: Write
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    allocator: RankAllocator | None = None


def not_finite(folder: Path) -> str | None:
    """A tensor among a folder's safetensors that holds NaN or infinity; None if there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if not bool(torch.isfinite(weights.get_tensor(name)).all()):
                    return str(name)
    return None


def build(job: TrainJob, folder: Path, label_names: list[str], *, dtype: torch.dtype = torch.float32, num_steps: int = 0) -> Trainee:
    """The pretrained model of `folder` with a head for these labels and `job.tuning` applied; the same on every rank.

    `dtype` and `num_steps` are what a quantized base computes in and over how many steps ranks move.
    """
    task, tuning = task_file(job.task), job.tuning
    torch.manual_seed(job.seed)
    try:
        model = _base(job, folder, label_names, dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} could not be loaded: {error}", where="model.model_name_or_path") from error
    if job.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = task.wrap(model, job.task)
    match tuning:
        case Full() | Freeze():
            exported = frozenset(module.state_dict()) - _other_names(module)
            _freeze(model, tuning)
            head = frozenset(PREFIX + name for name in task.head_parameters(model))
            return Trainee(module, head, exported, lambda state, folder: model.save_pretrained(folder, state_dict=dict(state)))
        case Adapter():
            return _with_bottlenecks(module, tuning, folder, task.head_parameters(model))
        case Prompt() | PTuning() | Prefix():
            from danlu.tasks.prompted import put_prompt
            from danlu.train.peft import export_prompt, with_prompt

            prompted = with_prompt(model, tuning, job.task)
            put_prompt(module, prompted)
            return _adapted(module, lambda state, folder: export_prompt(prompted, state, folder), {}, None)
        case Lora() | Qlora() | Adalora() | Ia3():
            from danlu.train.peft import adapter_start, for_untouched_base, with_adapter

            whole = {name.rpartition(".")[0] for name in new_parameters(folder, task.head_parameters(model), model.base_model_prefix)}
            peft = with_adapter(model, tuning, job.task, whole=whole, num_steps=num_steps)
            module.model = peft
            allocator = None
            write: Write = lambda state, folder: peft.save_pretrained(folder, state_dict=dict(state))  # noqa: E731
            scales: dict[str, float] = {}
            match tuning:
                case Lora() | Qlora():
                    scales = {name: tuning.loraplus_lr_ratio for name, _ in module.named_parameters() if ".lora_B." in name}
                    if isinstance(tuning, Lora) and tuning.moves_base:
                        start = adapter_start(peft)
                        write = lambda state, folder: for_untouched_base(peft, start, state, folder)  # noqa: E731
                case Adalora():
                    from danlu.train.adalora import RankAllocator, export_ranks

                    allocator = RankAllocator(peft)
                    write = lambda state, folder: export_ranks(peft, state, folder)  # noqa: E731
                case Ia3():
                    pass
            return _adapted(module, write, scales, allocator)


def export(trainee: Trainee, weights: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `weights` (named as in the module) as a Hugging Face folder, or as an adapter's; the tokenizer beside them."""
    state = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    config = trainee.module.model.config
    attention = config._attn_implementation
    try:
        # The folder must load anywhere, and nobody else knows the packed attention.
        config._attn_implementation = None
        trainee.write(state, folder)
    finally:
        config._attn_implementation = attention
    tokenizer.save_pretrained(folder)


def _base(job: TrainJob, folder: Path, label_names: list[str], dtype: torch.dtype) -> PreTrainedModel:
    match job.tuning:
        case Qlora():
            from danlu.compress.quantized_base import quantized_base

            return quantized_base(folder, job.task, label_names, job.tuning, dtype=dtype, dropout=job.model.hidden_dropout)
        case _:
            return task_file(job.task).build_model(folder, label_names, dropout=job.model.hidden_dropout)


def _other_names(module: PackedModel) -> set[str]:
    """Of parameters that stand in several places, all names but the first: a file needs them once, as transformers writes them."""
    first = {name for name, _ in module.named_parameters()}
    return {name for name, _ in module.named_parameters(remove_duplicate=False)} - first


def _freeze(model: PreTrainedModel, tuning: Full | Freeze) -> None:
    parameters = dict(model.named_parameters())
    match tuning:
        case Full():
            frozen = {name for name in parameters if tuning.freeze_embeddings and is_embedding(name)}
        case Freeze():
            frozen = set(parameters) - set(trained_names(list(parameters), tuning))
    for name in frozen:
        parameters[name].requires_grad_(False)


def _with_bottlenecks(module: PackedModel, tuning: Adapter, folder: Path, head: Collection[str]) -> Trainee:
    from danlu.tasks.bottleneck import insert, save

    model = module.model
    own = {name for name in head if name.split(".")[0] in HEADS} | new_parameters(folder, head, model.base_model_prefix)
    trained = own | set(insert(model, tuning))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    names = frozenset(PREFIX + name for name in trained)
    return Trainee(module, frozenset(PREFIX + name for name in own), names, lambda state, folder: save(state, tuning, folder))


def _adapted(module: PackedModel, write: Write, scales: Mapping[str, float], allocator: RankAllocator | None) -> Trainee:
    """A module whose trainable parameters are all that is stored."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    # What PEFT copied for training whole is the head; the adapters take the body's rate.
    head = {name for name in trained if ".modules_to_save." in name}
    return Trainee(module, frozenset(head), frozenset(trained), write, scales, allocator)
