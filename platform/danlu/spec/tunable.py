"""Which ways of tuning go with which ways of spreading a job over workers, with which tasks, and with which learning rates."""

from __future__ import annotations

from danlu.spec.optim import Optim
from danlu.spec.parallel import DeepSpeed, Fsdp, Parallel
from danlu.spec.task import Embed, EncoderTask, MaskedLm, Pretrain, Task, is_decoders, named
from danlu.spec.tuning import Adalora, Adapter, Freeze, Full, Qlora, Tuning, VirtualTokens

PROMPTED = ("classification", "multi_label_classification", "regression")
"""Encoders' tasks that learn behind virtual tokens, as every decoder's task does."""


def check_tuning(tuning: Tuning, task: Task, parallel: Parallel, precision: str, max_steps: int | None) -> None:
    """ValueError, for the validator of the job, for what would fail in a worker or train something else than it says."""
    match tuning:
        case Adalora():
            _check_ranks_can_move(tuning, parallel, precision, max_steps)
        case Qlora() if tuning.bits == 8 and isinstance(parallel, Fsdp):
            raise ValueError(
                "tuning.bits=8 does not go with parallel.kind=fsdp, which puts others in the place of bitsandbytes' weights, without their "
                "scales; use tuning.bits=4, or parallel.kind=ddp or deepspeed"
            )
        case VirtualTokens() if _is_zero3(parallel):
            raise ValueError(
                f"tuning.kind={tuning.kind} does not go with parallel.zero_stage=3: the prompt is made outside the modules whose "
                "weights ZeRO-3 gathers; use parallel.zero_stage=2, or tuning.kind=lora"
            )
        case VirtualTokens() if task.kind not in PROMPTED and not is_decoders(task):
            raise ValueError(
                f"tuning.kind={tuning.kind} puts a prompt in front of a text, which {named(task)} does not take; "
                f"it goes with: {', '.join(PROMPTED)} and decoders' tasks; or use tuning.kind=lora"
            )
        case _:
            pass


def check_rates(optim: Optim, task: Task, tuning: Tuning) -> None:
    """ValueError, for the validator of the job, for a share of the rate that no parameter would get."""
    if optim.head_learning_rate_multiplier != 1 and not _trains_a_head(task, tuning):
        told = f"optim.head_learning_rate_multiplier={optim.head_learning_rate_multiplier:g} has no effect"
        if isinstance(task, Pretrain) and isinstance(task.objective, MaskedLm):
            raise ValueError(
                f"{told}: tuning.kind={tuning.kind} leaves the output layer of {named(task)} as it is; leave it out, or tuning.kind=full"
            )
        raise ValueError(f"{told}: {named(task)} trains pretrained weights only and has no head; leave it out, or raise learning_rate")
    if optim.layer_learning_rate_decay != 1 and isinstance(tuning, VirtualTokens):
        raise ValueError(
            f"optim.layer_learning_rate_decay={optim.layer_learning_rate_decay:g} has no effect: tuning.kind={tuning.kind} trains nothing "
            "in the layers; leave it out, or tuning.kind=lora"
        )


def _trains_a_head(task: Task, tuning: Tuning) -> bool:
    """True if some of what is trained may have started from nothing; an `adapter` trains an output layer that the weights file has not."""
    if isinstance(task, Pretrain) and isinstance(task.objective, MaskedLm):
        return isinstance(tuning, Full | Freeze | Adapter)
    return isinstance(task, EncoderTask) and not isinstance(task, Embed)


def _check_ranks_can_move(tuning: Adalora, parallel: Parallel, precision: str, max_steps: int | None) -> None:
    if _is_zero3(parallel) or isinstance(parallel, Fsdp):
        which, who = ("parallel.kind=fsdp", "FSDP") if isinstance(parallel, Fsdp) else ("parallel.zero_stage=3", "ZeRO-3")
        raise ValueError(
            f"tuning.kind=adalora does not go with {which}: ranks move by whole weights and gradients, which {who} does not keep; "
            "use parallel: {kind: deepspeed, zero_stage: 2}, or tuning.kind=lora"
        )
    if precision == "fp16" and isinstance(parallel, DeepSpeed):
        raise ValueError(
            "tuning.kind=adalora weighs gradients, which parallel.kind=deepspeed holds scaled under precision=fp16; "
            "precision=bf16, or parallel.kind=ddp"
        )
    if max_steps is not None and tuning.tinit + tuning.tfinal >= max_steps:
        raise ValueError(
            f"tuning.tinit={tuning.tinit} and tuning.tfinal={tuning.tfinal} leave no step of max_steps={max_steps} to move ranks in; "
            "lower them, or raise max_steps"
        )


def _is_zero3(parallel: Parallel) -> bool:
    return isinstance(parallel, DeepSpeed) and parallel.zero_stage == 3
