"""How sure a metric is: bootstrap confidence intervals, and paired tests of two models on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 1000
LEVEL = 0.95

Score = Callable[[np.ndarray], Mapping[str, float]]
"""Row indices, with repeats -> the metrics of those rows."""


@dataclass(frozen=True)
class Interval:
    """A metric and its percentile interval (Efron & Tibshirani 1993, chapter 13) at `LEVEL`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """B's metric minus A's on the same rows. `p_value`: two-sided, from the share of paired resamples on the other side of 0."""

    a: float
    b: float
    change: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class McNemar:
    """Rows that only one of two models answers right, and the exact two-sided binomial p value that they are as likely."""

    only_a_right: int
    only_b_right: int
    both_right: int
    both_wrong: int
    p_value: float


def intervals(score: Score, num_rows: int, *, number: int = NUM_RESAMPLES, seed: int = 17, level: float = LEVEL) -> dict[str, Interval]:
    """Each metric of all rows, with its interval."""
    values = score(np.arange(num_rows))
    drawn = _drawn(score, num_rows, number, seed)
    tail = 100 * (1 - level) / 2
    return {
        name: Interval(float(value), *(float(bound) for bound in np.nanpercentile([one[name] for one in drawn], [tail, 100 - tail])))
        for name, value in values.items()
    }


def differences(
    a: Score, b: Score, num_rows: int, *, number: int = NUM_RESAMPLES, seed: int = 17, level: float = LEVEL
) -> dict[str, Difference]:
    """Each metric of B minus A's, both on the same resamples of the same rows."""
    everything = np.arange(num_rows)
    of_a, of_b = a(everything), b(everything)
    drawn_a, drawn_b = _drawn(a, num_rows, number, seed), _drawn(b, num_rows, number, seed)
    tail = 100 * (1 - level) / 2
    found = {}
    for name in of_a:
        changes = np.array([two[name] - one[name] for one, two in zip(drawn_a, drawn_b, strict=True)])
        low, high = np.nanpercentile(changes, [tail, 100 - tail])
        # One is added above and below: no number of resamples shows that a difference is impossible (Davison & Hinkley 1997, 4.2.5).
        side = min((changes <= 0).sum(), (changes >= 0).sum()) + 1
        p_value = min(1.0, 2 * side / (number + 1))
        found[name] = Difference(of_a[name], of_b[name], of_b[name] - of_a[name], float(low), float(high), float(p_value))
    return found


def _drawn(score: Score, num_rows: int, number: int, seed: int) -> list[Mapping[str, float]]:
    draw = np.random.default_rng(seed)
    # Row by row of `resamples`, which would be a gigabyte for a hundred thousand rows.
    return [score(draw.integers(0, num_rows, num_rows, dtype=np.int64)) for _ in range(number)]


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> McNemar:
    """McNemar's exact test on two bool arrays [rows]."""
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    number, smaller = only_a + only_b, min(only_a, only_b)
    logs = [math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1) for k in range(smaller + 1)]
    tail = sum(math.exp(log - number * math.log(2)) for log in logs)
    return McNemar(only_a, only_b, int((right_a & right_b).sum()), int((~right_a & ~right_b).sum()), min(1.0, 2 * tail))


def label_score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Accuracy, macro F1 and loss of resampled rows of a classifier (logits float [rows, labels]; labels int [rows]), from counts."""
    width = logits.shape[1]
    answers = logits.argmax(axis=1)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    cells = labels.astype(np.int64) * width + answers

    def score(rows: np.ndarray) -> dict[str, float]:
        counts = np.bincount(cells[rows], minlength=width * width).reshape(width, width)
        right, truth, given = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
        f1 = 2 * right / np.maximum(truth + given, 1)
        return {
            "accuracy": float(right.sum() / len(rows)),
            "macro_f1": float(f1[truth > 0].mean()),
            "loss": float(losses[rows].mean()),
        }

    return score


def label_sets_score(logits: np.ndarray, truth: np.ndarray, given: np.ndarray) -> Score:
    """F1s, subset accuracy and loss of resampled rows with sets of labels, from counts (logits float, the others bool; [rows, labels])."""
    right, whole = truth & given, (truth == given).all(axis=1)
    losses = (np.logaddexp(0.0, logits.astype(np.float64)) - logits * truth).mean(axis=1)

    def score(rows: np.ndarray) -> dict[str, float]:
        hits, has = right[rows].sum(axis=0), truth[rows].sum(axis=0)
        both = has + given[rows].sum(axis=0)
        f1 = 2 * hits / np.maximum(both, 1)
        return {
            "micro_f1": float(2 * hits.sum() / max(both.sum(), 1)),
            "macro_f1": float(f1[has > 0].mean()) if has.any() else 0.0,
            "subset_accuracy": float(whole[rows].mean()),
            "loss": float(losses[rows].mean()),
        }

    return score
