"""Classification with any number of labels a text. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import Labelled, as_label, is_missing, labelled
from danlu.data.encode import Encoded
from danlu.data.formats import Rows
from danlu.data.pack import Packed
from danlu.data.report import check_labels, data_report
from danlu.data.split import random_split
from danlu.spec.data import Data
from danlu.spec.task import MultiLabelClassification
from danlu.tasks.classification import encode_examples, row_outputs, skeleton
from danlu.tasks.encoder import build_encoder, head_of, head_parameters, text_examples
from danlu.tasks.exchange import LabelSet, Text
from danlu.tasks.packed import PackedClassifier
from danlu.tasks.rows import Split, Splits, hold_out, metrics_line, per_class_table, read_given, read_splits

PER_TOKEN = False

# rows


def splits(data: Data, task: MultiLabelClassification, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split and tokenise; raises DataError for anything that could not be learned from."""
    rows = read_splits(data)
    texts = {name: _texts(table, data, task, f"data.{name}") for name, table in rows.items()}
    single = {name: _one_by_one(split) for name, split in texts.items()}
    others = {name: split for name, split in single.items() if name != "train"}
    label_names = check_labels(single["train"].labels or [], others, task.labels)
    made = {name: _split(split, task, tokenizer, label_names, max_length, data.cache_dir) for name, split in texts.items()}
    report = data_report({name: (texts[name], split.encoded) for name, split in made.items()}, rows, max_length=max_length)
    if "dev" not in made:
        made = hold_out(made, *random_split(len(made["train"]), data.dev_size, seed))
    return Splits(made["train"], made["dev"], made.get("test"), label_names, report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: MultiLabelClassification,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Labelled rows of other files than the job's, for scoring a model that knows `label_names`."""
    texts = _texts(read_given(source, data), data, task, "--data")
    check_labels(list(label_names), {"test": _one_by_one(texts)}, label_names)
    return _split(texts, task, tokenizer, label_names, max_length, data.cache_dir)


def _texts(rows: Rows, data: Data, task: MultiLabelClassification, where: str) -> Labelled:
    """Rows whose labels are tuples of names, sorted."""
    texts = labelled(rows, data.columns, where=where, read_label=label_reader(task.separator))
    counts = Counter(name for names in texts.labels or [] for name in names)
    return replace(texts, label_counts=dict(sorted(counts.items())))


def label_reader(separator: str) -> Callable[[object, int], tuple[str, ...] | None]:
    """What reads the labels of a cell, sorted; None where there is no cell."""

    def read(value: object, row: int) -> tuple[str, ...] | None:
        if isinstance(value, list | tuple):
            return tuple(sorted({name for one in value if (name := as_label(one))}))
        # An empty cell says "none of them"; only a missing value says nothing.
        return None if is_missing(value) else tuple(sorted({name for part in as_label(value).split(separator) if (name := part.strip())}))

    return read


def _one_by_one(texts: Labelled) -> Labelled:
    """The rows' labels one after the other, each with its row's number."""
    told = [(name, row) for names, row in zip(texts.labels or [], texts.row_numbers, strict=True) for name in names]
    return replace(texts, labels=[name for name, _ in told], row_numbers=[row for _, row in told])


def _split(
    texts: Labelled,
    task: MultiLabelClassification,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    max_length: int,
    cache_dir: str,
) -> Split:
    told = texts.labels or []
    labels = np.asarray([[name in names for name in label_names] for names in told], dtype=np.float32).reshape(len(told), len(label_names))
    examples = text_examples(texts)
    encoded = encode_examples(examples, tokenizer, task, max_length=max_length, cache_dir=cache_dir)
    order = {name: i for i, name in enumerate(label_names)}
    return Split(encoded, labels, texts, examples, [(", ".join(sorted(names, key=order.__getitem__)),) for names in told])


# model


def build_model(
    folder: str | Path, label_names: Sequence[str], *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder with a new head for these labels, in float32; `quantization` holds its linear layers in fewer bits."""
    head = {**head_of(label_names), "problem_type": "multi_label_classification"}
    return build_encoder(AutoModelForSequenceClassification, folder, head, dropout=dropout, quantization=quantization)


def wrap(model: PreTrainedModel, task: MultiLabelClassification, *, packed: bool | None = None) -> PackedClassifier:
    """The model as the loop calls it; `packed` as PackedEncoder has it."""
    return PackedClassifier(model, packed=packed)


# loss


def loss(model: nn.Module, batch: Packed, task: MultiLabelClassification) -> torch.Tensor:
    """Sum over rows and labels of the binary cross-entropies."""
    assert batch.labels is not None
    return nn.functional.binary_cross_entropy_with_logits(row_outputs(model, batch).float(), batch.labels, reduction="sum")


def num_targets(batch: Packed) -> int:
    """Every label of every row is one."""
    assert batch.labels is not None
    return batch.labels.numel()


# metrics


@dataclass(frozen=True)
class LabelSetScores:
    """Scores of one split. `subset_accuracy`: the share of rows all of whose labels are right; `loss`: of a label."""

    micro_f1: float
    macro_f1: float
    subset_accuracy: float
    loss: float
    num_rows: int
    per_class: Mapping[str, Mapping[str, float]]

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {name: getattr(self, name) for name in ("micro_f1", "macro_f1", "subset_accuracy", "loss")}

    def text(self) -> str:
        """For the terminal, with the labels."""
        return "\n".join([metrics_line(self), "", *per_class_table(self.per_class)])


def scores(logits: np.ndarray, split: Split, label_names: Sequence[str], task: MultiLabelClassification) -> LabelSetScores:
    """Score logits (float [rows, labels]) against a split's labels with scikit-learn."""
    assert split.labels is not None
    truth, given = split.labels.astype(bool), probabilities(logits) >= task.threshold
    precision, recall, f1, support = precision_recall_fscore_support(truth, given, average=None, zero_division=0)
    micro = precision_recall_fscore_support(truth, given, average="micro", zero_division=0)[2]
    present = support > 0  # a label that is not in this split has no recall to average
    losses = nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(logits).double(), torch.from_numpy(split.labels).double())
    return LabelSetScores(
        micro_f1=float(micro),
        macro_f1=float(f1[present].mean()) if present.any() else 0.0,
        subset_accuracy=float((truth == given).all(axis=1).mean()),
        loss=float(losses),
        num_rows=len(truth),
        per_class={
            name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]), "support": int(support[i])}
            for i, name in enumerate(label_names)
        },
    )


# prediction


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Each label's own."""
    found: np.ndarray = torch.from_numpy(logits).double().sigmoid().numpy()
    return found


def predictions(
    logits: np.ndarray, encoded: Encoded, examples: Sequence[Text], label_names: Sequence[str], task: MultiLabelClassification
) -> list[LabelSet]:
    """The labels whose probability reaches the threshold."""
    found = []
    for row in probabilities(logits):
        names = tuple(name for name, probability in zip(label_names, row, strict=True) if probability >= task.threshold)
        found.append(LabelSet(", ".join(names), [float(p) for p in row], names, task.threshold))
    return found


__all__ = [
    "PER_TOKEN", "LabelSetScores", "build_model", "encode_examples", "given_split", "head_parameters", "loss", "num_targets",
    "predictions", "row_outputs", "scores", "skeleton", "splits", "wrap",
]  # fmt: skip
