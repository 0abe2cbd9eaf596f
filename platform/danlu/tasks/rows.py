"""Rows of a job: how they are read, and how a task hands them on: one split, all splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from danlu.data.cells import left, widest
from danlu.data.columns import Labelled
from danlu.data.conversations import Conversation
from danlu.data.encode import Encoded
from danlu.data.formats import Rows, read_rows
from danlu.data.pack import Corrupt
from danlu.data.report import DataReport
from danlu.spec.data import Data
from danlu.tasks.exchange import Example


@dataclass(frozen=True)
class Split:
    """The rows of one split: token ids, labels ([rows, ...], or None where the tokens themselves carry the targets) and their texts.

    Of an encoder's task also what it is asked in each row, and each row's right answers as a prediction's `label` says them; of
    conversations what the rows were rendered from.

    `reference`, float32 [rows, width]: what the start model gave on each row, where the loss is relative to it. `corrupt`: what is drawn
    anew for a row each time it is trained on. `digest`: what the rows are, where their texts are not held (`danlu.tasks.streamed`).
    """

    encoded: Encoded
    labels: np.ndarray | None
    texts: Labelled
    examples: Sequence[Example] = ()
    references: Sequence[Sequence[str]] = ()
    conversations: Sequence[Conversation] = ()
    reference: np.ndarray | None = None
    corrupt: Corrupt | None = None
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.encoded)

    def take(self, rows: np.ndarray) -> Split:
        """The named rows, in that order."""
        some = [int(row) for row in rows]
        return Split(
            self.encoded.take(rows),
            None if self.labels is None else self.labels[rows],
            # A corpus cut into blocks has no text for each row.
            self.texts.take(rows) if len(self.texts.texts) == len(self) else self.texts,
            [self.examples[i] for i in some] if self.examples else (),
            [self.references[i] for i in some] if self.references else (),
            [self.conversations[i] for i in some] if self.conversations else (),
            None if self.reference is None else self.reference[rows],
            self.corrupt,
        )


@dataclass(frozen=True)
class Splits:
    """Everything a job learns from and is scored on; `label_names` in the order of the model's outputs, empty without labels."""

    train: Split
    dev: Split
    test: Split | None
    label_names: list[str]
    report: DataReport


def read_splits(data: Data) -> dict[str, Rows]:
    """The rows of `train`, and of `dev` and `test` where there are such."""
    sources = {name: source for name in ("train", "dev", "test") if (source := getattr(data, name)) is not None}
    return {name: read_rows(source, format=data.format, max_rows=data.max_rows, where=f"data.{name}") for name, source in sources.items()}


def read_given(source: str | Sequence[str], data: Data) -> Rows:
    """Rows of other files than the job's, read as its own are."""
    return read_rows(source, format=data.format, max_rows=data.max_rows, where="--data")


def hold_out(made: Mapping[str, Split], train_rows: np.ndarray, dev_rows: np.ndarray) -> dict[str, Split]:
    """The splits with a dev split taken out of `train`."""
    return {**made, "train": made["train"].take(train_rows), "dev": made["train"].take(dev_rows)}


class Scored(Protocol):
    """Scores of one split, whatever the task."""

    @property
    def num_rows(self) -> int: ...

    def metrics(self) -> Mapping[str, float]:
        """The single numbers, by name."""
        ...

    def text(self) -> str:
        """All of it, for the terminal."""
        ...


def metrics_line(scores: Scored) -> str:
    """`  accuracy 0.9000   macro F1 0.8912   rows 100`."""
    told = "   ".join(f"{name.replace('_', ' ').replace('f1', 'F1')} {value:.4f}" for name, value in scores.metrics().items())
    return f"  {told}   rows {scores.num_rows}"


def per_class_table(per_class: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Precision, recall, F1 and support of each class, as lines."""
    width = widest(per_class)
    lines = [f"  {'':<{width}} precision    recall        f1   rows"]
    for name, row in per_class.items():
        lines.append(f"  {left(name, width)} {row['precision']:>9.4f} {row['recall']:>9.4f} {row['f1']:>9.4f} {int(row['support']):>6}")
    return lines
