"""Scores of answers that are no single label: spans of a text, choices, numbers.

Spans as CMRC 2018's own script scores them (https://github.com/ymcui/cmrc2018): Chinese by character, other words whole, punctuation
left out; F1 over the longest common run of such units, the best of the right answers.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np


def units(text: str) -> list[str]:
    """Chinese characters and other words, in lower case, without punctuation."""
    found: list[str] = []
    word = ""
    for character in text.lower().strip():
        if "\u4e00" <= character <= "\u9fff" or not (character.isalnum() or unicodedata.category(character)[0] == "M"):
            found += [word] if word else []
            word = ""
            found += [character] if "\u4e00" <= character <= "\u9fff" else []
        else:
            word += character
    return found + ([word] if word else [])


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones but for punctuation and spacing."""
    return float(any("".join(units(answer)) == "".join(units(one)) for one in right))


def span_f1(answer: str, right: Sequence[str]) -> float:
    """The best F1 of the answer with one of the right ones, over their longest common run."""
    return max((_f1(units(answer), units(one)) for one in right), default=0.0)


def _f1(answer: Sequence[str], right: Sequence[str]) -> float:
    common = _longest_run(answer, right)
    return 2 * common / (len(answer) + len(right)) if common else 0.0


def _longest_run(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest run that stands in both."""
    best, above = 0, [0] * (len(other) + 1)
    for item in one:
        row = [0] * (len(other) + 1)
        for j, unit in enumerate(other):
            if item == unit:
                row[j + 1] = above[j] + 1
                best = max(best, row[j + 1])
        above = row
    return best


def span_scores(answers: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """Exact match and F1, in percent, of rows with `id` and `answers.text`; a question without an answer scores 0."""
    right = {str(row["id"]): row["answers"]["text"] for row in rows}  # type: ignore[index]
    exact = [exact_match(answers.get(name, ""), texts) for name, texts in right.items()]
    f1 = [span_f1(answers.get(name, ""), texts) for name, texts in right.items()]
    return {"exact_match": 100 * sum(exact) / len(exact), "f1": 100 * sum(f1) / len(f1)}


def matthews(truth: np.ndarray, answers: np.ndarray) -> float:
    """Matthews' correlation of two labels, 0 and 1."""
    a, b = truth.astype(float) - truth.mean(), answers.astype(float) - answers.mean()
    spread = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread else 0.0


def binary_f1(truth: np.ndarray, answers: np.ndarray) -> float:
    """F1 of the label 1."""
    both = int(((truth == 1) & (answers == 1)).sum())
    return 2 * both / max(int((truth == 1).sum() + (answers == 1).sum()), 1)
