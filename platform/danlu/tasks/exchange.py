"""What a task is asked and what it answers, where a request is answered as a whole: pure data, the same for rows, probes and endpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from danlu.spec.task import AnsweredTask, Embed, ExtractiveQA, MultipleChoice, Pretrain, Seq2Seq, TokenClassification


@dataclass(frozen=True)
class Text:
    """A text, or a pair of texts: what is classified or embedded."""

    text: str
    text_pair: str | None = None


@dataclass(frozen=True)
class TokenIds:
    """A text as its sender has tokenised it, with the special tokens that are wanted: none is added."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question whose answer stands in the context, or does not."""

    question: str
    context: str


@dataclass(frozen=True)
class Choices:
    """A question and the options to choose from; the context may be empty."""

    question: str
    options: tuple[str, ...]
    context: str = ""


@dataclass(frozen=True)
class Words:
    """A text and the characters (start, end) of each of its words."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class MaskedText:
    """A text with the model's mask token where words are to be filled in, and how many it may be told for each."""

    text: str
    top_k: int = 5


@dataclass(frozen=True)
class SourceText:
    """A text that another is written for, of at most `max_tokens` tokens; None is as many as the task allows."""

    text: str
    max_tokens: int | None = None


Example = Text | TokenIds | Question | Choices | Words | MaskedText | SourceText

MAX_TOP_K = 20
"""Tokens that are told of one mask at most."""

CJK = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+|[^\w\s]")
SHAPES = {
    "extractive_qa": '{"question": "...", "context": "..."}',
    "multiple_choice": '{"question": "...", "options": ["...", "..."], "context": "..."}',
    "token_classification": '"a text", or {"tokens": ["a", "text"]}',
    "embedding": '"a text"',
    "pretrain": '"a text with [MASK] in it"',
    "seq2seq": '"a text"',
}
"""What a task is asked, where that is not a text or a pair of texts."""


class BadExample(ValueError):
    """What was asked is no example of the task. `field` is where, `problem` what and `fix` what would work."""

    def __init__(self, problem: str, field: str, fix: str) -> None:
        super().__init__(problem, field, fix)
        self.problem, self.field, self.fix = problem, field, fix


def read_example(item: object, task: AnsweredTask, where: str = "input") -> Example:
    """What JSON or a caller asks of a task: a text where that is enough, or the example's fields. BadExample if it is neither."""
    shape = SHAPES.get(task.kind, '{"text": "...", "text_pair": "..."}')
    match task:
        case ExtractiveQA():
            fields = _fields(item, where, ("question", "context"), (), shape)
            return Question(_filled(fields["question"], f"{where}.question", shape), _filled(fields["context"], f"{where}.context", shape))
        case MultipleChoice():
            fields = _fields(item, where, ("question", "options"), ("context",), shape)
            options = fields["options"]
            if not isinstance(options, list | tuple) or len(options) < 2:
                raise BadExample(f"`{where}.options` is not a list of two or more texts", f"{where}.options", shape)
            told = tuple(_filled(option, f"{where}.options[{i}]", shape) for i, option in enumerate(options))
            question, context = _filled(fields["question"], f"{where}.question", shape), fields.get("context")
            return Choices(question, told, _filled(context, f"{where}.context", shape) if context else "")
        case TokenClassification():
            if isinstance(item, str):
                return split_words(_filled(item, where, shape))
            fields = _fields(item, where, ("tokens",), (), shape)
            tokens = fields["tokens"]
            if not isinstance(tokens, list | tuple) or not tokens:
                raise BadExample(f"`{where}.tokens` is not a list of words", f"{where}.tokens", shape)
            return join_words([_filled(token, f"{where}.tokens[{i}]", shape) for i, token in enumerate(tokens)])
        case Embed():
            return Text(_filled(item, where, shape))
        case Pretrain():
            return MaskedText(_filled(item, where, shape))
        case Seq2Seq():
            return SourceText(_filled(item, where, shape))
        case _:
            if isinstance(item, str):
                return Text(_filled(item, where, shape))
            fields = _fields(item, where, ("text",), ("text_pair",), shape)
            pair = fields.get("text_pair")
            return Text(
                _filled(fields["text"], f"{where}.text", shape), None if pair is None else _filled(pair, f"{where}.text_pair", shape)
            )


