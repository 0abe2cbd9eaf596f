"""What the rows look like, and what is wrong with them, before anything is trained."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from danlu.data.cells import left, widest
from danlu.data.clean import Cleaned
from danlu.data.columns import Labelled
from danlu.data.encode import Encoded
from danlu.data.formats import Rows
from danlu.errors import DataError


@dataclass(frozen=True)
class SplitReport:
    """One split. Lengths are tokens after cutting; `truncated` is the share of rows that were cut."""

    rows: int
    sources: tuple[str, ...]
    format: str
    columns: Mapping[str, str]
    labels: Mapping[str, int]
    dropped_empty: int
    dropped_unlabelled: int
    dropped: Mapping[str, int]
    """Other reasons, and how many rows each dropped."""
    duplicates: int | None
    conflicting: int | None
    """Rows whose text stands elsewhere in the split with another label."""
    overlap_with_train: int | None
    """These three are None where the texts of a split are not held in memory: steps of `data.clean` take such rows out."""
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    truncated: float


@dataclass(frozen=True)
class DataReport:
    """Reports by split, and what a person should know before training."""

    splits: Mapping[str, SplitReport]
    max_length: int
    warnings: tuple[str, ...]
    cleaned: Cleaned | None = None
    """What the steps of `data.clean` did before."""
    notes: tuple[str, ...] = ()
    """What was done to the rows, a line each."""
    example: str = ""
    """The first row as the model reads it."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def text(self) -> str:
        """For the terminal."""
        lines = []
        for name, split in self.splits.items():
            columns = ", ".join(f"{role} = {column!r}" for role, column in split.columns.items())
            files = split.sources[0] if len(split.sources) == 1 else f"{len(split.sources)} files, {split.sources[0]} the first"
            lines.append(f"  {name:<6} {files}\n         read as {split.format}; {columns}")
        lines.append("")
        names = list(self.splits)
        table: list[tuple[str, list[str]]] = [
            ("rows", [f"{split.rows:,}" for split in self.splits.values()]),
            ("empty rows dropped", [f"{split.dropped_empty}" for split in self.splits.values()]),
            ("unlabelled dropped", [f"{split.dropped_unlabelled}" for split in self.splits.values()]),
            ("duplicate texts", [_counted(split.duplicates) for split in self.splits.values()]),
            ("  with other labels", [_counted(split.conflicting) for split in self.splits.values()]),
            ("also in train", [_counted(split.overlap_with_train) if name != "train" else "" for name, split in self.splits.items()]),
            ("tokens p50 / p90", [f"{split.length_p50} / {split.length_p90}" for split in self.splits.values()]),
            ("tokens p99 / max", [f"{split.length_p99} / {split.length_max}" for split in self.splits.values()]),
            (f"cut at {self.max_length} tokens", [f"{split.truncated:.1%}" for split in self.splits.values()]),
        ]
        reasons = dict.fromkeys(reason for split in self.splits.values() for reason in split.dropped)
        table[3:3] = [(f"{reason} dropped", [f"{split.dropped.get(reason, 0)}" for split in self.splits.values()]) for reason in reasons]
        for label in next(iter(self.splits.values())).labels:
            table.append((f"label {label}", [f"{split.labels.get(label, 0):,}" for split in self.splits.values()]))
        width = widest(name for name, _ in table)
        lines.append(f"  {'':<{width}} " + " ".join(f"{name:>12}" for name in names))
        lines += [f"  {left(name, width)} " + " ".join(f"{cell:>12}" for cell in cells) for name, cells in table]
        if self.cleaned is not None:
            lines += ["", self.cleaned.text()]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.example:
            lines += ["", "  the first row as the model reads it; it learns what stands between ⟦ and ⟧:", ""]
            lines += [f"    {line}" for line in self.example.split("\n")]
        return "\n".join(lines)


def data_report(
    splits: Mapping[str, tuple[Labelled, Encoded]],
    rows: Mapping[str, Rows],
    *,
    max_length: int,
    notes: Sequence[str] = (),
    example: str = "",
) -> DataReport:
    """Count what there is in each split; `train` has to be one of them."""
    train_texts = {_normal(texts, i) for texts, _ in [splits["train"]] for i in range(len(texts.texts))}
    reports = {name: _split_report(*splits[name], rows[name], train_texts if name != "train" else set()) for name in splits}
    return DataReport(reports, max_length, tuple(_warnings(reports)), notes=tuple(notes), example=example)


