"""Classification: one label per text. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import labelled
from danlu.data.encode import Encoded, encode
from danlu.data.formats import read_rows
from danlu.data.pack import Packed, by_length, pack_rows
from danlu.data.report import check_labels, data_report
from danlu.data.split import stratified_split
from danlu.errors import ModelError
from danlu.spec.data import Data
from danlu.spec.task import Classification
from danlu.tasks.packed import PackedClassifier, inputs
from danlu.tasks.rows import Split, Splits
from danlu.tasks.tokenizer import load_tokenizer

# rows


def splits(data: Data, task: Classification, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split and tokenise; raises DataError for anything that could not be learned from."""
    rows = {"train": read_rows(data.train, format=data.format, max_rows=data.max_rows, where="data.train")}
    for name, source in (("dev", data.dev), ("test", data.test)):
        if source is not None:
            rows[name] = read_rows(source, format=data.format, max_rows=data.max_rows, where=f"data.{name}")
    texts = {name: labelled(table, data.columns, where=f"data.{name}") for name, table in rows.items()}
    label_names = check_labels(texts["train"].labels or [], {name: split for name, split in texts.items() if name != "train"}, task.labels)
    index = {name: i for i, name in enumerate(label_names)}
    labels = {name: np.asarray([index[label] for label in split.labels or []], dtype=np.int64) for name, split in texts.items()}
    encoded = {
        name: encode(split.texts, split.pairs, tokenizer, max_length=max_length, cache_dir=data.cache_dir) for name, split in texts.items()
    }
    report = data_report({name: (texts[name], encoded[name]) for name in texts}, rows, max_length=max_length)
    whole = {name: Split(encoded[name], labels[name], texts[name]) for name in texts}
    if "dev" not in whole:
        train_rows, dev_rows = stratified_split(labels["train"], data.dev_size, seed)
        whole["dev"], whole["train"] = _take(whole["train"], dev_rows), _take(whole["train"], train_rows)
    return Splits(whole["train"], whole["dev"], whole.get("test"), label_names, report)


def given_split(
    source: str | Sequence[str], data: Data, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str], *, max_length: int
) -> Split:
    """Labelled rows of other files than the job's, for scoring a model that knows `label_names`."""
    texts = labelled(read_rows(source, format=data.format, max_rows=data.max_rows, where="--data"), data.columns, where="--data")
    check_labels(list(label_names), {"test": texts}, label_names)
    index = {name: i for i, name in enumerate(label_names)}
    labels = np.asarray([index[label] for label in texts.labels or []], dtype=np.int64)
    return Split(encode(texts.texts, texts.pairs, tokenizer, max_length=max_length, cache_dir=data.cache_dir), labels, texts)


def _take(split: Split, rows: np.ndarray) -> Split:
    assert split.labels is not None
    return Split(split.encoded.take(rows), split.labels[rows], split.texts.take(rows))


# model


