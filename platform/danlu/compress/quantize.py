"""A quantized copy of a bundle's model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from danlu.artifact.bundle import Bundle
from danlu.compress.load import INT8_FILE, auto_class, load_model, weights_file
from danlu.compress.quantized_base import HEADS, need_bitsandbytes
from danlu.errors import ModelError, StorageError
from danlu.spec.compress import BnbInt8, BnbNf4, Int4, Int8, Quantization
from danlu.spec.task import is_decoders
from danlu.spec.tuning import is_merged


def quantize(bundle: Bundle, quantization: Quantization, folder: Path) -> None:
    """Write a quantized version of `bundle`'s model, with its config and tokenizer, into an empty `folder`."""
    if bundle.meta.quantization is not None:
        raise ModelError(
            f"{bundle.meta.name} is quantized already ({bundle.meta.quantization.kind})",
            where=str(bundle.path),
            fix="the original's version",
        )
    if bundle.meta.tuning is not None and not is_merged(bundle.meta.tuning):
        raise ModelError(
            f"{bundle.meta.name} was tuned by {bundle.meta.tuning.kind}, which does not end in full-precision weights of the model's shape",
            where=str(bundle.path),
            fix="a bundle tuned by full, freeze, lora, adalora or ia3",
        )
    model = load_model(bundle)
    try:
        _write(model, bundle, quantization, folder)
    except Exception as error:  # safetensors and tokenizers say what the disk says in exceptions of their own
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        told = f"the smaller version could not be written to {folder}: {error}"
        raise StorageError(told, where="compress", fix="free some space there, or set TMPDIR") from error


def _write(model: PreTrainedModel, bundle: Bundle, quantization: Quantization, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    match quantization:
        case Int8() | Int4() if is_decoders(bundle.meta.task):
            _write_weight_only(model, quantization, folder)
        case Int8():
            _write_int8(model, folder)
        case BnbInt8() | BnbNf4():
            # What stays whole is much of a language model, and its cache has the same dtype.
            in_bf16 = is_decoders(bundle.meta.task) and bundle.meta.precision == "bf16"
            dtype = torch.bfloat16 if in_bf16 else torch.float32
            write_bitsandbytes(model, auto_class(bundle.meta.task), quantization, folder, dtype)
        case Int4():
            raise ModelError(
                f"{quantization.kind} is not for {bundle.meta.task.kind}",
                where="compress.quantization.kind",
                fix="kind: int8, bnb_int8 or bnb_nf4",
            )
    AutoTokenizer.from_pretrained(bundle.path / "model").save_pretrained(folder)
    defaults = bundle.path / "model" / GENERATION_CONFIG_NAME
    if defaults.exists():  # what ends an answer: an adapter's says more than its base model's
        shutil.copyfile(defaults, folder / defaults.name)


def module_bytes(model: nn.Module) -> int:
    """Size of the weights in memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def weight_bytes(folder: Path) -> int:
    """Size of a model folder's weight files."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _write_int8(model: PreTrainedModel, folder: Path) -> None:
    from danlu.compress.int8 import quantize_int8

    quantized = quantize_int8(model, skip=HEADS)
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in quantized.state_dict().items()}, folder / INT8_FILE)


def _write_weight_only(model: PreTrainedModel, quantization: Int8 | Int4, folder: Path) -> None:
    from danlu.compress.weight_only import quantize_weights, state_of

    state = state_of(quantize_weights(model, quantization))
    model.config.save_pretrained(folder)
    save_file(state, folder / weights_file(quantization))


def write_bitsandbytes(model: PreTrainedModel, loader: Any, quantization: BnbInt8 | BnbNf4, folder: Path, dtype: torch.dtype) -> None:
    """A folder of the model with bitsandbytes' weights. `dtype`: of the other weights, and of the products with those in 4 bits."""
    need_bitsandbytes()
    whole = folder / "whole"
    model.save_pretrained(whole)
    match quantization:
        case BnbInt8():
            config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)
        case BnbNf4():
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=quantization.double_quant,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=HEADS,
            )
    quantized = loader.from_pretrained(whole, quantization_config=config, dtype=dtype)
    quantized.save_pretrained(folder)
    for path in whole.iterdir():
        path.unlink()
    whole.rmdir()
