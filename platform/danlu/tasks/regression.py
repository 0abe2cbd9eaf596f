"""Regression: a number for a text or a pair of texts. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import USUAL, Labelled, is_missing, labelled
from danlu.data.encode import Encoded
from danlu.data.formats import Rows
from danlu.data.pack import Packed
from danlu.data.report import data_report
from danlu.data.split import random_split
from danlu.errors import DataError
from danlu.spec.data import Data
from danlu.spec.task import Regression
from danlu.tasks.classification import encode_examples, row_outputs
from danlu.tasks.encoder import build_encoder, encoder_skeleton, head_parameters, text_examples
from danlu.tasks.exchange import Text, Value
from danlu.tasks.packed import PackedClassifier
from danlu.tasks.rows import Split, Splits, hold_out, metrics_line, read_given, read_splits

PER_TOKEN = False
NAMES = {**USUAL, "label": ("score", "similarity", "rating", "value", *USUAL["label"])}
HEAD = {"num_labels": 1, "problem_type": "regression"}
LARGEST = float(np.finfo(np.float32).max)

# rows


def splits(data: Data, task: Regression, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split and tokenise; raises DataError for anything that could not be learned from."""
    rows = read_splits(data)
    texts = {name: _texts(table, data, f"data.{name}") for name, table in rows.items()}
    if len(set(texts["train"].labels or [])) < 2:
        raise DataError("every row has the same number: there is nothing to learn", where="data.train", fix="check data.columns.label")
    made = {name: _split(split, task, tokenizer, max_length, data.cache_dir) for name, split in texts.items()}
    report = data_report({name: (texts[name], split.encoded) for name, split in made.items()}, rows, max_length=max_length)
    if "dev" not in made:
        made = hold_out(made, *random_split(len(made["train"]), data.dev_size, seed))
    return Splits(made["train"], made["dev"], made.get("test"), [], report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: Regression,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Rows of other files than the job's."""
    return _split(_texts(read_given(source, data), data, "--data"), task, tokenizer, max_length, data.cache_dir)


def _texts(rows: Rows, data: Data, where: str) -> Labelled:
    texts = labelled(rows, data.columns, where=where, read_label=_reader(where), usual=NAMES)
    numbers = texts.labels or []
    lowest, highest = (f"{value:g}" for value in (min(numbers), max(numbers)))
    return replace(texts, label_counts={f"{lowest} to {highest}": len(numbers)})


def _reader(where: str) -> Callable[[object, int], float | None]:
    def read(value: object, row: int) -> float | None:
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            return None
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and abs(number) > LARGEST:
            raise DataError(
                f"row {row}: {number:g} is too large for 32 bits", where=where, fix=f"numbers up to {LARGEST:.3g}, best near 1: scale them"
            )
        if not math.isfinite(number):
            raise DataError(
                f"row {row}: {str(value)[:60]!r} is no number", where=where, fix="a number a row; data.columns.label names its column"
            )
        return number

    return read


def _split(texts: Labelled, task: Regression, tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: str) -> Split:
    examples = text_examples(texts)
    encoded = encode_examples(examples, tokenizer, task, max_length=max_length, cache_dir=cache_dir)
    return Split(encoded, np.asarray(texts.labels or [], dtype=np.float32), texts, examples)


# model


def build_model(
    folder: str | Path, label_names: Sequence[str], *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder with a new head of one output, in float32; `quantization` holds its linear layers in fewer bits."""
    return build_encoder(AutoModelForSequenceClassification, folder, HEAD, dropout=dropout, quantization=quantization)


def skeleton(folder: str | Path, num_labels: int) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    return encoder_skeleton(AutoModelForSequenceClassification, folder, HEAD)


def wrap(model: PreTrainedModel, task: Regression, *, packed: bool | None = None) -> PackedClassifier:
    """The model as the loop calls it; `packed` as PackedEncoder has it."""
    return PackedClassifier(model, packed=packed)


# loss


def loss(model: nn.Module, batch: Packed, task: Regression) -> torch.Tensor:
    """Sum of the squared errors of a batch's rows."""
    assert batch.labels is not None
    return nn.functional.mse_loss(row_outputs(model, batch)[:, 0].float(), batch.labels, reduction="sum")


def num_targets(batch: Packed) -> int:
    """One a row."""
    return batch.num_rows


# metrics


@dataclass(frozen=True)
class RegressionScores:
    """Scores of one split. A correlation with answers that are all the same is 0."""

    pearson: float
    spearman: float
    mae: float
    mse: float
    num_rows: int

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {name: getattr(self, name) for name in ("pearson", "spearman", "mae", "mse")}

    def text(self) -> str:
        """For the terminal."""
        return metrics_line(self)


def scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: Regression) -> RegressionScores:
    """Score numbers (float [rows, 1]) against a split's."""
    assert split.labels is not None
    truth, given = split.labels.astype(np.float64), outputs[:, 0].astype(np.float64)
    varied = len(truth) > 1 and np.ptp(truth) > 0 and np.ptp(given) > 0
    return RegressionScores(
        pearson=float(pearsonr(truth, given).statistic) if varied else 0.0,
        spearman=float(spearmanr(truth, given).statistic) if varied else 0.0,
        mae=float(np.abs(truth - given).mean()),
        mse=float(((truth - given) ** 2).mean()),
        num_rows=len(truth),
    )


# prediction


def predictions(
    outputs: np.ndarray, encoded: Encoded, examples: Sequence[Text], label_names: Sequence[str], task: Regression
) -> list[Value]:
    """The numbers."""
    return [Value(f"{value:.4g}", [float(value)]) for value in outputs[:, 0]]


__all__ = [
    "PER_TOKEN", "RegressionScores", "build_model", "encode_examples", "given_split", "head_parameters", "loss", "num_targets",
    "predictions", "row_outputs", "scores", "skeleton", "splits", "wrap",
]  # fmt: skip