def streamed_report(
    train: Encoded,
    labels: Mapping[str, int],
    held: Mapping[str, tuple[Labelled, Encoded]],
    sources: Mapping[str, Sequence[str]],
    *,
    left_out: int | None,
    max_length: int,
) -> DataReport:
    """The report where training rows are in files: their number, labels and lengths, and the whole of what is known of the `held` splits.

    `left_out`: rows without text or label, where a row stays a row.
    """
    lengths = train.lengths
    p50, p90, p99 = (int(value) for value in np.percentile(lengths, [50, 90, 99]))
    dropped = {"rows without text or label": left_out} if left_out else {}
    reports = {
        "train": SplitReport(
            len(train), tuple(sources["train"]), "jsonl", {}, dict(labels), 0, 0, dropped, None, None, None, p50, p90, p99,
            int(lengths.max()), float(train.truncated.mean()),
        )
    }  # fmt: skip
    for name, (texts, encoded) in held.items():
        found = _split_report(texts, encoded, Rows({}, tuple(sources[name]), "jsonl"), set())
        reports[name] = replace(found, overlap_with_train=None)
    notes = ["train: streamed; duplicates and rows that dev and test share are not counted: data.clean's deduplicate_exact leaves them out"]
    return DataReport(reports, max_length, tuple(_warnings(reports)), notes=tuple(notes))


def _counted(number: int | None) -> str:
    return "not counted" if number is None else f"{number}"


def check_labels(
    train: Sequence[str] | Counter[str], others: Mapping[str, Labelled], names: Sequence[str] | None, *, where: str = "data.train"
) -> list[str]:
    """Label names in the order of the model's outputs; DataError if these labels cannot be learned or scored. `train`: labels or counts."""
    counts = Counter(train)
    if names is not None and (unknown := sorted(set(counts) - set(names))):
        raise DataError(
            f"{where} has the label {unknown[0]!r} ({counts[unknown[0]]} rows), which task.labels does not name",
            where="task.labels",
            fix=f"add it, or drop those rows; task.labels is {list(names)}",
        )
    if len(counts) < 2:
        raise DataError(
            f"every row has the same label, {next(iter(counts), '')!r}: there is nothing to tell apart",
            where=where,
            fix="rows of at least two labels; check data.columns.label",
        )
    label_names = list(names) if names is not None else sorted(counts)
    for split, texts in others.items():
        for label, row in zip(texts.labels or [], texts.row_numbers, strict=False):
            if label not in label_names:
                number = (texts.labels or []).count(label)
                raise DataError(
                    f"row {row} has the label {label!r} ({number} row{'s' if number > 1 else ''}), which no training row has; "
                    f"trained labels: {', '.join(label_names)}",
                    where=f"data.{split}",
                    fix="correct the label, drop those rows, or add such rows to data.train",
                )
    return label_names


def _split_report(texts: Labelled, encoded: Encoded, rows: Rows, train_texts: set[tuple[str, str]]) -> SplitReport:
    seen: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for i in range(len(texts.texts)):
        seen[_normal(texts, i)].append((texts.labels or [""] * len(texts.texts))[i])
    lengths = encoded.lengths
    p50, p90, p99 = (int(value) for value in np.percentile(lengths, [50, 90, 99]))
    return SplitReport(
        rows=len(texts.texts),
        sources=rows.sources,
        format=rows.format,
        columns=dict(texts.chosen),
        labels=texts.label_counts if texts.label_counts is not None else dict(sorted(Counter(texts.labels or []).items())),
        dropped_empty=texts.dropped_empty,
        dropped_unlabelled=texts.dropped_unlabelled,
        dropped=texts.dropped,
        duplicates=sum(len(labels) - 1 for labels in seen.values()),
        conflicting=sum(len(labels) for labels in seen.values() if len(set(labels)) > 1),
        overlap_with_train=sum(len(labels) for key, labels in seen.items() if key in train_texts),
        length_p50=p50,
        length_p90=p90,
        length_p99=p99,
        length_max=int(lengths.max()),
        truncated=float(encoded.truncated.mean()),
    )


def _normal(texts: Labelled, index: int) -> tuple[str, str]:
    """What makes two texts the same: words, not case or spacing."""
    pair = texts.pairs[index] if texts.pairs else ""
    return " ".join(texts.texts[index].lower().split()), " ".join(pair.lower().split())


def _warnings(reports: Mapping[str, SplitReport]) -> list[str]:
    found = []
    for name, split in reports.items():
        if split.conflicting:
            found.append(f"{name}: {split.conflicting} rows share their text with a row of another label")
        if split.overlap_with_train:
            share = split.overlap_with_train / split.rows
            found.append(f"{name}: {split.overlap_with_train} rows ({share:.1%}) stand in train too, so its scores flatter")
        if split.truncated > 0.5:
            found.append(f"{name}: {split.truncated:.0%} of the rows are cut at model.max_length")
        dropped = split.dropped_empty + split.dropped_unlabelled
        if dropped:
            found.append(f"{name}: {dropped} rows without text or label were dropped")
        found += [f"{name}: {number} rows were dropped: {reason}" for reason, number in split.dropped.items()]
    train = reports["train"].labels
    if train and max(train.values()) > 20 * min(train.values()):
        small = min(train, key=lambda label: train[label])
        found.append(f"train: label {small!r} has {train[small]} rows, the largest {max(train.values())}: macro F1 says more than accuracy")
    return found
