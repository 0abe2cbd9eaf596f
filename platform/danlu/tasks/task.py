"""Task: what the training loop asks of a task's file; and the one place where it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.encode import Encoded
from danlu.data.pack import Packed
from danlu.data.prepare import needs_preparing, prepare, prepare_given
from danlu.spec import task as spec
from danlu.spec.data import Data
from danlu.spec.train import TrainJob
from danlu.tasks.exchange import Prediction
from danlu.tasks.packed import PackedEncoder, PackedModel
from danlu.tasks.rows import Scored, Split, Splits
from danlu.tasks.streamed import Spread, read_streamed


class TaskFile(Protocol):
    """A module of this package: the same functions in each. How they are used: splits, build_model, wrap; then loss; then scores."""

    PER_TOKEN: bool
    """Whether the model's outputs are one a token, or one a sequence."""

    def splits(self, data: Data, task: Any, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
        """Read, check, split and tokenise; raises DataError for anything that could not be learned from."""
        ...

    def given_split(
        self,
        source: str | Sequence[str],
        data: Data,
        task: Any,
        tokenizer: PreTrainedTokenizerBase,
        label_names: Sequence[str],
        *,
        max_length: int,
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

    def wrap(self, model: PreTrainedModel, task: Any) -> PackedModel:
        """The model as the loop calls it."""
        ...

    def loss(self, model: nn.Module, batch: Packed, task: Any) -> torch.Tensor:
        """Sum of the losses of a batch's targets."""
        ...

    def num_targets(self, batch: Packed) -> int:
        """How many targets that sum has."""
        ...

    def row_outputs(self, model: nn.Module, batch: Packed) -> torch.Tensor:
        """What scores are made of: float [sequences, width], or [tokens, width] with PER_TOKEN."""
        ...

    def scores(self, outputs: np.ndarray, split: Split, label_names: Sequence[str], task: Any) -> Scored:
        """Scores of the outputs of a split's sequences, laid end to end in the order of its rows."""
        ...


class EncoderTaskFile(TaskFile, Protocol):
    """An encoder's task is also asked for answers (a language model's answers come from `danlu.tasks.judge`)."""

    def wrap(self, model: PreTrainedModel, task: Any, *, packed: bool | None = None) -> PackedEncoder:
        """The model as the loop calls it; `packed` as PackedEncoder has it."""
        ...

    def encode_examples(
        self,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        task: Any,
        *,
        max_length: int,
        cache_dir: str | Path | None = None,
    ) -> Encoded:
        """Token ids of what is asked, a row each."""
        ...

    def predictions(
        self, outputs: np.ndarray, encoded: Encoded, examples: Sequence[Any], label_names: Sequence[str], task: Any
    ) -> Sequence[Prediction]:
        """An answer for each row of `encoded`, from the outputs of its sequences."""
        ...


def encoder_file(task: spec.EncoderTask) -> EncoderTaskFile:
    """The file of an encoder's `task:`."""
    return cast(EncoderTaskFile, task_file(task))


def task_file(task: spec.Task) -> TaskFile:
    """The file of a spec's `task:`."""
    match task:
        case spec.Classification():
            from danlu.tasks import classification

            return cast(TaskFile, classification)
        case spec.MultiLabelClassification():
            from danlu.tasks import multi_label

            return cast(TaskFile, multi_label)
        case spec.Regression():
            from danlu.tasks import regression

            return cast(TaskFile, regression)
        case spec.ExtractiveQA():
            from danlu.tasks import extractive_qa

            return cast(TaskFile, extractive_qa)
        case spec.MultipleChoice():
            from danlu.tasks import multiple_choice

            return cast(TaskFile, multiple_choice)
        case spec.TokenClassification():
            from danlu.tasks import token_classification

            return cast(TaskFile, token_classification)
        case spec.Embed():
            from danlu.tasks import embedding

            return cast(TaskFile, embedding)
        case spec.Pretrain(objective=spec.MaskedLm()):
            from danlu.tasks import masked

            return cast(TaskFile, masked)
        case spec.Pretrain():
            from danlu.tasks import pretrain

            return cast(TaskFile, pretrain)
        case spec.Chat():
            from danlu.tasks import chat

            return cast(TaskFile, chat)
        case spec.Preference():
            from danlu.tasks import preference

            return cast(TaskFile, preference)
        case spec.Seq2Seq():
            from danlu.tasks import seq2seq

            return cast(TaskFile, seq2seq)


def read_splits(job: TrainJob, tokenizer: PreTrainedTokenizerBase, *, max_length: int, spread: Spread | None = None) -> Splits:
    """A job's rows: cleaned and held out as `data.clean` and `data.split` say, then read by its task. `spread` shares out the work on rows
    that are streamed."""
    if job.data.streaming:
        return read_streamed(job, tokenizer, max_length=max_length, spread=spread)
    task = task_file(job.task)
    if not needs_preparing(job.data):
        return task.splits(job.data, job.task, tokenizer, max_length=max_length, seed=job.seed)
    data, cleaned = prepare(job.data, job.seed, of_texts=spec.rows_are_texts(job.task))
    splits = task.splits(data, job.task, tokenizer, max_length=max_length, seed=job.seed)
    return replace(splits, report=replace(splits.report, cleaned=cleaned))


def read_given(
    source: str | Sequence[str], job: TrainJob, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str], *, max_length: int
) -> Split:
    """Rows of other files than the job's, through the steps that change texts."""
    source, data = prepare_given(source, job.data, job.seed, of_texts=spec.rows_are_texts(job.task))
    return task_file(job.task).given_split(source, data, job.task, tokenizer, label_names, max_length=max_length)


def relative_to_start(task: spec.Task, data: Splits, outputs: Callable[[Split], np.ndarray]) -> Splits:
    """The rows with what the start model gives on them, where the loss is relative to that. `outputs`: its `row_outputs` of a split."""
    if isinstance(task, spec.Preference) and task.has_reference:
        from danlu.tasks import preference

        return preference.relative_to_start(data, outputs)
    return data
