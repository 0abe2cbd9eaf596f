"""Extractive question answering: a piece of the context. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import Labelled, as_text, choose, enough, is_missing
from danlu.data.encode import Encoded
from danlu.data.formats import Rows
from danlu.data.pack import Packed
from danlu.data.report import data_report
from danlu.data.split import random_split
from danlu.data.windows import encode_with_context
from danlu.spec.data import Columns, Data
from danlu.spec.task import ExtractiveQA
from danlu.tasks.encoder import build_encoder, encoder_skeleton, head_parameters
from danlu.tasks.exchange import CJK, Question, Reading
from danlu.tasks.exchange import Span as AnswerSpan
from danlu.tasks.packed import PackedReader, inputs, padded_rows
from danlu.tasks.rows import Split, Splits, hold_out, metrics_line, read_given, read_splits

PER_TOKEN = True
HEAD = {"num_labels": 2}
USUAL = {
    "question": ("question", "query", "question_text"),
    "context": ("context", "passage", "paragraph", "document", "text"),
    "answers": ("answers", "answer", "label"),
}
MAX_QUESTION_LENGTH = 64
"""Tokens of a question at most, as in BERT's own script."""
CANDIDATES = 20
"""Starts and ends of a window that are looked at, best first, as in transformers' examples."""

# rows


class Gold(NamedTuple):
    """A right answer: `context[start:]` begins with `text`."""

    text: str
    start: int


def splits(data: Data, task: ExtractiveQA, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split and tokenise; raises DataError for anything that could not be learned from.

    The rows of `train` are windows, so that a batch's size does not depend on how long a document is; those of the others are questions.
    """
    rows = read_splits(data)
    made = {name: _split(table, data, task, tokenizer, max_length, f"data.{name}") for name, table in rows.items()}
    report = data_report({name: (split.texts, split.encoded) for name, split in made.items()}, rows, max_length=max_length)
    if "dev" not in made:
        # Questions about one context stay together: half of them in dev would flatter the score.
        contexts = list(dict.fromkeys(one.context for one in made["train"].examples if isinstance(one, Question)))
        _, held = random_split(len(contexts), data.dev_size, seed)
        held_out = {contexts[i] for i in held}
        in_dev = np.asarray([isinstance(one, Question) and one.context in held_out for one in made["train"].examples])
        made = hold_out(made, np.flatnonzero(~in_dev), np.flatnonzero(in_dev))
    train = made["train"]
    windows = replace(train, encoded=train.encoded.sequences, labels=_targets(train, tokenizer))
    return Splits(windows, made["dev"], made.get("test"), [], report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: ExtractiveQA,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Rows of other files than the job's."""
    return _split(read_given(source, data), data, task, tokenizer, max_length, "--data")


def encode_examples(
    examples: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    task: ExtractiveQA,
    *,
    max_length: int,
    cache_dir: str | Path | None = None,
) -> Encoded:
    """Windows of each question's context; `spans` are the context's characters."""
    return encode_with_context(
        [one.question.strip() for one in examples],
        [one.context for one in examples],
        tokenizer,
        max_length=max_length,
        stride=task.doc_stride or max_length // 3,
        max_question_length=min(MAX_QUESTION_LENGTH, max_length // 4),
        cache_dir=cache_dir,
    )


def _split(rows: Rows, data: Data, task: ExtractiveQA, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str) -> Split:
    examples, gold, texts = _read(rows, data.columns, task, where)
    encoded = encode_examples(examples, tokenizer, task, max_length=max_length, cache_dir=data.cache_dir)
    return Split(
        encoded, None, replace(texts, labels=gold), examples, [tuple(dict.fromkeys(one.text for one in answers)) for answers in gold]
    )


def _read(rows: Rows, columns: Columns, task: ExtractiveQA, where: str) -> tuple[list[Question], list[tuple[Gold, ...]], Labelled]:
    chosen = choose(rows, columns, USUAL, tuple(USUAL), where)
    examples: list[Question] = []
    gold: list[tuple[Gold, ...]] = []
    numbers: list[int] = []
    dropped: Counter[str] = Counter()
    table = zip(*(rows.columns[chosen[role]] for role in ("question", "context", "answers")), strict=True)
    for number, (question, context, answers) in enumerate(table, 1):
        example, told = Question(as_text(question), as_text(context)), _told(answers)
        found = tuple(one for text, start in told if (one := _placed(example.context, text, start)) is not None)
        if not example.question.strip() or not example.context.strip():
            dropped["rows without a question or a context"] += 1
        elif told and not found:
            dropped["rows whose answer does not stand in the context"] += 1
        elif not told and not task.version_2_with_negative:
            dropped["rows without an answer (task.version_2_with_negative=true learns them)"] += 1
        else:
            examples.append(example)
            gold.append(found)
            numbers.append(number)
    enough(examples, dropped, chosen, where)
    counts = {"answer": sum(map(bool, gold)), "no answer": sum(not one for one in gold)}
    texts = Labelled(
        [one.question for one in examples],
        [one.context for one in examples],
        None,
        numbers,
        chosen,
        label_counts={name: count for name, count in counts.items() if count},
        dropped=dict(dropped),
    )
    return examples, gold, texts


def _told(answers: object) -> list[tuple[str, int | None]]:
    """Answers (text, start) in the forms that files have them in; empty where there is none."""
    if isinstance(answers, str) and answers.lstrip()[:1] in ("{", "["):
        # Of a csv's cell; else a text that begins with a bracket.
        with contextlib.suppress(ValueError):
            answers = json.loads(answers)
    if isinstance(answers, dict):
        texts = answers.get("text") or []
        texts = [texts] if isinstance(texts, str) else texts
        starts = answers.get("answer_start")
        starts = starts if isinstance(starts, list) else [starts]
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, [*starts, *[None] * len(texts)], strict=False)]
    if not isinstance(answers, list | tuple):
        answers = [] if is_missing(answers) else [answers]
    found: list[tuple[str, int | None]] = []
    for one in answers:
        text, start = (one.get("text"), one.get("answer_start")) if isinstance(one, dict) else (one, None)
        if as_text(text).strip():
            found.append((as_text(text), start if isinstance(start, int) and not isinstance(start, bool) else None))
    return found


