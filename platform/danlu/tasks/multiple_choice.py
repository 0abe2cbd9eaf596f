"""Multiple choice: one of a question's options. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForMultipleChoice, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import Labelled, as_label, as_text, choose, enough
from danlu.data.encode import Encoded, encode, ends
from danlu.data.formats import Rows
from danlu.data.pack import Packed
from danlu.data.report import data_report
from danlu.data.split import random_split
from danlu.errors import DataError
from danlu.spec.data import Columns, Data
from danlu.spec.task import MultipleChoice
from danlu.tasks.encoder import build_encoder, encoder_skeleton, head_parameters
from danlu.tasks.exchange import Choice, Choices
from danlu.tasks.packed import PackedChooser, inputs, padded_rows
from danlu.tasks.rows import Split, Splits, hold_out, metrics_line, read_given, read_splits

PER_TOKEN = False
USUAL = {
    "question": ("question", "query", "stem", "prompt", "sent2"),
    "context": ("context", "passage", "article", "content", "document", "ctx", "sent1"),
    "options": ("options", "choices", "choice", "candidates", "endings"),
    "label": ("answer", "label", "answerkey", "gold", "target", "correct"),
}
FAMILIES = ([chr(ord("A") + i) for i in range(26)], *([f"{name}{i}" for i in range(10)] for name in ("ending", "option", "choice")))
"""Columns that hold an option each, as C-Eval, MMLU and SWAG name them."""

# rows


def splits(data: Data, task: MultipleChoice, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split and tokenise; raises DataError for anything that could not be learned from."""
    rows = read_splits(data)
    made = {name: _split(table, data, task, tokenizer, max_length, f"data.{name}") for name, table in rows.items()}
    report = data_report({name: (split.texts, split.encoded) for name, split in made.items()}, rows, max_length=max_length)
    if "dev" not in made:
        made = hold_out(made, *random_split(len(made["train"]), data.dev_size, seed))
    return Splits(made["train"], made["dev"], made.get("test"), [], report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: MultipleChoice,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Rows of other files than the job's."""
    return _split(read_given(source, data), data, task, tokenizer, max_length, "--data")


def encode_examples(
    examples: Sequence[Choices],
    tokenizer: PreTrainedTokenizerBase,
    task: MultipleChoice,
    *,
    max_length: int,
    cache_dir: str | Path | None = None,
) -> Encoded:
    """A sequence for each option: the context with the question and the option; without a context the question with the option."""
    texts = [one.context or one.question for one in examples for _ in one.options]
    pairs = [f"{one.question} {option}" if one.context else option for one in examples for option in one.options]
    encoded = encode(texts, pairs, tokenizer, max_length=max_length, cache_dir=cache_dir)
    groups = ends([len(one.options) for one in examples])
    return replace(encoded, groups=groups, truncated=np.asarray([encoded.truncated[a:b].any() for a, b in pairwise(groups)], dtype=bool))


def _split(rows: Rows, data: Data, task: MultipleChoice, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str) -> Split:
    examples, answers, texts = _read(rows, data.columns, where)
    encoded = encode_examples(examples, tokenizer, task, max_length=max_length, cache_dir=data.cache_dir)
    references = [(one.options[answer],) for one, answer in zip(examples, answers, strict=True)]
    return Split(encoded, np.asarray(answers, dtype=np.int64), texts, examples, references)


def _read(rows: Rows, columns: Columns, where: str) -> tuple[list[Choices], list[int], Labelled]:
    chosen = choose(rows, columns, USUAL, ("question", "label"), where)
    options, told = _options(rows, columns, chosen, where)
    contexts = rows.columns[chosen["context"]] if "context" in chosen else [""] * len(rows)
    examples: list[Choices] = []
    answers: list[Any] = []
    numbers: list[int] = []
    dropped: Counter[str] = Counter()
    table = zip(rows.columns[chosen["question"]], contexts, rows.columns[chosen["label"]], strict=True)
    for i, (question, context, answer) in enumerate(table):
        example = Choices(as_text(question), options[i], as_text(context))
        if not example.question.strip():
            dropped["rows without a question"] += 1
        elif len(example.options) < 2:
            dropped["rows with fewer than two options"] += 1
        elif not as_label(answer):
            dropped["rows without an answer"] += 1
        else:
            examples.append(example)
            answers.append(answer)
            numbers.append(i + 1)
    enough(examples, dropped, chosen, where)
    index = _index_of(examples, answers)
    found: list[int] = []
    for example, answer, number in zip(examples, answers, numbers, strict=True):
        at = index(example, answer)
        if at is None or not 0 <= at < len(example.options):
            raise DataError(
                f"row {number}: the answer {answer!r} is none of its {len(example.options)} options",
                where=where,
                fix="a letter (A is the first option), a number (0 is the first) or an option's text, the same in all rows",
            )
        found.append(at)
    letters = [chr(ord("A") + at) if at < 26 else str(at) for at in found]
    pairs = ["\n".join([one.context, *one.options]) for one in examples]
    kept = {role: chosen[role] for role in chosen if role != "options"} | {"options": told}
    texts = Labelled([one.question for one in examples], pairs, letters, numbers, kept, dropped=dict(dropped))
    return examples, found, texts


def _options(rows: Rows, columns: Columns, chosen: dict[str, str], where: str) -> tuple[list[tuple[str, ...]], str]:
    """Each row's options, and the columns they came from."""
    if "options" in chosen:
        return [_listed(value) for value in rows.columns[chosen["options"]]], chosen["options"]
    names = list(columns.options) if isinstance(columns.options, list) else _family(rows)
    if missing := [name for name in names if name not in rows.columns]:
        raise DataError(f"{where} has no column {missing[0]!r}; it has {', '.join(rows.columns)}", where="data.columns.options")
    if not names:
        raise DataError(
            f"{where}: which of the columns {', '.join(map(repr, rows.columns))} are the options?",
            where="data.columns.options",
            fix="data.columns: {options: NAME} for lists, or {options: [A, B, C, D]} for a column each",
        )
    table = zip(*(rows.columns[name] for name in names), strict=True)
    # A question may have fewer options than the table has columns.
    return [tuple(text for value in row if (text := as_text(value)).strip()) for row in table], ", ".join(names)


def _family(rows: Rows) -> list[str]:
    for family in FAMILIES:
        there = [name for name in family if name in rows.columns]
        if len(there) > 1:
            return there
    return []


def _listed(value: object) -> tuple[str, ...]:
    if isinstance(value, dict):  # ARC: {"text": [...], "label": [...]}
        value = value.get("text")
    return tuple(as_text(one) for one in value) if isinstance(value, list | tuple) else ()


def _index_of(examples: Sequence[Choices], answers: Sequence[object]) -> Callable[[Choices, Any], int | None]:
    """How this table says which option is right: what fits all rows, since `1` could be a number and an option."""
    texts = [as_label(answer) for answer in answers]
    if all(re.fullmatch("[A-Za-z]", text) for text in texts):
        return lambda example, answer: ord(as_label(answer).upper()) - ord("A")
    as_numbers = all(re.fullmatch(r"\d+", text) for text in texts)
    as_options = all(text in map(str.strip, example.options) for example, text in zip(examples, texts, strict=True))
    if as_numbers and (not as_options or isinstance(answers[0], int | float)):
        return lambda example, answer: int(as_label(answer))
    return lambda example, answer: next((i for i, option in enumerate(example.options) if option.strip() == as_label(answer)), None)


# model


def build_model(
    folder: str | Path, label_names: Sequence[str], *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder with a new head of one score, in float32; `quantization` holds its linear layers in fewer bits."""
    return build_encoder(AutoModelForMultipleChoice, folder, {}, dropout=dropout, quantization=quantization)


def skeleton(folder: str | Path, num_labels: int) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    return encoder_skeleton(AutoModelForMultipleChoice, folder, {})


def wrap(model: PreTrainedModel, task: MultipleChoice, *, packed: bool | None = None) -> PackedChooser:
    """The model as the loop calls it; `packed` as PackedEncoder has it."""
    return PackedChooser(model, packed=packed)


# loss


def loss(model: nn.Module, batch: Packed, task: MultipleChoice) -> torch.Tensor:
    """Sum over rows of the cross-entropy of the softmax over their options."""
    assert batch.labels is not None
    assert batch.groups is not None
    options = padded_rows(row_outputs(model, batch)[:, 0].float(), batch.groups.diff().tolist(), -torch.inf)
    return nn.functional.cross_entropy(options, batch.labels, reduction="sum")


def num_targets(batch: Packed) -> int:
    """One a row."""
    return batch.num_rows


# metrics


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of one split."""

    accuracy: float
    loss: float
    num_rows: int

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {"accuracy": self.accuracy, "loss": self.loss}

    def text(self) -> str:
        """For the terminal."""
        return metrics_line(self)


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """A score for each option, [options of all rows, 1]."""
    found: torch.Tensor = model(*inputs(batch))
    return found


def scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: MultipleChoice) -> ChoiceScores:
    """Score options' scores (float [options of all rows, 1]) against a split's labels."""
    assert split.labels is not None
    found = _log_probabilities(outputs, split.encoded)
    right = [int(row.argmax() == label) for row, label in zip(found, split.labels, strict=True)]
    losses = [-float(row[label]) for row, label in zip(found, split.labels, strict=True)]
    return ChoiceScores(float(np.mean(right)), float(np.mean(losses)), len(right))


def _log_probabilities(outputs: np.ndarray, encoded: Encoded) -> list[np.ndarray]:
    assert encoded.groups is not None
    told = torch.from_numpy(outputs[:, 0]).double()
    return [row.log_softmax(0).numpy() for row in torch.split(told, np.diff(encoded.groups).tolist())]


# prediction


def predictions(
    outputs: np.ndarray, encoded: Encoded, examples: Sequence[Choices], label_names: Sequence[str], task: MultipleChoice
) -> list[Choice]:
    """The most probable option of each question."""
    found = [np.exp(row) for row in _log_probabilities(outputs, encoded)]
    return [
        Choice(one.options[int(row.argmax())], [float(p) for p in row], int(row.argmax())) for one, row in zip(examples, found, strict=True)
    ]


__all__ = [
    "PER_TOKEN", "ChoiceScores", "build_model", "encode_examples", "given_split", "head_parameters", "loss", "num_targets", "predictions",
    "row_outputs", "scores", "skeleton", "splits", "wrap",
]  # fmt: skip
