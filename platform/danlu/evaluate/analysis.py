"""What stands beside a score: how sure it is, where it is worse, whether its probabilities can be believed, and the rows it gets wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from danlu.data.cells import left, widest
from danlu.data.columns import Labelled, as_label
from danlu.evaluate.bootstrap import Interval, Score, intervals, label_score, label_sets_score
from danlu.evaluate.calibration import Calibration, Temperature, calibration, probabilities, scaled, unscaled
from danlu.evaluate.cost import Decided, decided
from danlu.spec.task import Classification, ExtractiveQA, MultiLabelClassification, Task
from danlu.tasks.decision import decide
from danlu.tasks.rows import Split
from danlu.tasks.task import task_file

MAX_VALUES = 20
"""Values of a column that become slices; the rest are one slice."""
LENGTH_BINS = 4
NUM_ERRORS = 50
RESAMPLING_S = 20.0
"""Time for the resamples of a task whose scores are not made of counts."""


@dataclass(frozen=True)
class Slice:
    """A part of the rows and its metrics; intervals are wide where rows are few, which is what they are for."""

    by: str
    value: str
    rows: int
    metrics: Mapping[str, Interval]


@dataclass(frozen=True)
class Mistake:
    """A row that was answered wrong. `row` counts from 1 in its file."""

    row: int
    text: str
    text_pair: str | None
    truth: str
    answer: str
    probability: float


@dataclass(frozen=True)
class Analysis:
    """The whole of it, for one split. `calibration` and `mistakes` are a classifier's."""

    split: str
    rows: int
    metrics: Mapping[str, Interval]
    slices: Sequence[Slice]
    calibration: Calibration | None
    temperature: Temperature | None
    decision: Decided | None
    mistakes: Sequence[Mistake]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def text(self) -> str:
        """For the terminal."""
        lines = ["  95 % intervals (bootstrap)"]
        lines += [f"    {name:<12} {one.value:.4f} [{one.low:.4f}, {one.high:.4f}]" for name, one in self.metrics.items()]
        if self.calibration is not None:
            lines.append(f"  calibration: ECE {self.calibration.ece:.4f}   Brier {self.calibration.brier:.4f}")
        if self.temperature is not None:
            fix = self.temperature
            lines.append(
                f"    logits / {fix.value:.3f} (fitted on {fix.fitted_on}): ECE {fix.before.ece:.4f} -> {fix.after.ece:.4f}, "
                f"loss {fix.before.loss:.4f} -> {fix.after.loss:.4f}"
            )
        if self.decision is not None:
            lines += self.decision.lines()
        for by in dict.fromkeys(found.by for found in self.slices):
            some = [found for found in self.slices if found.by == by]
            width = widest(found.value for found in some)
            lines.append(f"  by {by}")
            for found in some:
                name, first = next(iter(found.metrics.items()))
                lines.append(
                    f"    {left(found.value, width)} {found.rows:>6} rows   {name} {first.value:.4f} [{first.low:.4f}, {first.high:.4f}]"
                )
        return "\n".join(lines)


def score_of(task: Task, outputs: np.ndarray, split: Split, label_names: Sequence[str]) -> Score:
    """The metrics of any rows of an evaluation: classifiers' from counts, a reader's from each question's, another's by its own file."""
    if isinstance(task, Classification):
        assert split.labels is not None
        return label_score(outputs, split.labels)
    if isinstance(task, MultiLabelClassification):
        from danlu.tasks import multi_label

        assert split.labels is not None
        return label_sets_score(outputs, split.labels.astype(bool), multi_label.probabilities(outputs) >= task.threshold)
    if isinstance(task, ExtractiveQA):
        from danlu.tasks import extractive_qa

        each = extractive_qa.row_scores(outputs, split, label_names, task)  # to search for answers takes long: once
        return lambda rows: extractive_qa.scores_of(each[rows]).metrics()
    file = task_file(task)

    def score(rows: np.ndarray) -> Mapping[str, float]:
        places = split.encoded.sequences_of(rows)
        if file.PER_TOKEN:
            places = split.encoded.sequences.tokens_of(places)
        return file.scores(outputs[places], split.take(rows), label_names, task).metrics()

    return score


