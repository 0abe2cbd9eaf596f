"""A model folder for training from scratch: a tokenizer of the corpus, and random weights in the shape of a config.json."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from danlu.artifact.bundle import canonical_json
from danlu.artifact.pretrained import model_folder
from danlu.data.columns import as_text, is_empty, labelled
from danlu.data.formats import read_rows
from danlu.data.row import Broken
from danlu.data.row_texts import roles_of
from danlu.data.stream import find, stream
from danlu.errors import ModelError, StorageError
from danlu.spec.data import Data, DropBroken, RepairBroken
from danlu.spec.model import Model
from danlu.spec.task import FromScratch, MaskedLm, Pretrain, Task
from danlu.tasks.config import why

FIELD = "task.from_scratch.config_overrides"
END, PAD = "<|endoftext|>", "<|pad|>"
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def start_folder(model: Model, data: Data, task: Task, *, seed: int) -> Path:
    """The folder that training starts from: the pretrained model's, or one made here, the same in every process."""
    if not isinstance(task, Pretrain) or task.from_scratch is None:
        return model_folder(model)
    shape = model_folder(model, need_weights=False)
    texts = _Texts(data)
    masked = isinstance(task.objective, MaskedLm)
    digest = sha256(canonical_json([task.model_dump(mode="json"), model.max_length, seed]).encode())
    digest.update((shape / "config.json").read_bytes())
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogatepass"))
    target = Path(data.cache_dir) / "from_scratch" / digest.hexdigest()[:24]
    if (target / "config.json").exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = f"the model that training starts from cannot be written there: {error}"
        raise StorageError(told, where="data.cache_dir", fix="a folder that can be written") from error
    # Workers of one machine may all be here at once: each makes its own, and the first to finish is kept.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        whole = Path(partial, "whole")
        tokenizer = train_tokenizer(texts, task.from_scratch.vocab_size, masked=masked, max_length=model.max_length)
        tokenizer.save_pretrained(whole)
        fresh_model(shape, task.from_scratch, tokenizer, masked=masked, seed=seed).save_pretrained(whole)
        try:
            whole.rename(target)
        except OSError:
            if not (target / "config.json").exists():
                raise
    return target


class _Texts:
    """The texts of the training rows, as often as they are asked for; read each time where they are streamed."""

    def __init__(self, data: Data) -> None:
        self.data, self.held = data, None if data.streaming else _held(data)

    def __iter__(self) -> Iterator[str]:
        return iter(self.held) if self.held is not None else _streamed(self.data)


def _held(data: Data) -> list[str]:
    rows = read_rows(data.train, format=data.format, max_rows=data.max_rows, where="data.train")
    return labelled(rows, data.columns, where="data.train", need_label=False).texts


def _streamed(data: Data) -> Iterator[str]:
    roles: dict[str, str] = {}
    tolerant = any(isinstance(step, DropBroken | RepairBroken) for step in data.clean)
    rows = (row for source in find(data.train, format=data.format) for row in stream(source))
    for row in islice(rows, data.max_rows):
        if isinstance(row, Broken):
            if not tolerant:
                raise row.refusal("data.train")
            continue
        roles = roles or roles_of(row.values, data.columns, None, "data.train")
        if not is_empty(text := as_text(row.values.get(roles.get("text", "text")))):
            yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, masked: bool, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, with an end token, or with BERT's special tokens. (WordPiece's trainer makes another vocabulary each time.)"""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    def batches() -> Iterator[list[str]]:
        left = iter(texts)
        while some := list(islice(left, 1000)):
            yield some

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(BERT_TOKENS) if masked else [END, PAD]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(batches(), trainer)
    if not masked:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=max_length)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ids)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), BERT_TOKENS, strict=False))
    # A word's token has the space before it inside; so has the mask that stands for it.
    mask = AddedToken("[MASK]", lstrip=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, mask_token=mask, **names)


def fresh_model(shape: Path, from_scratch: FromScratch, tokenizer: PreTrainedTokenizerFast, *, masked: bool, seed: int) -> PreTrainedModel:
    """Random weights in the shape of a folder's config.json, the tokenizer's numbers put into it."""
    try:
        written = json.loads((shape / "config.json").read_text(encoding="utf-8"))
        known = AutoConfig.for_model(written["model_type"])
        if unknown := next((name for name in from_scratch.config_overrides if not hasattr(known, name)), None):
            raise ModelError(f"{known.model_type} has no field {unknown!r}", where=FIELD, fix="a field of its config.json")
        if "num_hidden_layers" in from_scratch.config_overrides:
            # One kind for each layer there was: the model's own pattern for the new number is taken instead.
            written = {name: value for name, value in written.items() if name not in ("layer_types", "mlp_layer_types")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{shape / 'config.json'} is no model's: {error}", where="model.model_name_or_path") from error
    try:
        config = AutoConfig.for_model(**written | from_scratch.config_overrides)
    except Exception as error:  # whatever a family's class makes of the values that it is given
        raise ModelError(f"no {known.model_type} model has these values: {why(error)}", where=FIELD) from error
    config.vocab_size = len(tokenizer)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    torch.manual_seed(seed)
    loader = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    try:
        model: PreTrainedModel = loader.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]]))  # heads that do not go into each other are only noticed here
    except MemoryError:
        raise
    except Exception as error:  # whatever its layers make of sizes that do not go together
        raise ModelError(f"no model of this shape can be built: {why(error)}", where=FIELD) from error
    return model
