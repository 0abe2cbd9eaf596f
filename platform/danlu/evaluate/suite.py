"""Benchmark suites: the official files as rows of ours, what each task is scored by, and the files that are handed in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from danlu.errors import DataError
from danlu.evaluate.reading import binary_f1, matthews, span_scores
from danlu.tasks.exchange import Choices, Example, Prediction, Question, Text

Values = dict[str, Any]
Shape = Literal["classification", "multiple_choice", "extractive_qa", "regression"]


@dataclass(frozen=True)
class SuiteTask:
    """A task of a suite. `files`: split -> names its file has, the first that is there counts (several: all of them, joined by +).

    Rows: classification {id, text, text_pair?, label?}; multiple_choice {id, context, question, choices, answer?}; extractive_qa {id,
    context, question, answers: {text, answer_start}}; regression {id, text, text_pair, label: a number}.
    """

    name: str
    shape: Shape
    metrics: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    load: Callable[[Path], list[Values]]
    submission: str
    """Name of the file that is handed in."""
    labels: tuple[str, ...] | None = None
    folders: tuple[str, ...] = field(default=())
    style: Literal["json lines", "json", "tsv"] = "json lines"

    def folder(self, root: Path) -> Path | None:
        """The task's folder under a suite's, or None."""
        names = {name.lower() for name in (self.name, f"{self.name}_public", *self.folders)}
        return next((path for path in sorted(root.iterdir()) if path.is_dir() and path.name.lower() in names), None)

    def rows(self, root: Path, split: str) -> list[Values] | None:
        """A split's rows, or None where its file is not there. DataError names the file and what is wrong with it."""
        folder = self.folder(root)
        for name in self.files.get(split, ()) if folder is not None else ():
            paths = [folder / part for part in name.split("+")]  # type: ignore[operator]
            if all(path.exists() for path in paths):
                return [row for path in paths for row in self._loaded(path)]
        return None

    def _loaded(self, path: Path) -> list[Values]:
        try:
            return self.load(path)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} is not in {self.name}'s format: {type(error).__name__}: {error}", where="--data", fix="the suite's own files"
            ) from error

    def example(self, row: Values) -> Example:
        """What a model is asked."""
        match self.shape:
            case "multiple_choice":
                return Choices(row["question"], tuple(row["choices"]), row["context"])
            case "extractive_qa":
                return Question(row["question"], row["context"])
            case _:
                return Text(row["text"], row.get("text_pair"))

    def answer(self, found: Prediction) -> str | int | float:
        """A prediction as it is scored and handed in: a label, an option's number, a piece of the context, or a number."""
        match self.shape:
            case "multiple_choice":
                return int(np.argmax(found.probabilities))
            case "regression":
                return float(found.probabilities[0])
            case _:
                return found.label

    def scores(self, rows: Sequence[Values], answers: Sequence[Any]) -> dict[str, float]:
        """The task's metrics of answers to labelled rows, each between 0 and 1 (correlations: -1 and 1)."""
        if self.shape == "extractive_qa":
            found = span_scores({str(row["id"]): answer for row, answer in zip(rows, answers, strict=True)}, rows)
            return {name: found[name] / 100 for name in self.metrics}
        truth = [row["answer"] if self.shape == "multiple_choice" else row["label"] for row in rows]
        if self.shape == "regression":
            from scipy.stats import pearsonr, spearmanr

            measures = {"pearson": pearsonr, "spearman": spearmanr}
            return {name: float(measures[name](np.asarray(truth, dtype=float), np.asarray(answers)).statistic) for name in self.metrics}
        names = {name: i for i, name in enumerate(sorted({*truth, *answers}))}
        if self.labels is not None:
            names = {name: i for i, name in enumerate(self.labels)}
        one, other = (np.array([names[value] for value in values]) for values in (truth, answers))
        known: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
            "accuracy": lambda a, b: float((a == b).mean()),
            "matthews": matthews,
            "f1": binary_f1,
        }
        return {name: known[name](one, other) for name in self.metrics}

    def handed_in(self, ids: Sequence[object], answers: Sequence[object]) -> str:
        """The contents of the file that is handed in, in the order of the test rows."""
        match self.style:
            case "json":
                return json.dumps(dict(zip(map(str, ids), answers, strict=True)), ensure_ascii=False, indent=2) + "\n"
            case "tsv":
                return "index\tprediction\n" + "".join(f"{i}\t{answer}\n" for i, answer in enumerate(answers))
            case _:
                lines = (json.dumps({"id": id_, "label": answer}, ensure_ascii=False) for id_, answer in zip(ids, answers, strict=True))
                return "".join(f"{line}\n" for line in lines)


def json_lines(path: Path) -> list[Values]:
    """Objects, one a line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def tsv(path: Path, header: Sequence[str] | None = None) -> list[Values]:
    """Rows of a tab-separated file without quoting; `header` where it has none of its own."""
    csv.field_size_limit(1 << 30)
    lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))
    names, body = (list(header), lines) if header else (lines[0], lines[1:])
    # Some official files have rows with a cell too many or too few; what follows takes the cells it needs.
    return [dict(zip(names, row, strict=False)) for row in body if row]


def suite(name: str) -> dict[str, SuiteTask]:
    """The tasks of a suite by name."""
    match name:
        case "clue":
            from danlu.evaluate import clue

            tasks: Sequence[SuiteTask] = clue.TASKS
        case "glue":
            from danlu.evaluate import glue

            tasks = glue.TASKS
        case _:
            raise DataError(f"there is no suite named {name!r}", where="danlu suite", fix="clue or glue")
    return {task.name: task for task in tasks}
