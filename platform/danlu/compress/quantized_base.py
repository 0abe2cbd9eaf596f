"""The frozen base of QLoRA: the same weights in 4 or 8 bits wherever an adapter is trained, scored or served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from danlu.artifact import trainable
from danlu.errors import ModelError
from danlu.spec.task import Task
from danlu.spec.tuning import Qlora
from danlu.tasks.task import task_file

HEADS = [*trainable.HEADS, "pooler", "pre_classifier", "lm_head"]
"""Layers on top of the body, left in full precision: they are small, and every error there is an error in the answer."""

ROWS_PACKED = 32
"""Rows that bitsandbytes packs together for its AVX512-BF16 kernel (block_n)."""


def quantized_base(
    folder: Path, task: Task, label_names: Sequence[str], tuning: Qlora, *, dtype: torch.dtype, dropout: float | None = None
) -> PreTrainedModel:
    """The task's model with its body's linear layers in `tuning.bits` bits. `dtype`: what they are multiplied in."""
    need_bitsandbytes("tuning.kind")
    whole = [*HEADS, *_on_top(task_file(task).skeleton(folder, len(label_names)))]
    match tuning.bits:
        case 4:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=tuning.bnb_4bit_quant_type,
                bnb_4bit_use_double_quant=tuning.bnb_4bit_use_double_quant,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=whole,
            )
        case 8:
            config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    model = task_file(task).build_model(folder, label_names, dropout=dropout, quantization=config)
    keep_format(model)
    return model


def _on_top(model: PreTrainedModel) -> list[str]:
    """The linear layers behind a model's body, whatever its family calls them; one may share its weights with the embeddings."""
    body = f"{model.base_model_prefix}."
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [] if model.base_model is model else [name for name in linears if not name.startswith(body)]


def keep_format(model: nn.Module) -> None:
    """Keep 4-bit weights as they are in eval mode too.

    On a CPU with AVX512-BF16 bitsandbytes repacks them at the first forward in eval mode, for a kernel that only infers: later steps
    then train against garbage without a word, and answers are rounded to bf16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def keep_format_of_odd_shapes(model: nn.Module) -> None:
    """Keep 4-bit weights as they are where that kernel cannot take them: its repacking fails on rows that are not whole blocks."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and (state.shape[0] % ROWS_PACKED or state.shape[1] % state.blocksize):
            keep_format(module)


def need_bitsandbytes(where: str = "compress.quantization.kind") -> None:
    """ModelError if bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError("bitsandbytes is not installed", where=where, fix="pip install 'danlu[bnb]'") from error
