"""What a classifier's answers cost: of the decision it was told to make, beside the likeliest label and beside one answer to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import confusion_matrix

from danlu.data.cells import left, widest
from danlu.evaluate.bootstrap import Interval, intervals
from danlu.evaluate.calibration import probabilities
from danlu.spec.task import Decision
from danlu.tasks.decision import cost_matrix, decide


@dataclass(frozen=True)
class Decided:
    """Mean costs a row, with intervals, and what was answered: confusion int [labels, labels], rows are the truth."""

    labels: Sequence[str]
    threshold: float | None
    """With two labels: the probability from which the second is answered."""
    cost: Interval
    cost_of_likeliest: Interval
    always: str
    """The label that costs least as an answer to every row."""
    cost_of_always: Interval
    accuracy: float
    accuracy_of_likeliest: float
    accuracy_of_always: float
    confusion: Sequence[Sequence[int]]
    confusion_of_likeliest: Sequence[Sequence[int]]

    def rows(self) -> list[tuple[str, Interval, float]]:
        """(what is answered, its cost, its accuracy)."""
        at = "the least expected cost" if self.threshold is None else f"{self.labels[1]} from {self.threshold:.4f} on"
        return [
            (at, self.cost, self.accuracy),
            ("the likeliest label", self.cost_of_likeliest, self.accuracy_of_likeliest),
            (f"{self.always} to all", self.cost_of_always, self.accuracy_of_always),
        ]

    def lines(self) -> list[str]:
        """For the terminal."""
        width = widest(name for name, _, _ in self.rows())
        return [
            "  cost a row",
            *(
                f"    {left(name, width)} {one.value:.4f} [{one.low:.4f}, {one.high:.4f}]   accuracy {accuracy:.4f}"
                for name, one, accuracy in self.rows()
            ),
        ]


def decided(decision: Decision, logits: np.ndarray, labels: np.ndarray, label_names: Sequence[str], *, number: int = 1000) -> Decided:
    """What the answers to rows cost (logits float [rows, labels], labels int [rows])."""
    chances, costs = probabilities(logits), cost_matrix(decision, label_names)
    always = int(costs[labels].mean(axis=0).argmin())
    answers = {
        "decided": decide(chances, label_names, decision)[0],
        "likeliest": chances.argmax(axis=1),
        "always": np.full(len(labels), always),
    }
    paid = {name: costs[labels, answer] for name, answer in answers.items()}
    found = intervals(lambda rows: {name: float(cost[rows].mean()) for name, cost in paid.items()}, len(labels), number=number)
    right = {name: float((answer == labels).mean()) for name, answer in answers.items()}
    every = range(len(label_names))
    return Decided(
        labels=list(label_names),
        threshold=decision.threshold,
        cost=found["decided"],
        cost_of_likeliest=found["likeliest"],
        always=label_names[always],
        cost_of_always=found["always"],
        accuracy=right["decided"],
        accuracy_of_likeliest=right["likeliest"],
        accuracy_of_always=right["always"],
        confusion=confusion_matrix(labels, answers["decided"], labels=every).tolist(),
        confusion_of_likeliest=confusion_matrix(labels, answers["likeliest"], labels=every).tolist(),
    )
