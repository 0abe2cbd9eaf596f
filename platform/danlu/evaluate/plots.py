"""A run's plots one by one, as trackers keep them: a self-contained page each, and the same numbers as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from danlu.data.page import page
from danlu.evaluate.analysis_html import reliability
from danlu.evaluate.calibration import Calibration, calibration
from danlu.evaluate.html import confusion, curves
from danlu.evaluate.score import Evaluation
from danlu.spec.task import Classification, Task
from danlu.tasks.classification import Scores
from danlu.tasks.rows import Split


@dataclass(frozen=True)
class Plot:
    """`name` is also a file's; `table` is empty where a tracker draws the same from the numbers it has."""

    name: str
    html: str
    table: str = ""


def plots(title: str, records: Sequence[Mapping[str, Any]], task: Task, scored: Mapping[str, tuple[Split, Evaluation]]) -> list[Plot]:
    """Curves of the training; of each split of a classifier its confusion matrix and how far its probabilities can be trusted."""
    found = [Plot("curves", page(title, "Curves", [curves(records)]))]
    for name, (split, evaluation) in scored.items():
        scores = evaluation.scores
        if isinstance(scores, Scores):
            told = f"Confusion matrix on the {name} split"
            found.append(Plot(f"confusion-{name}", page(title, told, [confusion(scores)]), _confusion_table(scores)))
        if isinstance(task, Classification) and split.labels is not None:
            measured = calibration(evaluation.outputs, split.labels)
            drawn = f'<div class="charts">{reliability(f"the {name} split", measured.bins)}</div>'
            told = f"Calibration on the {name} split, expected error {measured.ece:.4f}"
            found.append(Plot(f"calibration-{name}", page(title, told, [drawn]), _calibration_table(measured)))
    return found


def _confusion_table(scores: Scores) -> str:
    names = list(scores.per_class)
    return _markdown(("truth \\ answer", *names), [(name, *counts) for name, counts in zip(names, scores.confusion, strict=True)])


def _calibration_table(found: Calibration) -> str:
    rows = [
        (f"{one.low:.2f} to {one.high:.2f}", one.rows, f"{one.confidence:.4f}", f"{one.accuracy:.4f}") for one in found.bins if one.rows
    ]
    return _markdown(("probability", "rows", "mean probability", "accuracy"), rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
