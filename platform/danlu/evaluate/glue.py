"""GLUE (https://gluebenchmark.com): its tasks from their official tab-separated files. MNLI is scored on both of its dev files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from danlu.evaluate.suite import SuiteTask, Values, tsv

TSV = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}
MNLI = {
    "train": ("train.tsv",),
    "dev": ("dev_matched.tsv",),
    "dev_mismatched": ("dev_mismatched.tsv",),
    "test": ("test_matched.tsv",),
    "test_mismatched": ("test_mismatched.tsv",),
}
NLI = ("contradiction", "entailment", "neutral")


def columns(text: str, pair: str | None, label: str) -> Callable[[Path], list[Values]]:
    """A loader of a file with a header."""

    def load(path: Path) -> list[Values]:
        rows = []
        for number, cells in enumerate(tsv(path)):
            row = {"id": cells.get("index", number), "text": cells[text]}
            if pair is not None:
                row["text_pair"] = cells[pair]
            if label in cells and not path.name.startswith("test"):
                row["label"] = cells[label]
            rows.append(row)
        return rows

    return load


def acceptability(path: Path) -> list[Values]:
    """CoLA: train and dev have no header."""
    if path.name.startswith("test"):
        return [{"id": row["index"], "text": row["sentence"]} for row in tsv(path)]
    rows = tsv(path, ("source", "label", "original_label", "sentence"))
    return [{"id": i, "text": row["sentence"], "label": row["label"]} for i, row in enumerate(rows)]


def _task(
    name: str,
    load: Callable[[Path], list[Values]],
    metrics: tuple[str, ...] = ("accuracy",),
    labels: tuple[str, ...] = ("0", "1"),
    files: Mapping[str, tuple[str, ...]] = TSV,
    submission: str = "",
    folders: tuple[str, ...] = (),
) -> SuiteTask:
    handed = submission or f"{name.upper()}.tsv"
    return SuiteTask(name, "classification", metrics, files, load, handed, labels, folders, "tsv")


TASKS = (
    _task("cola", acceptability, ("matthews",), submission="CoLA.tsv"),
    _task("sst2", columns("sentence", None, "label"), submission="SST-2.tsv", folders=("sst-2",)),
    _task("mrpc", columns("#1 String", "#2 String", "Quality"), ("f1", "accuracy")),
    _task("qqp", columns("question1", "question2", "is_duplicate"), ("f1", "accuracy")),
    SuiteTask(
        "stsb",
        "regression",
        ("pearson", "spearman"),
        TSV,
        columns("sentence1", "sentence2", "score"),
        "STS-B.tsv",
        folders=("sts-b",),
        style="tsv",
    ),
    _task("mnli", columns("sentence1", "sentence2", "gold_label"), labels=NLI, files=MNLI, submission="MNLI-m.tsv"),
    _task("qnli", columns("question", "sentence", "label"), labels=("entailment", "not_entailment")),
    _task("rte", columns("sentence1", "sentence2", "label"), labels=("entailment", "not_entailment")),
    _task("wnli", columns("sentence1", "sentence2", "label")),
)
