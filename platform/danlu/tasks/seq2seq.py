"""Sequence to sequence: an encoder-decoder reads a text and writes another. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import Labelled
from danlu.data.conversations import Kept, keep, records
from danlu.data.encode import NO_TARGET, encode, encoded_rows
from danlu.data.formats import Rows
from danlu.data.pack import Packed
from danlu.data.report import data_report
from danlu.data.split import random_split
from danlu.data.text_pairs import TextPair, text_pair_columns, text_pair_reader
from danlu.errors import ModelError
from danlu.spec.data import Data
from danlu.spec.task import Seq2Seq
from danlu.tasks import chat
from danlu.tasks.encoder_decoder import EncoderDecoder
from danlu.tasks.loading import load_model, load_shapes
from danlu.tasks.rows import Split, Splits, hold_out, metrics_line, read_given, read_splits

PER_TOKEN = False

# rows


def splits(data: Data, task: Seq2Seq, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split and tokenise; DataError for what could not be learned from."""
    made: dict[str, Split] = {}
    tables = read_splits(data)
    notes = []
    for name, table in tables.items():
        made[name], kept, cut = _encoded(table, task, tokenizer, data, max_length, f"data.{name}")
        notes += kept.notes(name)
        if cut:
            notes.append(f"{name}: {cut} targets cut at task.max_target_length={task.max_target_length} tokens")
    if "dev" not in made:
        train_rows, dev_rows = random_split(len(made["train"]), data.dev_size, seed)
        made, tables["dev"] = hold_out(made, train_rows, dev_rows), tables["train"]
    report = data_report({name: (s.texts, s.encoded) for name, s in made.items()}, tables, max_length=max_length, notes=notes)
    return Splits(made["train"], made["dev"], made.get("test"), [], report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: Seq2Seq,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Pairs of other files than the job's."""
    rows = read_given(source, data)
    return _encoded(rows, task, tokenizer, data, max_length, "--data")[0]


def _encoded(
    rows: Rows, task: Seq2Seq, tokenizer: PreTrainedTokenizerBase, data: Data, max_length: int, where: str
) -> tuple[Split, Kept[TextPair], int]:
    """A row holds the source, then the target, told apart by its token types."""
    columns = text_pair_columns(rows, task.source_lang, task.target_lang, where=where)
    kept = keep(records(rows), text_pair_reader(columns), where=where)
    texts = [task.source_prefix + pair.source for pair in kept.items]
    source = encode(texts, None, tokenizer, max_length=max_length, cache_dir=data.cache_dir)
    targets = tokenizer(text_target=[pair.target for pair in kept.items], truncation=True, max_length=task.max_target_length)
    written = [np.asarray(ids, dtype=np.int32) for ids in targets["input_ids"]]
    cut = sum(bool(one.overflowing) for one in targets.encodings or ())
    encoded = encoded_rows(
        [np.concatenate([source.row(i), ids]) for i, ids in enumerate(written)],
        source.truncated.tolist(),
        token_types=[np.repeat([0, 1], [source.lengths[i], len(ids)]) for i, ids in enumerate(written)],
        token_labels=[np.concatenate([np.full(source.lengths[i], NO_TARGET), ids]) for i, ids in enumerate(written)],
    )
    chosen = {"source": ".".join(columns[:-1]), "target": ".".join((*columns[:-2], columns[-1]))}
    table = Labelled([pair.source for pair in kept.items], [pair.target for pair in kept.items], None, kept.row_numbers, chosen)
    return Split(encoded, None, table), kept, cut


# model


def build_model(
    folder: str | Path, label_names: Sequence[str] = (), *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder-decoder, in float32; `quantization` holds its linear layers in fewer bits."""
    return load_model(
        AutoModelForSeq2SeqLM,
        folder,
        dropout=dropout,
        dropout_names=("dropout_rate", "dropout", "attention_dropout", "activation_dropout"),
        quantization=quantization,
        fix="an encoder-decoder's folder whose config.json belongs to its weights",
    )


def skeleton(folder: str | Path, num_labels: int = 0) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    model = load_shapes(AutoModelForSeq2SeqLM, folder, "encoder-decoder")
    size, file = int(model.config.vocab_size), f"{folder}/config.json"
    if (start := model.config.decoder_start_token_id) is None:
        told = f"{file} has no decoder_start_token_id, the token that every target is written behind"
        raise ModelError(told, where="model.model_name_or_path", fix="put it there; of T5 it is 0, of BART 2")
    for name, token in (("decoder_start_token_id", start), ("pad_token_id", model.config.pad_token_id)):
        if token is not None and not 0 <= token < size:
            told = f"{file}: {name}={token} is none of the model's {size} tokens"
            raise ModelError(told, where="model.model_name_or_path", fix="correct it, or copy the model again")
    return model


def head_parameters(model: PreTrainedModel) -> set[str]:
    """None: the output layer is pretrained like the rest."""
    return set()


def wrap(model: PreTrainedModel, task: Seq2Seq) -> EncoderDecoder:
    """The model as the loop calls it."""
    return EncoderDecoder(model)


# loss


def loss(model: nn.Module, batch: Packed, task: Seq2Seq) -> torch.Tensor:
    """Sum of the losses of a batch's target tokens."""
    summed: torch.Tensor = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_type_ids).sum()
    return summed


num_targets = chat.num_targets


# metrics


@dataclass(frozen=True)
class Seq2SeqScores:
    """`loss` and `token_accuracy` are of the targets' tokens, given those before them; `generated` is of what the model writes itself."""

    loss: float
    token_accuracy: float
    num_tokens: int
    num_rows: int
    generated: Mapping[str, float]

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {"loss": self.loss, "token_accuracy": self.token_accuracy, **self.generated}

    def text(self) -> str:
        """For the terminal."""
        return metrics_line(self)


@dataclass(frozen=True)
class WrittenScores:
    """Of texts alone, as an endpoint gives them: it does not say how likely it finds the references."""

    num_rows: int
    generated: Mapping[str, float]

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return dict(self.generated)

    def text(self) -> str:
        """For the terminal."""
        return metrics_line(self)


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Each row's summed loss, hits and number of targets, float32 [rows, 3]."""
    assert batch.token_type_ids is not None
    found: torch.Tensor = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_type_ids, True)
    counts = torch.stack([piece.sum() for piece in torch.split(batch.token_type_ids, batch.cu_seqlens.diff().tolist())])
    return torch.cat([found.float(), counts[:, None].to(found.device, torch.float32)], dim=1)


def scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: Seq2Seq) -> Seq2SeqScores:
    """Scores over all target tokens of rows' outputs (float [rows, 3])."""
    total, hits, tokens = outputs.astype(np.float64).sum(axis=0)
    return Seq2SeqScores(float(total / tokens), float(hits / tokens), int(tokens), len(outputs), {})


def with_generated(found: Seq2SeqScores, written: Sequence[str], references: Sequence[str]) -> Seq2SeqScores:
    """The scores with those of what the model wrote by itself."""
    from danlu.tasks.text_scores import text_scores

    return replace(found, generated=text_scores(written, references))
