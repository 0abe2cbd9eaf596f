"""From a bundle or a model reference to a model, its tokenizer and the ids that end a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from danlu.artifact.bundle import Bundle
from danlu.artifact.pretrained import model_folder
from danlu.compress.load import load_model
from danlu.compress.weight_only import quantize_weights
from danlu.errors import ModelError
from danlu.spec.compress import BnbInt8, BnbNf4, Int4, Int8
from danlu.spec.model import Model
from danlu.spec.serve import Torch
from danlu.spec.task import is_decoders
from danlu.spec.tuning import Qlora, VirtualTokens
from danlu.tasks.device import has_native_bf16, pick_device
from danlu.tasks.judge import end_ids
from danlu.tasks.tokenizer import load_tokenizer
from danlu.tasks.vocabulary import num_embeddings

DEFAULT_MODEL_LEN = 4096
"""Where max_model_len is not given: a slot is as long as this, and few texts are longer."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, in the dtype and on the device it will run in."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]
    max_model_len: int

    @property
    def vocab_size(self) -> int:
        return num_embeddings(self.model.config)


def load(spec: Torch, bundle: Bundle | None) -> Loaded:
    """ModelError if there is no causal language model, or if it has fewer positions than max_model_len."""
    device = pick_device(spec.num_gpus)
    if bundle is not None:
        _check_it_goes_on(bundle)
        folder = bundle.path / "model"
        wanted = bundle.meta.precision if spec.dtype == "auto" else spec.dtype
        model = load_model(bundle)
        # bitsandbytes' bits are packed in a format of their own: no dtype to cast to.
        if not isinstance(bundle.meta.quantization, BnbInt8 | BnbNf4) and not isinstance(bundle.meta.tuning, Qlora):
            model = model.to(_dtype(wanted, device))
    else:
        assert spec.model_name_or_path is not None, "the spec asks for a bundle or a model"
        folder = model_folder(Model(model_name_or_path=spec.model_name_or_path, revision=spec.revision))
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(spec.dtype, device), attn_implementation="eager")
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder} is no causal language model: {error}", where="engine.model_name_or_path") from error
        if spec.quantization is not None:
            dtype = model.dtype  # what is tied to the head comes back in float32
            model = quantize_weights(model, Int8() if spec.quantization == "int8" else Int4()).to(dtype)
    # The reference that the engine's answers are compared with: the one implementation that every model has, with all its details.
    model.set_attn_implementation("eager")
    model = model.to(device).eval().requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    # Of an adapter's bundle the folder says more than its base model does: what ends a turn that it has learned.
    ends = end_ids([folder], tokenizer, _named_ends(model))
    return Loaded(model, tokenizer, sorted(ends), _max_model_len(spec, model))


def load_draft(spec: Torch, target: Loaded) -> Loaded:
    """The model that guesses for another one, as exact and as long as that; ModelError unless they have the same tokens."""
    assert spec.draft_model is not None
    same = {"dtype": "fp32" if target.model.dtype == torch.float32 else "bf16", "max_model_len": target.max_model_len}
    try:
        draft = load(spec.model_copy(update={"model_name_or_path": spec.draft_model, "revision": None, "quantization": None, **same}), None)
    except ModelError as error:
        raise ModelError(f"{spec.draft_model} cannot guess: {error.problem}", where="engine.draft_model", fix=error.fix) from error
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        token = next(one for one in (ours | theirs) if ours.get(one) != theirs.get(one))
        raise ModelError(
            f"{spec.draft_model} has other tokens than {spec.model_name_or_path or 'the bundle'}, for which it is to guess: {token!r} is "
            f"{theirs.get(token, 'none')} there and {ours.get(token, 'none')} here",
            where="engine.draft_model",
            fix="a smaller model with the same tokenizer, or leave it out",
        )
    return draft


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        wanted = "bf16" if has_native_bf16(device) else "fp32"
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def _check_it_goes_on(bundle: Bundle) -> None:
    """ModelError unless the bundle is a causal language model in the model's own shape."""
    meta = bundle.meta
    if not is_decoders(meta.task):
        problem = f"{meta.name} was trained for {meta.task.kind}: it goes on with no text"
        raise ModelError(problem, where="bundle", fix="a causal language model's bundle, or engine.kind: encoder for an encoder's task")
    if isinstance(meta.tuning, VirtualTokens):
        raise ModelError(
            f"{meta.name} was tuned by {meta.tuning.kind}: its virtual tokens stand before every text, and this engine puts none there",
            where="bundle",
            fix="a bundle tuned by full, freeze, lora, qlora, adalora, ia3 or adapter; danlu predict answers with this one",
        )


def _named_ends(model: PreTrainedModel) -> list[int]:
    said = getattr(model.generation_config, "eos_token_id", None)
    return said if isinstance(said, list) else [] if said is None else [said]


def _max_model_len(spec: Torch, model: PreTrainedModel) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if spec.max_model_len is None:
        return min(int(positions or DEFAULT_MODEL_LEN), DEFAULT_MODEL_LEN)
    if positions is not None and spec.max_model_len > positions:
        raise ModelError(
            f"max_model_len={spec.max_model_len} is more than the {positions} positions that the model has",
            where="engine.max_model_len",
            fix=f"max_model_len: {positions}",
        )
    return spec.max_model_len