def build_model(
    folder: str | Path, label_names: Sequence[str], *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder with a new head for these labels, in float32; `quantization` holds its linear layers in fewer bits.

    ModelError if the folder lacks some of the encoder.
    """
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = len(label_names)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: i for i, name in enumerate(label_names)}
    config.problem_type = "single_label_classification"
    if dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, dropout)
    fewer = {} if quantization is None else {"quantization_config": quantization}
    model: PreTrainedModel
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **fewer
    )
    # Only a head may be missing, or be another number of labels' own; an encoder's layer would silently start from nothing.
    unloaded = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])} - head_parameters(model)
    if unloaded:
        raise ModelError(
            f"the weights in {folder} lack or do not fit {len(unloaded)} of the encoder's parameters, such as {min(unloaded)}",
            where="model.model_name_or_path",
            fix="a folder whose config.json belongs to its weights",
        )
    return model


def skeleton(folder: str | Path, num_labels: int) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    try:
        config = AutoConfig.from_pretrained(folder)
        config.num_labels = num_labels
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} is no classifier's base: {error}", where="model.model_name_or_path") from error
    return model


def head_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that stand on top of the encoder: they start from nothing, or nearly so."""
    prefix = model.base_model_prefix
    layers = (".encoder.", ".embeddings.", ".transformer.", ".layers.", ".embed_tokens.", "embeddings.", "encoder.")
    return {name for name, _ in model.named_parameters() if not name.startswith(f"{prefix}.") or not any(part in name for part in layers)}


def wrap(model: PreTrainedModel) -> PackedClassifier:
    """The model as the loop calls it."""
    return PackedClassifier(model)


# loss


def loss(model: nn.Module, batch: Packed, task: Classification) -> torch.Tensor:
    """Sum of the cross-entropies of a batch's rows (the caller divides by the targets of the whole global batch)."""
    assert batch.labels is not None
    logits = row_outputs(model, batch)
    return nn.functional.cross_entropy(logits.float(), batch.labels, reduction="sum", label_smoothing=task.label_smoothing)


def num_targets(batch: Packed) -> int:
    """How many targets a batch has: one a row."""
    return batch.num_rows


# metrics


@dataclass(frozen=True)
class Scores:
    """Scores of one split. `per_class`: label -> precision, recall, f1, support; `confusion`: int [labels, labels], rows are the truth."""

    accuracy: float
    macro_f1: float
    loss: float
    num_rows: int
    per_class: Mapping[str, Mapping[str, float]]
    confusion: list[list[int]]

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "loss": self.loss}


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Logits, [rows, labels]."""
    logits: torch.Tensor = model(*inputs(batch))
    return logits


def scores(logits: np.ndarray, labels: np.ndarray | None, label_names: Sequence[str]) -> Scores:
    """Score logits (float [rows, labels]) against labels (int [rows]) with scikit-learn."""
    assert labels is not None
    predicted, every = logits.argmax(axis=1), range(len(label_names))
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    present = support > 0  # a class that is not in this split has no recall to average
    log_probabilities = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    return Scores(
        accuracy=float(accuracy_score(labels, predicted)),
        macro_f1=float(f1[present].mean()) if present.any() else 0.0,
        loss=float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        num_rows=len(labels),
        per_class={
            name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]), "support": int(support[i])}
            for i, name in enumerate(label_names)
        },
        confusion=confusion_matrix(labels, predicted, labels=every).tolist(),
    )


# prediction


@dataclass(frozen=True)
class Prediction:
    """The answer for one text: the most probable label, and each label's probability in the order of the model's outputs."""

    label: str
    probabilities: list[float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for people."""
        return {"label": self.label, "probability": round(max(self.probabilities), 4)}


class Predictor:
    """A model, its tokenizer and its labels: what evaluation and serving share, so that both give the same answers."""

    def __init__(
        self,
        model: PackedClassifier,
        tokenizer: PreTrainedTokenizerBase,
        label_names: Sequence[str],
        *,
        max_length: int,
        bf16: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.label_names = model.eval(), tokenizer, list(label_names)
        self.max_length, self.bf16 = max_length, bf16
        self.device = next(model.parameters()).device

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Encoded:
        """Token ids, cut to max_length."""
        return encode(texts, pairs, self.tokenizer, max_length=self.max_length, cache_dir=None)

    def forward(self, batch: Packed) -> np.ndarray:
        """Logits of one packed batch, float32 [rows, labels]."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model.logits(batch.to(self.device)).float().cpu().numpy()

    def logits(self, encoded: Encoded, *, batch_tokens: int = 2048) -> np.ndarray:
        """Logits of all rows in their order, float32 [rows, labels]; batches are filled by length."""
        logits = np.empty((len(encoded), len(self.label_names)), dtype=np.float32)
        for rows in by_length(encoded.lengths, batch_tokens):
            logits[rows] = self.forward(pack_rows(encoded, rows))
        return logits

    def outputs(self, encoded: Encoded, *, batch_tokens: int = 2048) -> np.ndarray:
        """What `scores` is made of: the logits."""
        return self.logits(encoded, batch_tokens=batch_tokens)

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Labels and probabilities of texts."""
        return predictions(self.logits(self.encode(texts, pairs)), self.label_names)


def predictions(logits: np.ndarray, label_names: Sequence[str]) -> list[Prediction]:
    """Labels and probabilities of logits (float [rows, labels])."""
    probabilities = torch.from_numpy(logits).softmax(-1).numpy()
    return [Prediction(label_names[int(row.argmax())], [float(p) for p in row]) for row in probabilities]


def load_predictor(
    folder: str | Path, label_names: Sequence[str], *, max_length: int, bf16: bool = False, model: PackedClassifier | None = None
) -> Predictor:
    """The predictor of a saved classifier's folder (weights and tokenizer). `model` overrides how the weights are loaded."""
    if model is None:
        model = PackedClassifier(AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32))
    return Predictor(model, load_tokenizer(folder), label_names, max_length=max_length, bf16=bf16)