def _placed(context: str, text: str, start: int | None) -> Gold | None:
    """The answer where it stands: at `start`, or else at the nearest place where the context has it."""
    if start is not None and start >= 0 and context.startswith(text, start):
        return Gold(text, start)
    text = text.strip()
    places = [found.start() for found in re.finditer(re.escape(text), context)]
    return Gold(text, min(places, key=lambda place: abs(place - (start or 0)))) if places else None


def _targets(split: Split, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Each window's first and last token of the first right answer, int64 [windows, 2]; its first token twice where it does not hold it."""
    encoded = split.encoded
    assert encoded.groups is not None
    assert encoded.spans is not None
    owners = np.repeat(np.arange(len(encoded)), np.diff(encoded.groups))
    targets = np.zeros((len(owners), 2), dtype=np.int64)
    for window, owner in enumerate(owners):
        gold = (split.texts.labels or [])[owner]
        spans = encoded.spans[encoded.offsets[window] : encoded.offsets[window + 1]]
        if gold and (found := _tokens_of(gold[0], spans)) is not None:
            targets[window] = found
    return targets


def _tokens_of(gold: Gold, spans: np.ndarray) -> tuple[int, int] | None:
    """The first and the last token that an answer touches, if the window holds all of it."""
    end = gold.start + len(gold.text)
    context = spans[spans[:, 0] >= 0]
    if not len(context) or context[0, 0] > gold.start or context[-1, 1] < end:
        return None
    touched = np.flatnonzero((spans[:, 0] >= 0) & (spans[:, 0] < end) & (spans[:, 1] > gold.start))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


# model


def build_model(
    folder: str | Path, label_names: Sequence[str], *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder with a new head of two outputs a token, in float32; `quantization` holds its linear layers in fewer bits."""
    return build_encoder(AutoModelForQuestionAnswering, folder, HEAD, dropout=dropout, quantization=quantization)


def skeleton(folder: str | Path, num_labels: int) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    return encoder_skeleton(AutoModelForQuestionAnswering, folder, HEAD)


def wrap(model: PreTrainedModel, task: ExtractiveQA, *, packed: bool | None = None) -> PackedReader:
    """The model as the loop calls it; `packed` as PackedEncoder has it."""
    return PackedReader(model, packed=packed)


# loss


def loss(model: nn.Module, batch: Packed, task: ExtractiveQA) -> torch.Tensor:
    """Sum over windows of the mean of two cross-entropies over their tokens: of the answer's first and of its last."""
    assert batch.labels is not None
    lengths = batch.cu_seqlens.diff().tolist()
    logits = row_outputs(model, batch).float()
    both = (padded_rows(logits[:, i], lengths, -torch.inf) for i in (0, 1))
    starts, stops = (nn.functional.cross_entropy(one, batch.labels[:, i], reduction="sum") for i, one in enumerate(both))
    return (starts + stops) / 2


def num_targets(batch: Packed) -> int:
    """One a window."""
    return batch.num_rows


# metrics


@dataclass(frozen=True)
class ReadingScores:
    """SQuAD's exact match and F1 as shares, not per cent; of questions with an answer and of those without, where there are both."""

    exact_match: float
    f1: float
    num_rows: int
    has_answer_f1: float | None
    no_answer_f1: float | None

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {"f1": self.f1, "exact_match": self.exact_match}

    def text(self) -> str:
        """For the terminal."""
        if self.has_answer_f1 is None or self.no_answer_f1 is None:
            return metrics_line(self)
        return f"{metrics_line(self)}\n  F1 of questions with an answer {self.has_answer_f1:.4f}   without {self.no_answer_f1:.4f}"


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Logits of being an answer's first and last token, [tokens, 2]."""
    found: torch.Tensor = model(*inputs(batch))
    return found


def scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: ExtractiveQA) -> ReadingScores:
    """Score answers (float [tokens, 2]) against a split's references."""
    return scores_of(row_scores(outputs, split, label_names, task))


def row_scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: ExtractiveQA) -> np.ndarray:
    """Of each question exact match, F1, and whether it has an answer, float [questions, 3]; against the best of its references, as the
    official script has it."""
    questions = [one for one in split.examples if isinstance(one, Question)]
    answers = [found.label for found in predictions(outputs, split.encoded, questions, label_names, task)]
    pairs = list(zip(answers, split.references, strict=True))
    exact = [max(exact_match(answer, one) for one in gold or ("",)) for answer, gold in pairs]
    f1 = [max(f1_score(answer, one) for one in gold or ("",)) for answer, gold in pairs]
    return np.array([exact, f1, [bool(gold) for _, gold in pairs]], dtype=np.float64).T


