"""A bundle's predictor, whatever its weights are: full, an adapter, int8 or bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from danlu.artifact.bundle import Bundle
from danlu.artifact.pretrained import model_folder
from danlu.compress.bf16 import hold_linears_in_bf16
from danlu.compress.fits import check_fits
from danlu.compress.quantized_base import keep_format, keep_format_of_odd_shapes, need_bitsandbytes, quantized_base
from danlu.errors import ModelError
from danlu.spec.compress import BnbInt8, BnbNf4, Int4, Int8
from danlu.spec.model import Model
from danlu.spec.task import (
    Chat,
    Embed,
    EncoderTask,
    ExtractiveQA,
    LanguageTask,
    MaskedLm,
    MultipleChoice,
    Preference,
    Pretrain,
    Seq2Seq,
    Task,
    TokenClassification,
    is_decoders,
)
from danlu.spec.tuning import Adalora, Adapter, Lora, Qlora, VirtualTokens
from danlu.tasks import bottleneck
from danlu.tasks.answers import MaskedJudge, Seq2SeqJudge
from danlu.tasks.config import read_config
from danlu.tasks.judge import DecoderJudge, LanguageJudge, PreferenceJudge, RowScorer, end_ids
from danlu.tasks.packed import PackedEncoder, PackedModel
from danlu.tasks.predictor import Predictor
from danlu.tasks.prompted import load_prompt
from danlu.tasks.task import encoder_file, task_file
from danlu.tasks.tokenizer import load_tokenizer

INT8_FILE = "model.int8.safetensors"
INT4_FILE = "model.int4.safetensors"


def load_judge(bundle: Bundle) -> Predictor | LanguageJudge:
    """What scores rows as the bundle was evaluated."""
    match bundle.meta.task:
        case Pretrain(objective=MaskedLm()) as task:
            return MaskedJudge(**_judged(bundle), task=task)
        case Pretrain() | Chat() as task:
            return DecoderJudge(**_judged(bundle), task=task, end_ids=_end_ids(bundle))
        case Preference() as task:
            judge = PreferenceJudge(**_judged(bundle), task=task, end_ids=_end_ids(bundle))
            if task.has_reference:
                judge.start = lambda: _start_scorer(bundle, task)
            return judge
        case Seq2Seq() as task:
            return Seq2SeqJudge(**_judged(bundle), task=task)
        case _:
            return load_predictor(bundle)


def load_answerer(
    bundle: Bundle, *, precision: Literal["fp32", "bf16"] | None = None, device: torch.device | None = None
) -> Predictor | MaskedJudge | Seq2SeqJudge:
    """What answers requests as the bundle was evaluated; `precision` overrides the one that was in."""
    if isinstance(bundle.meta.task, EncoderTask):
        return load_predictor(bundle, precision=precision, device=device)
    asked = bundle if precision is None else replace(bundle, meta=bundle.meta.model_copy(update={"precision": precision}))
    judge = load_judge(asked)
    if not isinstance(judge, MaskedJudge | Seq2SeqJudge):
        told = f"{bundle.meta.name} was trained for {bundle.meta.task.kind}: it goes on with texts"
        raise ModelError(told, where="bundle", fix="engine: {kind: torch}")
    if device is not None:
        judge.model.to(device)
        judge.device = device
    if judge.bf16:
        hold_linears_in_bf16(judge.model)
    return judge


class _Judged(TypedDict):
    model: PackedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    bf16: bool


def _judged(bundle: Bundle) -> _Judged:
    return {
        "model": _wrapped(bundle),
        "tokenizer": load_tokenizer(bundle.path / "model"),
        "max_length": bundle.meta.max_length,
        "bf16": bundle.meta.precision == "bf16",
    }


def _end_ids(bundle: Bundle) -> list[int]:
    folder = bundle.path / "model"
    return end_ids([folder], load_tokenizer(folder))


def _start_scorer(bundle: Bundle, task: LanguageTask) -> RowScorer:
    """The model that the bundle's training started from."""
    meta = bundle.meta
    whole = meta.base_model is None
    folder = model_folder(Model.model_validate(meta.lineage.spec["model"])) if whole else _base_folder(bundle)
    if isinstance(meta.tuning, Qlora):
        model = quantized_base(folder, task, meta.labels, meta.tuning, dtype=_trained_in(bundle))
    else:
        model = task_file(task).build_model(folder, meta.labels)
    tokenizer = load_tokenizer(bundle.path / "model")
    bf16 = meta.precision == "bf16"
    return RowScorer(task_file(task).wrap(model, task), tokenizer, max_length=meta.max_length, task=task, bf16=bf16)


def _trained_in(bundle: Bundle) -> torch.dtype:
    return torch.bfloat16 if bundle.meta.precision == "bf16" else torch.float32


def load_predictor(bundle: Bundle, *, precision: Literal["fp32", "bf16"] | None = None, device: torch.device | None = None) -> Predictor:
    """The predictor a bundle was evaluated as; `precision` overrides the one it was evaluated in. ModelError if it gives no answers."""
    task = bundle.meta.task
    if not isinstance(task, EncoderTask):
        raise ModelError(f"{bundle.meta.name} was trained for {task.kind}: it gives no answers", where="bundle", fix="an encoder's bundle")
    module = cast(PackedEncoder, _wrapped(bundle))
    if device is not None:
        module.to(device)
    bf16 = (precision or bundle.meta.precision) == "bf16" and bundle.meta.quantization is None
    if bf16:
        hold_linears_in_bf16(module)
    tokenizer = load_tokenizer(bundle.path / "model")
    return Predictor(module, tokenizer, bundle.meta.labels, max_length=bundle.meta.max_length, task=task, bf16=bf16)


