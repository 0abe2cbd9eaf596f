"""Answers by what they cost: the cost matrix, the decision and the threshold it is made at. float64 in, arrays out.

With probabilities that are what they say, the answer of least expected cost is the best there is, and with two labels it is a threshold
(Elkan 2001, https://cseweb.ucsd.edu/~elkan/rescale.pdf); on the dev rows another one may still cost less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from danlu.spec.task import Decision


def cost_matrix(decision: Decision, label_names: Sequence[str]) -> np.ndarray:
    """float64 [labels, labels]: what it costs to answer the column's label where the row's is true."""
    return np.array([[decision.costs.get(truth, {}).get(answer, 0.0) for answer in label_names] for truth in label_names])


def decide(probabilities: np.ndarray, label_names: Sequence[str], decision: Decision) -> tuple[np.ndarray, np.ndarray]:
    """Answers (int [rows]) to probabilities (float [rows, labels]), and how clear each is: while no probability moves by half of that,
    the answer stays."""
    costs = cost_matrix(decision, label_names)
    if len(label_names) == 2 and (threshold := decision.threshold or expected_threshold(costs)) is not None:
        second = probabilities[:, 1]
        return (second >= threshold).astype(np.int64), 2 * np.abs(second - threshold)
    expected = probabilities.astype(np.float64) @ costs
    order = np.argsort(expected, axis=1, kind="stable")
    rows = np.arange(len(expected))
    # Every probability moves the difference of two expected costs by the difference of two costs at most.
    reach = np.ptp(costs, axis=1).sum() or 1.0
    return order[:, 0], 2 * (expected[rows, order[:, 1]] - expected[rows, order[:, 0]]) / reach


def expected_threshold(costs: np.ndarray) -> float | None:
    """The probability of the second of two labels from which answering it is expected to cost less."""
    missed, alarmed = costs[1, 0] - costs[1, 1], costs[0, 1] - costs[0, 0]
    return float(alarmed / (alarmed + missed)) if missed > 0 and alarmed > 0 else None


def choose_threshold(second: np.ndarray, labels: np.ndarray, costs: np.ndarray) -> float:
    """The threshold on the second label's probability (float [rows]) at which the answers to these rows (labels int [rows]) cost least;
    of several, the one nearest to what is expected to be best."""
    expected = expected_threshold(costs)
    edges = np.unique(second.astype(np.float64))
    inner = (edges[1:] + edges[:-1]) / 2
    usual = [0.5 if expected is None else expected]
    candidates = np.clip(np.concatenate([[edges[0] / 2], inner, [(1 + edges[-1]) / 2], usual]), 1e-6, 1 - 1e-6)
    order = np.argsort(second, kind="stable")
    # Below the threshold every row is answered with the first label, from it on with the second.
    as_first = np.concatenate([[0.0], np.cumsum(costs[labels[order], 0])])
    as_second = np.concatenate([[0.0], np.cumsum(costs[labels[order], 1])])
    below = np.searchsorted(second[order], candidates, side="left")
    total = as_first[below] + as_second[-1] - as_second[below]
    cheapest = candidates[total <= total.min() + 1e-12]
    return float(cheapest[np.abs(cheapest - usual[0]).argmin()])
