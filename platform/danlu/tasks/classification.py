"""Classification: one label per text or pair of texts. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.cells import left, right, widest
from danlu.data.columns import Labelled, labelled
from danlu.data.encode import Encoded, encode
from danlu.data.pack import Packed
from danlu.data.report import check_labels, data_report
from danlu.data.split import stratified_split
from danlu.errors import SpecError
from danlu.spec.data import Data
from danlu.spec.task import Classification, EncoderTask
from danlu.tasks.decision import decide
from danlu.tasks.encoder import build_encoder, encoder_skeleton, head_of, head_parameters, text_examples
from danlu.tasks.exchange import Decided, Prediction, Text
from danlu.tasks.packed import PackedClassifier, inputs
from danlu.tasks.rows import Split, Splits, hold_out, metrics_line, per_class_table, read_given, read_splits

PER_TOKEN = False

# rows


def splits(data: Data, task: Classification, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split and tokenise; raises DataError for anything that could not be learned from."""
    rows = read_splits(data)
    texts = {name: labelled(table, data.columns, where=f"data.{name}") for name, table in rows.items()}
    label_names = check_labels(texts["train"].labels or [], {name: split for name, split in texts.items() if name != "train"}, task.labels)
    if task.decision is not None and (problem := task.decision.problem(label_names)):
        raise SpecError(problem, where="task.decision")
    made = {name: _split(split, task, tokenizer, label_names, max_length, data.cache_dir) for name, split in texts.items()}
    report = data_report({name: (texts[name], split.encoded) for name, split in made.items()}, rows, max_length=max_length)
    if "dev" not in made:
        assert made["train"].labels is not None
        made = hold_out(made, *stratified_split(made["train"].labels, data.dev_size, seed))
    return Splits(made["train"], made["dev"], made.get("test"), label_names, report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: Classification,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Labelled rows of other files than the job's, for scoring a model that knows `label_names`."""
    texts = labelled(read_given(source, data), data.columns, where="--data")
    check_labels(list(label_names), {"test": texts}, label_names)
    return _split(texts, task, tokenizer, label_names, max_length, data.cache_dir)


def encode_examples(
    examples: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    task: EncoderTask,
    *,
    max_length: int,
    cache_dir: str | Path | None = None,
) -> Encoded:
    """Token ids of texts, or of pairs if there is one among them, cut to max_length."""
    paired = any(one.text_pair is not None for one in examples)
    pairs = [one.text_pair or "" for one in examples] if paired else None
    return encode([one.text for one in examples], pairs, tokenizer, max_length=max_length, cache_dir=cache_dir)


def _split(
    texts: Labelled,
    task: Classification,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    max_length: int,
    cache_dir: str,
) -> Split:
    index = {name: i for i, name in enumerate(label_names)}
    told = texts.labels or []
    examples = text_examples(texts)
    encoded = encode_examples(examples, tokenizer, task, max_length=max_length, cache_dir=cache_dir)
    return Split(encoded, np.asarray([index[label] for label in told], dtype=np.int64), texts, examples, [(label,) for label in told])


# model


def build_model(
    folder: str | Path, label_names: Sequence[str], *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder with a new head for these labels, in float32; `quantization` holds its linear layers in fewer bits.

    ModelError if the folder lacks some of the encoder.
    """
    head = {**head_of(label_names), "problem_type": "single_label_classification"}
    return build_encoder(AutoModelForSequenceClassification, folder, head, dropout=dropout, quantization=quantization)


def skeleton(folder: str | Path, num_labels: int) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    return encoder_skeleton(AutoModelForSequenceClassification, folder, {"num_labels": num_labels})


def wrap(model: PreTrainedModel, task: Classification, *, packed: bool | None = None) -> PackedClassifier:
    """The model as the loop calls it; `packed` as PackedEncoder has it."""
    return PackedClassifier(model, packed=packed)


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

    def text(self) -> str:
        """For the terminal, with the classes and the confusion matrix."""
        corner = "truth / answer"
        width = widest((corner, *self.per_class))
        lines = [metrics_line(self), "", *per_class_table(self.per_class)]
        lines += ["", f"  {left(corner, width)} " + " ".join(right(name, 7) for name in self.per_class)]
        for name, counts in zip(self.per_class, self.confusion, strict=True):
            lines.append(f"  {left(name, width)} " + " ".join(f"{count or '.':>7}" for count in counts))
        return "\n".join(lines)


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Logits, [rows, labels]."""
    logits: torch.Tensor = model(*inputs(batch))
    return logits


def scores(logits: np.ndarray, split: Split, label_names: Sequence[str], task: EncoderTask) -> Scores:
    """Score logits (float [rows, labels]) against a split's labels with scikit-learn."""
    labels = split.labels
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


def predictions(
    logits: np.ndarray, encoded: Encoded, examples: Sequence[Text], label_names: Sequence[str], task: EncoderTask
) -> list[Prediction]:
    """Labels and probabilities of logits (float [rows, labels]), calibrated as `Predictor` gives them."""
    probabilities = torch.from_numpy(logits).softmax(-1).numpy()
    if isinstance(task, Classification) and task.decision is not None:
        answers, margins = decide(probabilities, label_names, task.decision)
        return [
            Decided(label_names[int(answer)], [float(p) for p in row], int(answer), float(margin))
            for row, answer, margin in zip(probabilities, answers, margins, strict=True)
        ]
    return [Prediction(label_names[int(row.argmax())], [float(p) for p in row]) for row in probabilities]


__all__ = [
    "PER_TOKEN", "Scores", "build_model", "encode_examples", "given_split", "head_parameters", "loss", "num_targets", "predictions",
    "row_outputs", "scores", "skeleton", "splits", "wrap",
]  # fmt: skip
