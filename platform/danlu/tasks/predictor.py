"""Predictor: what evaluation and serving share, so that both give the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from danlu.data.encode import Encoded
from danlu.data.pack import Packed, by_length, pack_rows
from danlu.spec.task import Classification, EncoderTask
from danlu.tasks.exchange import Example, Prediction, Text
from danlu.tasks.packed import PackedClassifier, PackedEncoder
from danlu.tasks.rows import Scored, Split
from danlu.tasks.task import encoder_file
from danlu.tasks.tokenizer import load_tokenizer


class Predictor:
    """A model with its task, its tokenizer and its labels."""

    def __init__(
        self,
        model: PackedEncoder,
        tokenizer: PreTrainedTokenizerBase,
        label_names: Sequence[str],
        *,
        max_length: int,
        task: EncoderTask | None = None,
        bf16: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.label_names = model.eval(), tokenizer, list(label_names)
        self.max_length, self.bf16 = max_length, bf16
        self.task = task or Classification()
        self.file = encoder_file(self.task)
        self.device = next(model.parameters()).device
        self.temperature = temperature_of(self.task)

    def set_task(self, task: EncoderTask) -> None:
        """Answer by this task from now on: the same one, with what was fitted on the dev rows."""
        self.task, self.temperature = task, temperature_of(task)

    def encode(self, inputs: Sequence[str | Example], pairs: Sequence[str] | None = None) -> Encoded:
        """Token ids of what is asked, a row each."""
        return self.file.encode_examples(as_examples(inputs, pairs), self.tokenizer, self.task, max_length=self.max_length)

    def forward(self, batch: Packed) -> np.ndarray:
        """Outputs of one batch, float32 [sequences, width] or, where the task's are a token's, [tokens, width]; logits are calibrated here,
        so that scores, probes, int8 and endpoints all see the same."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            found = self.file.row_outputs(self.model, batch.to(self.device)).float().cpu().numpy()
        return found if self.temperature == 1.0 else found / np.float32(self.temperature)

    def outputs(self, encoded: Encoded, *, batch_tokens: int = 1024) -> np.ndarray:
        """Outputs of all sequences in their order; batches are filled by length."""
        sequences = encoded.sequences
        found = np.empty((0, 0), dtype=np.float32)
        for rows in by_length(sequences.lengths, batch_tokens):
            some = self.forward(pack_rows(sequences, rows))
            if not len(found):
                found = np.empty((len(sequences.input_ids if self.file.PER_TOKEN else sequences), some.shape[1]), np.float32)
            found[sequences.tokens_of(rows) if self.file.PER_TOKEN else rows] = some
        return found

    def each(self, sequences: Encoded) -> list[np.ndarray]:
        """What one forward gives for each of some sequences."""
        outputs = self.forward(pack_rows(sequences, range(len(sequences))))
        return np.split(outputs, sequences.offsets[1:-1] if self.file.PER_TOKEN else len(sequences))

    def made_of(self, outputs: Sequence[np.ndarray], encoded: Encoded, examples: Sequence[Example]) -> Sequence[Prediction]:
        """The answers in what `each` gave for the examples' sequences."""
        return self.predictions(np.concatenate(outputs), encoded, examples)

    def examples(self, split: Split, rows: Sequence[int]) -> list[Example]:
        """What some rows ask."""
        return [split.examples[row] for row in rows]

    def scores(self, outputs: np.ndarray, split: Split) -> Scored:
        """Scores of a split's outputs."""
        return self.file.scores(outputs, split, self.label_names, self.task)

    def predictions(self, outputs: np.ndarray, encoded: Encoded, examples: Sequence[Example]) -> Sequence[Prediction]:
        """The answers in rows' outputs."""
        return self.file.predictions(outputs, encoded, examples, self.label_names, self.task)

    def predict(self, inputs: Sequence[str | Example], pairs: Sequence[str] | None = None) -> Sequence[Prediction]:
        """Answers to what is asked: texts (with their pairs), or the task's examples."""
        examples = as_examples(inputs, pairs)
        encoded = self.encode(examples)
        return self.predictions(self.outputs(encoded), encoded, examples)


def temperature_of(task: EncoderTask) -> float:
    """What logits are divided by; 1 before that was fitted."""
    calibration = task.calibration if isinstance(task, Classification) else None
    return 1.0 if calibration is None or calibration.temperature is None else calibration.temperature


def as_examples(inputs: Sequence[str | Example], pairs: Sequence[str] | None = None) -> list[Example]:
    """Plain texts as what a classifier is asked; examples as they are."""
    return [
        Text(one, None if pairs is None else pairs[i]) if isinstance(one, str) else one
        for i, one in enumerate(inputs)
    ]  # fmt: skip


def load_predictor(
    folder: str | Path, label_names: Sequence[str], *, max_length: int, bf16: bool = False, model: PackedClassifier | None = None
) -> Predictor:
    """The predictor of a saved classifier's folder (weights and tokenizer). `model` overrides how the weights are loaded."""
    if model is None:
        model = PackedClassifier(AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32))
    return Predictor(model, load_tokenizer(folder), label_names, max_length=max_length, bf16=bf16)
