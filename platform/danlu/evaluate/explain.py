"""Why a classifier answered what it did: what each word adds, found by leaving it out (Li et al. 2016, https://arxiv.org/abs/1612.08220).

That asks nothing of the model but answers, so it holds for int8 and for every architecture, and it is what it says: a text without the
word was read. Of a linear model of word counts the effects are the words' weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from danlu.errors import ModelError
from danlu.spec.task import Classification
from danlu.tasks.exchange import Prediction, Text, split_words
from danlu.tasks.predictor import Predictor


@dataclass(frozen=True)
class Word:
    """`text[start:end]` of the text, or of its pair; `effect` is how much higher the log odds of the answer are with it than without."""

    word: str
    start: int
    end: int
    effect: float
    in_pair: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {name: value for name, value in asdict(self).items() if name != "in_pair" or value}


@dataclass(frozen=True)
class Explained:
    """An answer with the words of its text, in their order."""

    prediction: Prediction
    words: Sequence[Word]

    def strongest(self, number: int = 10) -> list[Word]:
        """The words that matter most, for or against."""
        return sorted(self.words, key=lambda word: -abs(word.effect))[:number]


def explain(predictor: Predictor, examples: Sequence[Text], *, batch_tokens: int = 1024) -> list[Explained]:
    """Answers with what each word did to them; a forward over the text without it for every word that the model reads."""
    if not isinstance(predictor.task, Classification):
        raise ModelError(
            f"a model for task.kind={predictor.task.kind} is not explained", where="--explain", fix="a classification model's bundle"
        )
    encoded = predictor.encode(examples)
    outputs = predictor.outputs(encoded, batch_tokens=batch_tokens)
    answers = predictor.predictions(outputs, encoded, examples)
    words = [_words(example, predictor.max_length) for example in examples]
    without = [_without(example, word) for example, some in zip(examples, words, strict=True) for word in some]
    changed = iter(predictor.outputs(predictor.encode(without), batch_tokens=batch_tokens) if without else [])
    found = []
    for answer, before, some in zip(answers, outputs, words, strict=True):
        label = predictor.label_names.index(answer.label)
        odds = log_odds(before, label)
        found.append(Explained(answer, [replace(word, effect=odds - log_odds(next(changed), label)) for word in some]))
    return found


def log_odds(logits: np.ndarray, label: int) -> float:
    """ln(p / (1 - p)) of a label's probability, from a row of logits."""
    others = np.delete(logits.astype(np.float64), label)
    return float(logits[label] - others.max() - np.log(np.exp(others - others.max()).sum()))


def _words(example: Text, max_length: int) -> list[Word]:
    """The words that can be among max_length tokens: a word is one or more."""
    found = []
    for in_pair, text in ((False, example.text), (True, example.text_pair)):
        spans = split_words(text).spans if text else ()
        found += [Word(text[start:end], start, end, 0.0, in_pair) for start, end in spans[:max_length] if text]
    return found


def _without(example: Text, word: Word) -> Text:
    whole = (example.text_pair or "") if word.in_pair else example.text
    rest = whole[: word.start] + whole[word.end :]
    return replace(example, text_pair=rest) if word.in_pair else replace(example, text=rest)
