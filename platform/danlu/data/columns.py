"""Which column holds what; rows without it are dropped and counted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from danlu.data.formats import Rows
from danlu.errors import DataError
from danlu.spec.data import Columns

USUAL = {
    "text": (
        "text",
        "sentence",
        "sentence1",
        "text_a",
        "premise",
        "content",
        "document",
        "review",
        "comment",
        "body",
        "query",
        "question",
        "title",
    ),
    "text_pair": ("text_pair", "sentence2", "text_b", "hypothesis", "pair", "answer_text"),
    "label": ("label", "labels", "class", "category", "target", "intent", "sentiment", "topic", "y"),
}


@dataclass(frozen=True)
class Labelled:
    """Texts and labels of the rows that have both. `row_numbers` are 1-based in the source; `chosen` is role -> column.

    A classifier's labels are strings; other tasks' are what their file says. `label_counts` is for the report, where that does not count
    whole labels; `dropped` is reason -> rows, besides those without text or label.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any] | None
    row_numbers: list[int]
    chosen: Mapping[str, str]
    dropped_empty: int = 0
    dropped_unlabelled: int = 0
    label_counts: Mapping[str, int] | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)

    def take(self, rows: Sequence[int] | np.ndarray) -> Labelled:
        """The named rows, in that order; what was dropped stays counted with the whole."""
        indices = [int(row) for row in rows]
        return Labelled(
            [self.texts[i] for i in indices],
            None if self.pairs is None else [self.pairs[i] for i in indices],
            None if self.labels is None else [self.labels[i] for i in indices],
            [self.row_numbers[i] for i in indices],
            self.chosen,
        )


def labelled(
    rows: Rows,
    columns: Columns,
    *,
    where: str,
    need_label: bool = True,
    read_label: Callable[[object, int], Any] | None = None,
    usual: Mapping[str, Sequence[str]] = USUAL,
) -> Labelled:
    """Find the columns, turn labels into strings, drop rows without text or label. DataError if too little is left.

    `read_label(value, row number)` makes other labels: None where there is none.
    """
    chosen = choose(rows, columns, usual, ("text", "label") if need_label else ("text",), where)
    if not need_label and columns.label is None:
        chosen.pop("label", None)
    read = read_label or _one_label(where)
    texts = [as_text(value) for value in rows.columns[chosen["text"]]]
    pairs = [as_text(value) for value in rows.columns[chosen["text_pair"]]] if "text_pair" in chosen else None
    labels = [read(value, i) for i, value in enumerate(rows.columns[chosen["label"]], 1)] if "label" in chosen else None
    empty = [is_empty(text) or (pairs is not None and is_empty(pairs[i])) for i, text in enumerate(texts)]
    unlabelled = [labels is not None and labels[i] in (None, "") and not empty[i] for i in range(len(texts))]
    kept = [i for i in range(len(texts)) if not empty[i] and not unlabelled[i]]
    if len(kept) <= len(texts) / 2:
        raise DataError(
            f"{sum(empty)} of {len(texts)} rows have no text and {sum(unlabelled)} no label: too few are left{_not_text(rows, chosen)}",
            where=where,
            fix=f"check that {chosen} are the right columns; data.columns.text and data.columns.label set them",
        )
    return Labelled(
        [texts[i] for i in kept],
        None if pairs is None else [pairs[i] for i in kept],
        None if labels is None else [labels[i] for i in kept],
        [i + 1 for i in kept],
        chosen,
        sum(empty),
        sum(unlabelled),
    )


def _not_text(rows: Rows, chosen: Mapping[str, str]) -> str:
    """The first row whose text or label is no single value."""
    for role, name in chosen.items():
        for number, value in enumerate(rows.columns[name], start=1):
            if isinstance(value, list | tuple | dict):
                return f" (the {role} of row {number} is {'an object' if isinstance(value, dict) else 'a list'})"
    return ""


def choose(rows: Rows, columns: Columns, usual: Mapping[str, Sequence[str]], needed: Sequence[str], where: str) -> dict[str, str]:
    """role -> column, by what `columns` names and else by the usual names. DataError if a `needed` role has none."""
    named = {role: name for role in usual if isinstance(name := getattr(columns, role), str)}
    for role, name in named.items():
        if name not in rows.columns:
            near = difflib.get_close_matches(name, list(rows.columns), n=1)
            raise DataError(
                f"{where} has no column {name!r}; it has {', '.join(map(repr, rows.columns))}",
                where=f"data.columns.{role}",
                fix=f"did you mean {near[0]!r}?" if near else "one of those",
            )
        if other := next((role_ for role_, name_ in named.items() if name_ == name and role_ != role), None):
            raise DataError(
                f"the column {name!r} is named as {role} and as {other}",
                where=f"data.columns.{role}",
                fix=f"a column of its own for each; {where} has {', '.join(map(repr, rows.columns))}",
            )
    chosen = dict(named)
    free = [name for name in rows.columns if name not in chosen.values()]
    if "label" in usual and "label" not in chosen and rows.label_column is not None:
        chosen["label"] = rows.label_column
        free = [name for name in free if name != rows.label_column]
    for role, names in usual.items():
        if role not in chosen and (found := _usual(free, names)) is not None:
            chosen[role] = found
            free.remove(found)
    if "text" in needed and "text" not in chosen and len(free) == 1:
        chosen["text"] = free.pop()
    if "label" in needed and "label" not in chosen and len(free) == 1 and len(rows.columns) == 2:
        chosen["label"] = free.pop()
    for role in needed:
        if role not in chosen:
            raise DataError(
                f"{where}: which of the columns {', '.join(map(repr, rows.columns))} is the {role}?",
                where=f"data.columns.{role}",
                fix=f"data.columns: {{{role}: NAME}}",
            )
    return {role: chosen[role] for role in usual if role in chosen}


def _usual(names: Sequence[str], usual: Sequence[str]) -> str | None:
    lowered = {name.lower(): name for name in names}
    return next((lowered[name] for name in usual if name in lowered), None)


def is_missing(value: object) -> bool:
    """True for what stands where there is no value: None, and pandas' NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(text: str) -> bool:
    """True if there is nothing to see: no character, or spaces, control signs and signs of no width only."""
    return not any(character.isprintable() and character != " " for character in text)


def as_text(value: object) -> str:
    """A cell as text, empty where there is none. A list or an object is no text: its Python form is nothing to learn from."""
    return "" if is_missing(value) or isinstance(value, list | tuple | dict) else str(value)


def enough(kept: Sequence[object], dropped: Mapping[str, int], chosen: Mapping[str, str], where: str) -> None:
    """DataError if not more than half of the rows are left."""
    if len(kept) <= sum(dropped.values()):
        told = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
        raise DataError(
            f"of {len(kept) + sum(dropped.values())} rows too few are left: {told or 'there are none'}",
            where=where,
            fix=f"check that {dict(chosen)} are the right columns; data.columns sets them",
        )


def as_label(value: object) -> str:
    """A cell as a label's name, empty where there is none, or a list or an object."""
    if is_missing(value) or isinstance(value, list | tuple | dict):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # 3.0 where a missing value made a column of integers floating
    return str(value).strip()


def _one_label(where: str) -> Callable[[object, int], str]:
    def read(value: object, row: int) -> str:
        if isinstance(value, list | tuple):
            raise DataError(
                f"row {row} has {type(value).__name__} {str(value)[:60]} for a label; task.kind=classification takes one label a row",
                where=where,
                fix="task.kind=multi_label_classification for lists of labels, or another data.columns.label",
            )
        return as_label(value)

    return read