def read_examples(
    inputs: Sequence[str | Mapping[str, Any] | Example], pairs: Sequence[str] | None, task: AnsweredTask, where: str = "inputs"
) -> list[Example]:
    """Each of several inputs by `read_example`, texts with their `pairs`; the task's examples as they are."""
    asked = inputs if pairs is None else [{"text": one, "text_pair": pair} for one, pair in zip(inputs, pairs, strict=True)]
    return [read_example(one, task, f"{where}[{i}]") if isinstance(one, str | Mapping) else one for i, one in enumerate(asked)]


def read_texts(inputs: Sequence[object], pairs: Sequence[str] | None, where: str = "inputs") -> list[str]:
    """What a language model is asked: texts."""
    if pairs is not None:
        raise BadExample("a language model answers texts, not pairs of them", where, "leave the pairs out")
    return [_filled(one, f"{where}[{i}]", "a text") for i, one in enumerate(inputs)]


def _fields(item: object, where: str, needed: Sequence[str], more: Sequence[str], shape: str) -> Mapping[str, object]:
    if not isinstance(item, Mapping):
        what = "an object" if not isinstance(item, str) and needed != ("text",) else "a text"
        told = f"`{where}` is {type(item).__name__}, not {what}" if not isinstance(item, str) else f"`{where}` is a text alone"
        raise BadExample(told, where, shape)
    if unknown := sorted(set(item) - {*needed, *more}):
        raise BadExample(f"`{where}` has the unknown field {unknown[0]!r}", where, shape)
    if missing := [name for name in needed if name not in item]:
        raise BadExample(f"`{where}` has no `{missing[0]}`", where, shape)
    return item


def _filled(value: object, where: str, shape: str) -> str:
    if not isinstance(value, str):
        raise BadExample(f"`{where}` is {type(value).__name__}, not a text", where, shape)
    if not value.strip():
        raise BadExample(f"`{where}` is empty", where, "a text with at least one word")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadExample(f"`{where}` has half a character at {error.start}: a lone surrogate", where, "text in Unicode") from error
    return value


def split_words(text: str) -> Words:
    """Words as they are tagged: runs of letters and digits, single Chinese characters, single marks."""
    return Words(text, tuple(found.span() for found in WORD.finditer(text)))


def join_words(words: Sequence[str]) -> Words:
    """The text of words: a space between two, but none between Chinese characters."""
    text, spans = "", []
    for word in words:
        if text and not (re.match(f"[{CJK}]", word) and re.search(f"[{CJK}]$", text)):
            text += " "
        spans.append((len(text), len(text) + len(word)))
        text += word
    return Words(text, tuple(spans))


def to_fields(example: Example) -> dict[str, Any]:
    """As JSON holds it."""
    fields = {name: value for name, value in asdict(example).items() if value is not None}
    return {name: [*map(_listed, value)] if isinstance(value, tuple) else value for name, value in fields.items()}


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def from_fields(fields: Mapping[str, Any], task: AnsweredTask) -> Example:
    """What `to_fields` was made of."""
    match task:
        case ExtractiveQA():
            return Question(fields["question"], fields["context"])
        case MultipleChoice():
            return Choices(fields["question"], tuple(fields["options"]), fields["context"])
        case TokenClassification():
            return Words(fields["text"], tuple((start, end) for start, end in fields["spans"]))
        case Pretrain():
            return MaskedText(**fields)
        case Seq2Seq():
            return SourceText(**fields)
        case _:
            return Text(fields["text"], fields.get("text_pair"))


