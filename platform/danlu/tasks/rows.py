"""Rows of a job as a task hands them on: one split, all splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from danlu.data.columns import Labelled
from danlu.data.conversations import Conversation
from danlu.data.encode import Encoded
from danlu.data.pack import Corrupt
from danlu.data.report import DataReport


@dataclass(frozen=True)
class Split:
    """The rows of one split: token ids, labels (int64 [rows], or None where the tokens themselves are the targets) and their texts.

    `reference`, float32 [rows, width]: what the start model gave on each row, where the loss is relative to it. `corrupt`: what is drawn
    anew for a row each time it is trained on. `conversations`: what the rows were rendered from.
    """

    encoded: Encoded
    labels: np.ndarray | None
    texts: Labelled
    reference: np.ndarray | None = None
    corrupt: Corrupt | None = None
    conversations: Sequence[Conversation] | None = None

    def __len__(self) -> int:
        return len(self.encoded)


@dataclass(frozen=True)
class Splits:
    """Everything a job learns from and is scored on; `label_names` in the order of the model's outputs, empty without labels."""

    train: Split
    dev: Split
    test: Split | None
    label_names: list[str]
    report: DataReport


class Scored(Protocol):
    """Scores of one split, whatever the task."""

    @property
    def num_rows(self) -> int: ...

    def metrics(self) -> Mapping[str, float]:
        """The single numbers, by name."""
        ...
