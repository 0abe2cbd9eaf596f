"""Whether a classifier's probabilities are what they say: calibration errors, a reliability table, and the temperature that mends them.

ECE and temperature scaling after Guo et al. 2017 (https://arxiv.org/abs/1706.04599); the Brier score is the multi-class one, from 0 to 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

NUM_BINS = 15
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Bin:
    """Rows whose largest probability lies in (low, high]."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """`ece` is the mean gap between confidence and accuracy, `mce` the largest, over bins of equal width that have rows."""

    ece: float
    mce: float
    brier: float
    loss: float
    bins: Sequence[Bin]


@dataclass(frozen=True)
class Temperature:
    """What dividing the logits by `value`, found on other rows (`fitted_on`), does to these: the answers stay, the probabilities change.
    `applied`: the bundle does so wherever it answers; otherwise it is offered (`task.calibration`)."""

    value: float
    fitted_on: str
    before: Calibration
    after: Calibration
    applied: bool = False


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax, float64 [rows, labels]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def calibration(logits: np.ndarray, labels: np.ndarray, *, num_bins: int = NUM_BINS) -> Calibration:
    """Calibration of logits (float [rows, labels]) against labels (int [rows])."""
    chances = probabilities(logits)
    confidence, right = chances.max(axis=1), chances.argmax(axis=1) == labels
    edges = np.linspace(0, 1, num_bins + 1)
    place = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, num_bins - 1)
    bins = [
        Bin(float(edges[i]), float(edges[i + 1]), int(rows.sum()), float(confidence[rows].mean()), float(right[rows].mean()))
        if (rows := place == i).any()
        else Bin(float(edges[i]), float(edges[i + 1]), 0, 0.0, 0.0)
        for i in range(num_bins)
    ]
    gaps = [abs(one.confidence - one.accuracy) for one in bins if one.rows]
    truth = np.eye(logits.shape[1])[labels]
    return Calibration(
        ece=sum(one.rows * abs(one.confidence - one.accuracy) for one in bins) / len(labels),
        mce=max(gaps, default=0.0),
        brier=float(((chances - truth) ** 2).sum(axis=1).mean()),
        loss=loss(logits, labels),
        bins=bins,
    )


def loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy in nats."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the smallest loss. On a log scale the loss has one minimum."""
    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(lambda log: loss(logits / np.exp(log), labels), bounds=(low, high), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))


def scaled(logits: np.ndarray, labels: np.ndarray, temperature: float, fitted_on: str) -> Temperature:
    """Calibration before and after a temperature that was found on other rows."""
    return Temperature(temperature, fitted_on, calibration(logits, labels), calibration(logits / temperature, labels))


def unscaled(logits: np.ndarray, labels: np.ndarray, temperature: float) -> Temperature:
    """Calibration before and after a temperature that these logits were already divided by."""
    before = calibration(logits * temperature, labels)
    return Temperature(temperature, "dev, applied by the bundle", before, calibration(logits, labels), applied=True)
