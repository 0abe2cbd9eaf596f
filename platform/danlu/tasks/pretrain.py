"""Causal language modelling on plain text. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import Labelled, labelled
from danlu.data.encode import Encoded, encode
from danlu.data.pack import Packed
from danlu.data.report import data_report
from danlu.data.split import random_split
from danlu.errors import DataError, ModelError
from danlu.spec.data import Data
from danlu.spec.task import Pretrain
from danlu.tasks.loading import load_model, load_shapes
from danlu.tasks.packed import layer_stack
from danlu.tasks.packed_decoder import PackedDecoder
from danlu.tasks.rows import Split, Splits, read_given, read_splits

if TYPE_CHECKING:
    from danlu.tasks.judge import LanguageJudge

WHOLE = 1 << 40
"""Tokens a text may have: nothing of it is cut off, it is cut into pieces."""

PER_TOKEN = False

# rows


def splits(data: Data, task: Pretrain, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, split and tokenise; each row is a text, or a piece of `max_length` tokens of a longer one."""
    rows = read_splits(data)
    texts = {name: labelled(table, data.columns, where=f"data.{name}", need_label=False) for name, table in rows.items()}
    if "dev" not in texts:
        # Whole texts are held out: pieces of one text on both sides would flatter the score.
        train_rows, dev_rows = random_split(len(texts["train"].texts), data.dev_size, seed)
        texts["dev"], texts["train"] = texts["train"].take(dev_rows), texts["train"].take(train_rows)
        rows["dev"] = rows["train"]
    whole = {name: encode(split.texts, None, tokenizer, max_length=WHOLE, cache_dir=data.cache_dir) for name, split in texts.items()}
    ends = tokenizer.eos_token_id
    pieces = {name: cut(encoded, max_length, end=ends) for name, encoded in whole.items()}
    for name, found in pieces.items():
        if not len(found):
            raise DataError("no text has two tokens, so there is no next token to learn", where=f"data.{name}", fix="longer texts")
    report = data_report({name: (texts[name], pieces[name]) for name in texts}, rows, max_length=max_length)
    made = {name: Split(pieces[name], None, texts[name]) for name in texts}
    return Splits(made["train"], made["dev"], made.get("test"), [], report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: Pretrain,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Texts of other files than the job's."""
    rows = read_given(source, data)
    texts = labelled(rows, data.columns, where="--data", need_label=False)
    whole = encode(texts.texts, None, tokenizer, max_length=WHOLE, cache_dir=data.cache_dir)
    return Split(cut(whole, max_length, end=tokenizer.eos_token_id), None, texts)


def cut(whole: Encoded, max_length: int, *, end: int | None) -> Encoded:
    """Rows cut into pieces of at most `max_length` tokens, the end token behind each text's last; pieces of one token are left out."""
    pieces: list[np.ndarray] = []
    for index in range(len(whole)):
        ids = whole.row(index)
        if end is not None and (not len(ids) or ids[-1] != end):
            ids = np.append(ids, np.int32(end))
        pieces += [piece for start in range(0, len(ids), max_length) if len(piece := ids[start : start + max_length]) > 1]
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    flat = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    return Encoded(flat, offsets, np.zeros(len(pieces), dtype=bool))


# model


def build_model(
    folder: str | Path, label_names: Sequence[str] = (), *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained decoder, in float32; `quantization` holds its linear layers in fewer bits."""
    return load_model(
        AutoModelForCausalLM,
        folder,
        dropout=dropout,
        dropout_names=("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"),
        quantization=quantization,
        fix="a causal language model's folder (an encoder's weights have no output layer to predict with)",
    )


def skeleton(folder: str | Path, num_labels: int = 0) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    model = load_shapes(AutoModelForCausalLM, folder, "causal language model")
    if layer_stack(model) is not None:
        raise ModelError(
            f"{folder} is an encoder, {type(model).__name__}: each token sees those behind it, so there is nothing to foretell",
            where="model.model_name_or_path",
            fix="a causal language model; or task: {kind: pretrain, objective: {kind: masked}}",
        )
    return model


def head_parameters(model: PreTrainedModel) -> set[str]:
    """None: the output layer is pretrained like the rest."""
    return set()


def wrap(model: PreTrainedModel, task: Pretrain) -> PackedDecoder:
    """The model as the loop calls it."""
    return PackedDecoder(model)


# loss


def loss(model: nn.Module, batch: Packed, task: Pretrain) -> torch.Tensor:
    """Sum of the next-token losses of a batch."""
    summed: torch.Tensor = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_type_ids).sum()
    return summed


def num_targets(batch: Packed) -> int:
    """Every token but the first of its row."""
    return batch.num_tokens - batch.num_rows


# metrics


@dataclass(frozen=True)
class LanguageScores:
    """`loss` is nats a token, over all tokens of the split."""

    loss: float
    num_tokens: int
    num_rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {"loss": self.loss, "perplexity": self.perplexity}

    def text(self) -> str:
        """For the terminal."""
        size = f"tokens {self.num_tokens:,}   rows {self.num_rows:,}"
        return f"  loss {self.loss:.4f} nats a token   perplexity {self.perplexity:.3f}   {size}"


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Each row's summed loss and number of targets, float32 [rows, 2]."""
    losses: torch.Tensor = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_type_ids)
    return torch.stack([losses.float(), (batch.cu_seqlens.diff() - 1).to(losses.device, torch.float32)], dim=1)


def scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: Pretrain) -> LanguageScores:
    """Loss over all tokens of rows' outputs (float [rows, 2])."""
    total, tokens = outputs.astype(np.float64).sum(axis=0)
    return LanguageScores(float(total / tokens), int(tokens), len(outputs))


# prediction


def text_losses(judge: LanguageJudge, texts: Sequence[str]) -> list[float]:
    """Nats a token of each text, cut at the judge's max_length."""
    encoded = encode(texts, None, judge.tokenizer, max_length=judge.max_length, cache_dir=None)
    outputs = judge.outputs(Split(encoded, None, Labelled(list(texts), None, None, [], {})))
    return [float(total / max(tokens, 1)) for total, tokens in outputs]