def _wrapped(bundle: Bundle) -> PackedModel:
    """The model as a task calls it, with its prompt where it has one."""
    task = task_file(bundle.meta.task)
    # Of a language model's weights alone are rounded: each row's answer is its own, packed or not.
    if bundle.meta.quantization is not None and not is_decoders(bundle.meta.task):
        return _as_packed(bundle, load_model(bundle), packed=_can_be_packed(bundle))
    if not isinstance(bundle.meta.tuning, VirtualTokens):
        return task.wrap(load_model(bundle), bundle.meta.task)
    base = task.build_model(_base_folder(bundle), bundle.meta.labels)
    return load_prompt(base, task.wrap(base, bundle.meta.task), bundle.path / "model")


def _can_be_packed(bundle: Bundle) -> bool:
    """Whether the architecture can, tried on random floating-point weights: quantized ones round differently in another batch's shape."""
    config = read_config(bundle.path / "model")
    config.__dict__.pop("quantization_config", None)
    random: PreTrainedModel = auto_class(bundle.meta.task).from_config(config, dtype=torch.float32)
    return _as_packed(bundle, random).packed


def _as_packed(bundle: Bundle, model: PreTrainedModel, *, packed: bool | None = None) -> PackedEncoder:
    task = bundle.meta.task
    assert isinstance(task, EncoderTask)
    return encoder_file(task).wrap(model, task, packed=packed)


def auto_class(task: Task) -> Any:
    """transformers' auto class of a task's models."""
    match task:
        case Pretrain(objective=MaskedLm()):
            return AutoModelForMaskedLM
        case Pretrain() | Chat() | Preference():
            return AutoModelForCausalLM
        case Seq2Seq():
            return AutoModelForSeq2SeqLM
        case ExtractiveQA():
            return AutoModelForQuestionAnswering
        case MultipleChoice():
            return AutoModelForMultipleChoice
        case TokenClassification():
            return AutoModelForTokenClassification
        case Embed():
            return AutoModel
        case _:
            return AutoModelForSequenceClassification


def weights_file(quantization: Int8 | Int4) -> str:
    """Of a folder of such weights."""
    return INT8_FILE if isinstance(quantization, Int8) else INT4_FILE


def load_model(bundle: Bundle) -> PreTrainedModel:
    """The Hugging Face model of a bundle; adapters are merged into float32 weights where they can be."""
    folder = bundle.path / "model"
    loader = auto_class(bundle.meta.task)
    match bundle.meta.quantization:
        case None if bundle.meta.weights == "adapter":
            return _adapted(bundle)
        case None:
            model: PreTrainedModel = loader.from_pretrained(folder, config=read_config(folder), dtype=torch.float32)
            return model
        case Int8() | Int4() as quantization if is_decoders(bundle.meta.task):
            from danlu.compress.weight_only import load_weights

            config = read_config(folder)
            state = load_file(folder / weights_file(quantization))
            return load_weights(lambda: loader.from_config(config, dtype=torch.float32), state)
        case Int4() as quantization:
            raise ModelError(f"{bundle.meta.name} is quantized by {quantization.kind}, and no language model", where="bundle.quantization")
        case Int8():
            from danlu.compress.int8 import load_int8

            # Built on the meta device first would leave non-persistent buffers empty; an encoder's skeleton is cheap.
            skeleton = loader.from_config(read_config(folder), dtype=torch.float32)
            loaded: PreTrainedModel = load_int8(skeleton, load_file(folder / INT8_FILE))
            return loaded
        case BnbInt8() | BnbNf4():
            need_bitsandbytes()
            quantized: PreTrainedModel = loader.from_pretrained(folder)
            if is_decoders(bundle.meta.task):
                keep_format(quantized)  # an answer must not depend on what stands beside it in the batch
            else:
                keep_format_of_odd_shapes(quantized)
            return quantized


def _adapted(bundle: Bundle) -> PreTrainedModel:
    """An adapter on its base: merged where that is exact, else beside the weights it was trained on."""
    meta, folder = bundle.meta, _base_folder(bundle)
    if isinstance(meta.tuning, Lora | Qlora | Adalora):  # or PEFT would tell of tensors, after loading both
        task = task_file(meta.task)
        skeleton = partial(task.skeleton, folder, len(meta.labels))
        check_fits(
            bundle.path / "model", folder, skeleton, source=f"{bundle.path}, an adapter of {meta.base_model},", where="bundle.base_model"
        )
    match meta.tuning:
        case Qlora():
            from peft import PeftModel

            adapted: PreTrainedModel = PeftModel.from_pretrained(load_base(bundle), bundle.path / "model").get_base_model()
        case Adapter():
            adapted = bottleneck.load(task_file(meta.task).build_model(folder, meta.labels), bundle.path / "model")
        case _:
            from peft import PeftModel

            base = task_file(meta.task).build_model(folder, meta.labels)
            adapted = PeftModel.from_pretrained(base, bundle.path / "model").merge_and_unload()
    return adapted


def load_base(bundle: Bundle) -> PreTrainedModel:
    """What QLoRA's adapter was trained on: its base in few bits."""
    meta = bundle.meta
    assert isinstance(meta.tuning, Qlora)
    return quantized_base(_base_folder(bundle), meta.task, meta.labels, meta.tuning, dtype=_trained_in(bundle))


def _base_folder(bundle: Bundle) -> Path:
    if bundle.meta.base_model is None:
        raise ModelError(f"{bundle.path} holds an adapter but does not say of which model", where="bundle.base_model")
    return model_folder(Model(model_name_or_path=bundle.meta.base_model))