def analyse(
    task: Task,
    split: Split,
    outputs: np.ndarray,
    label_names: Sequence[str],
    *,
    name: str,
    columns: Mapping[str, Sequence[object]] | None = None,
    temperature: tuple[float, str] | None = None,
    number: int = 1000,
    score: Score | None = None,
) -> Analysis:
    """Everything that can be said of an evaluation's outputs (float [rows, width]). `columns` are sliced by too;
    `temperature` was fitted on the split that is named with it, and is offered where the task has none; `score` is of more than outputs."""
    score = score or score_of(task, outputs, split, label_names)
    classifies = isinstance(task, Classification) and split.labels is not None
    if not classifies:
        began = time.perf_counter()
        score(np.arange(len(split)))
        # Another task's scores may take long: fewer resamples, whose ends are less sure.
        number = max(50, min(number, int(RESAMPLING_S / (time.perf_counter() - began + 1e-9))))
    sliced = []
    for by, values in _slicings(split, label_names if classifies else [], columns or {}):
        for value in dict.fromkeys(values):
            rows = np.flatnonzero([one == value for one in values])
            # A quarter of the resamples: there are many slices, and their intervals are wide anyhow.
            sliced.append(Slice(by, value, len(rows), intervals(_within(score, rows), len(rows), number=max(1, number // 4))))
    return Analysis(
        split=name,
        rows=len(split),
        metrics=intervals(score, len(split), number=number),
        slices=sliced,
        calibration=calibration(outputs, split.labels) if classifies and split.labels is not None else None,
        temperature=_temperature(task, outputs, split.labels, temperature),
        decision=decided(task.decision, outputs, split.labels, label_names, number=number)
        if isinstance(task, Classification) and task.decision is not None and split.labels is not None
        else None,
        mistakes=mistakes(split.texts, outputs, split.labels, label_names, task=task)
        if isinstance(task, Classification) and split.labels is not None
        else [],
    )


def _temperature(task: Task, outputs: np.ndarray, labels: np.ndarray | None, offered: tuple[float, str] | None) -> Temperature | None:
    if not isinstance(task, Classification) or labels is None:
        return None
    if task.calibration is not None and task.calibration.temperature is not None:
        return unscaled(outputs, labels, task.calibration.temperature)
    return scaled(outputs, labels, *offered) if offered else None


def _within(score: Score, rows: np.ndarray) -> Score:
    return lambda some: score(rows[some])


def _slicings(split: Split, label_names: Sequence[str], columns: Mapping[str, Sequence[object]]) -> list[tuple[str, list[str]]]:
    """(by what, each row's value), values of one slicing in the order they are to be shown in."""
    found = [("length in tokens", length_bins(split.encoded.lengths))]
    if label_names and split.labels is not None:
        found.append(("label", [label_names[int(label)] for label in split.labels]))
    for name, column in columns.items():
        values = [as_label(value) or "(none)" for value in column]
        counts = {value: values.count(value) for value in set(values)} if len(set(values)) <= 10 * MAX_VALUES else {}
        kept = sorted(counts, key=lambda value: -counts[value])[:MAX_VALUES]
        found.append((name, [value if value in kept else "(others)" for value in values]))
    return [(by, values) for by, values in found if len(set(values)) > 1]


def length_bins(lengths: np.ndarray, number: int = LENGTH_BINS) -> list[str]:
    """Each row's quarter of the lengths, as `8-21`; fewer bins where lengths repeat."""
    edges = np.unique(np.percentile(lengths, np.linspace(0, 100, number + 1)[1:-1]))
    place = np.searchsorted(edges, lengths, side="left")
    names = {int(bin_): f"{lengths[place == bin_].min()}-{lengths[place == bin_].max()}" for bin_ in np.unique(place)}
    return [names[int(bin_)] for bin_ in place]


def mistakes(
    texts: Labelled,
    logits: np.ndarray,
    labels: np.ndarray,
    label_names: Sequence[str],
    number: int = NUM_ERRORS,
    *,
    task: Classification | None = None,
) -> list[Mistake]:
    """The wrong answers, the surest first."""
    chances = probabilities(logits)
    decision = None if task is None else task.decision
    answers = chances.argmax(axis=1) if decision is None else decide(chances, label_names, decision)[0]
    wrong = np.flatnonzero(answers != labels)
    surest = wrong[np.argsort(-chances[wrong, answers[wrong]], kind="stable")][:number]
    return [
        Mistake(
            texts.row_numbers[i],
            texts.texts[i][:1000],
            texts.pairs[i][:1000] if texts.pairs else None,
            label_names[int(labels[i])],
            label_names[int(answers[i])],
            float(chances[i, answers[i]]),
        )
        for i in surest
    ]
