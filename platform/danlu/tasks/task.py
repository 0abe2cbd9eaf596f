"""Task: what the training loop asks of a task's file; and the one place where it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.pack import Packed
from danlu.spec import task as spec
from danlu.spec.data import Data
from danlu.tasks.packed import PackedModel
from danlu.tasks.rows import Scored, Split, Splits


class TaskFile(Protocol):
    """A module of this package: the same functions in each. How they are used: splits, build_model, wrap; then loss; then scores."""

    def splits(self, data: Data, task: Any, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
        """Read, check, split and tokenise; raises DataError for anything that could not be learned from."""
        ...

    def given_split(
        self, source: str | Sequence[str], data: Data, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str], *, max_length: int
    ) -> Split:
        """Rows of other files than the job's, for scoring a model that knows `label_names`."""
        ...

    def build_model(
        self,
        folder: str | Path,
        label_names: Sequence[str],
        *,
        dropout: float | None = None,
        quantization: BitsAndBytesConfig | None = None,
    ) -> PreTrainedModel:
        """The pretrained model with what the task puts on top, in float32; `quantization` holds its linear layers in fewer bits."""
        ...

    def skeleton(self, folder: str | Path, num_labels: int) -> PreTrainedModel:
        """The model `build_model` builds, with shapes and no weights."""
        ...

    def head_parameters(self, model: PreTrainedModel) -> set[str]:
        """Names of the parameters that start from nothing."""
        ...

    def wrap(self, model: PreTrainedModel) -> PackedModel:
        """The model as the loop calls it."""
        ...

    def loss(self, model: nn.Module, batch: Packed, task: Any) -> torch.Tensor:
        """Sum of the losses of a batch's targets."""
        ...

    def num_targets(self, batch: Packed) -> int:
        """How many targets that sum has."""
        ...

    def row_outputs(self, model: nn.Module, batch: Packed) -> torch.Tensor:
        """What scores are made of: float [rows, width]."""
        ...

    def scores(self, outputs: np.ndarray, labels: np.ndarray | None, label_names: Sequence[str]) -> Scored:
        """Scores of a split's outputs (float [rows, width]) against its labels."""
        ...


def task_file(task: spec.Task) -> TaskFile:
    """The file of a spec's `task:`."""
    match task:
        case spec.Classification():
            from danlu.tasks import classification

            return cast(TaskFile, classification)
        case spec.Pretrain(objective=spec.MaskedLm()):
            from danlu.tasks import masked

            return _with_task(masked, task, "given_split")
        case spec.Pretrain():
            from danlu.tasks import pretrain

            return cast(TaskFile, pretrain)
        case spec.Chat():
            from danlu.tasks import chat

            return _with_task(chat, task, "given_split")
        case spec.Preference():
            from danlu.tasks import preference

            return _with_task(preference, task, "scores")
        case spec.Seq2Seq():
            from danlu.tasks import seq2seq

            return _with_task(seq2seq, task, "given_split")


def relative_to_start(task: spec.Task, data: Splits, outputs: Callable[[Split], np.ndarray]) -> Splits:
    """The rows with what the start model gives on them, where the loss is relative to that. `outputs`: its `row_outputs` of a split."""
    if isinstance(task, spec.Preference) and task.has_reference:
        from danlu.tasks import preference

        return preference.relative_to_start(data, outputs)
    return data


FUNCTIONS = (
    "splits", "given_split", "build_model", "skeleton", "head_parameters", "wrap", "loss", "num_targets", "row_outputs", "scores",
)  # fmt: skip


def _with_task(module: ModuleType, task: spec.Task, *names: str) -> TaskFile:
    """A task's file whose functions of these names depend on how the task is set: they are given it as `task`."""
    functions = {name: getattr(module, name) for name in FUNCTIONS}
    return cast(TaskFile, SimpleNamespace(**functions | {name: partial(functions[name], task=task) for name in names}))