def shown(example: Example) -> str:
    """For people: the text, or the question."""
    if isinstance(example, TokenIds):
        return str(list(example.ids))
    return example.question if isinstance(example, Question | Choices) else example.text


@dataclass(frozen=True)
class Prediction:
    """An answer: what it says, and the numbers behind it. For one label: its name, and each label's probability in the order of the
    model's outputs."""

    label: str
    probabilities: list[float]

    @property
    def margin(self) -> float:
        """How far the best answer's probability is from the next one's: where it is small, rounding may swap them."""
        return margin_of(self.probabilities)

    @property
    def probability(self) -> float:
        """Of what it says."""
        return max(self.probabilities, default=1.0)


@dataclass(frozen=True)
class Decided(Prediction):
    """One label that was chosen by what answers cost, and so need not be the likeliest. `index` is its place among the labels."""

    index: int
    least_margin: float

    @property
    def margin(self) -> float:
        return self.least_margin

    @property
    def probability(self) -> float:
        return self.probabilities[self.index]


@dataclass(frozen=True)
class LabelSet(Prediction):
    """Any number of labels. `label` names them, joined; `probabilities` are each label's own."""

    labels: tuple[str, ...]
    threshold: float

    @property
    def margin(self) -> float:
        return min((abs(probability - self.threshold) for probability in self.probabilities), default=1.0)


@dataclass(frozen=True)
class Value(Prediction):
    """A number: the only one in `probabilities`, though it is none."""

    @property
    def value(self) -> float:
        return self.probabilities[0]

    @property
    def margin(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Span:
    """A piece of a text: `text[start:end]`, with a probability."""

    text: str
    start: int
    end: int
    score: float
    label: str = ""


@dataclass(frozen=True)
class Reading(Prediction):
    """A question's answer, `label` (empty if the context has none); `spans` are the best candidates, the first said first; their
    probabilities and that of no answer are `probabilities`, in falling order."""

    spans: tuple[Span, ...]
    no_answer: float | None


@dataclass(frozen=True)
class Choice(Prediction):
    """The chosen option, by text and number; `probabilities` are the options'."""

    index: int


@dataclass(frozen=True)
class Tagging(Prediction):
    """A tag for each word: `label` is all of them, `probabilities` are theirs, `spans` the entities they make."""

    tags: tuple[str, ...]
    spans: tuple[Span, ...]
    least_margin: float

    @property
    def margin(self) -> float:
        return self.least_margin


@dataclass(frozen=True)
class Embedding(Prediction):
    """A vector, in `probabilities` as every task's numbers are."""

    @property
    def vector(self) -> list[float]:
        return self.probabilities

    @property
    def margin(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Guess:
    """A token that may stand at a mask: its number, its text and its probability; and the whole text with it, where it has one mask."""

    token: int
    token_str: str
    score: float
    sequence: str | None


@dataclass(frozen=True)
class Filled(Prediction):
    """The likeliest tokens at each mask of a text, best first: `label` is what the best ones say, `probabilities` are theirs."""

    masks: tuple[tuple[Guess, ...], ...]
    least_margin: float

    @property
    def margin(self) -> float:
        return self.least_margin


@dataclass(frozen=True)
class Written(Prediction):
    """A text that was written: `label`; there are no numbers behind it. It ended by itself (`stop`) or at its limit (`length`)."""

    num_tokens: int
    finish_reason: Literal["stop", "length"]


def margin_of(probabilities: Sequence[float]) -> float:
    """The difference between the two largest."""
    best, second = sorted(probabilities, reverse=True)[:2] if len(probabilities) > 1 else (1.0, 0.0)
    return best - second


def largest_change(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference between two answers' numbers; those that one of them lacks count as 0."""
    length = max(len(one), len(other))
    padded = ([*numbers, *[0.0] * (length - len(numbers))] for numbers in (one, other))
    return max((abs(a - b) for a, b in zip(*padded, strict=True)), default=0.0)