def scores_of(rows: np.ndarray) -> ReadingScores:
    """The scores of questions, from each one's."""
    exact, f1, has_answer = rows.T
    both = 0 < has_answer.sum() < len(rows)
    return ReadingScores(
        exact_match=float(exact.mean()),
        f1=float(f1.mean()),
        num_rows=len(rows),
        has_answer_f1=float(f1[has_answer > 0].mean()) if both else None,
        no_answer_f1=float(f1[has_answer == 0].mean()) if both else None,
    )


FULL_WIDTH = "\u3000-\u3003\u3008-\u3011\u3014-\u301f\u2010-\u2027\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}{FULL_WIDTH}]")


def normalised(answer: str) -> str:
    """Lower case, without punctuation (Chinese too), articles and extra spaces: https://rajpurkar.github.io/SQuAD-explorer/."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", PUNCTUATION.sub("", answer.lower())).split())


def answer_tokens(answer: str) -> list[str]:
    """Words of a normalised answer, and each Chinese character as one."""
    return re.findall(f"[{CJK}]|[^\\s{CJK}]+", normalised(answer))


def exact_match(answer: str, gold: str) -> float:
    """1 if they are the same, normalised."""
    return float(normalised(answer) == normalised(gold))


def f1_score(answer: str, gold: str) -> float:
    """F1 of the bags of their words."""
    found, right = answer_tokens(answer), answer_tokens(gold)
    if not found or not right:
        return float(found == right)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right))


# prediction


@dataclass(frozen=True)
class _Candidate:
    start: int
    end: int
    score: float


def predictions(
    outputs: np.ndarray, encoded: Encoded, examples: Sequence[Question], label_names: Sequence[str], task: ExtractiveQA
) -> list[Reading]:
    """The best answer over all windows of a question, with those that come next."""
    assert encoded.groups is not None
    assert encoded.spans is not None
    found = []
    for row, example in enumerate(examples):
        candidates: dict[tuple[int, int], _Candidate] = {}
        no_answer = np.inf
        for window in range(encoded.groups[row], encoded.groups[row + 1]):
            tokens = slice(encoded.offsets[window], encoded.offsets[window + 1])
            # The window that is surest of an answer says how likely there is none.
            no_answer = min(no_answer, float(outputs[tokens][0].sum()))
            for one in _best_of(outputs[tokens], encoded.spans[tokens], task.max_answer_length):
                place = (one.start, one.end)
                if place not in candidates or candidates[place].score < one.score:
                    candidates[place] = one
        best = sorted(candidates.values(), key=lambda one: (-one.score, one.start, one.end))[: task.n_best_size]
        found.append(_reading(example, best, no_answer if task.version_2_with_negative else None, task))
    return found


def _best_of(logits: np.ndarray, spans: np.ndarray, max_answer_length: int) -> list[_Candidate]:
    """Candidates of one window (logits [tokens, 2])."""
    places = np.flatnonzero(spans[:, 0] >= 0)
    starts, ends = (places[np.argsort(-logits[places, i], kind="stable")[:CANDIDATES]] for i in (0, 1))
    return [
        _Candidate(int(spans[start, 0]), int(spans[end, 1]), float(logits[start, 0]) + float(logits[end, 1]))
        for start in starts
        for end in ends
        if start <= end < start + max_answer_length
    ]


def _reading(example: Question, best: Sequence[_Candidate], no_answer: float | None, task: ExtractiveQA) -> Reading:
    """Probabilities are the softmax of the candidates' scores, and no answer's."""
    told = [one.score for one in best] + ([] if no_answer is None else [no_answer])
    shares = np.exp(np.asarray(told, dtype=np.float64) - max(told)) if told else np.empty(0)
    shares = shares / shares.sum() if told else shares
    spans = tuple(
        AnswerSpan(example.context[one.start : one.end], one.start, one.end, float(share)) for one, share in zip(best, shares, strict=False)
    )
    nothing = no_answer is not None and (not best or no_answer - best[0].score > task.null_score_diff_threshold)
    return Reading(
        "" if nothing or not spans else spans[0].text,
        sorted(map(float, shares), reverse=True),
        spans,
        None if no_answer is None else float(shares[-1]),
    )


__all__ = [
    "PER_TOKEN", "ReadingScores", "build_model", "encode_examples", "given_split", "head_parameters", "loss", "num_targets",
    "predictions", "row_outputs", "row_scores", "scores", "scores_of", "skeleton", "splits", "wrap",
]  # fmt: skip
