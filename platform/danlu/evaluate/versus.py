"""Two models on the same rows: what changes, whether that may be chance, and where they disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from danlu.evaluate.analysis import length_bins, score_of
from danlu.evaluate.bootstrap import Difference, McNemar, differences, mcnemar
from danlu.evaluate.calibration import probabilities
from danlu.spec.task import Classification, Task
from danlu.tasks.rows import Split

NUM_EXAMPLES = 30


@dataclass(frozen=True)
class Disagreement:
    """A row that the two answer differently. `row` counts from 1 in its file."""

    row: int
    text: str
    truth: str
    a: str
    a_probability: float
    b: str
    b_probability: float


@dataclass(frozen=True)
class Versus:
    """B beside A. `swings`: by label and length, rows that only A and that only B gets right."""

    a: str
    b: str
    split: str
    rows: int
    differences: Mapping[str, Difference]
    mcnemar: McNemar | None
    agreement: float | None
    swings: Mapping[str, Mapping[str, tuple[int, int]]]
    disagreements: Sequence[Disagreement]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def text(self) -> str:
        """For the terminal."""
        lines = [f"  A {self.a}", f"  B {self.b}", f"  {self.rows:,} rows of the {self.split} split", ""]
        lines.append(f"  {'':<12} {'A':>9} {'B':>9} {'B - A':>9}   95 % interval         p")
        for name, found in self.differences.items():
            interval = f"[{found.low:+.4f}, {found.high:+.4f}]"
            lines.append(f"  {name:<12} {found.a:>9.4f} {found.b:>9.4f} {found.change:>+9.4f}   {interval:<20} {found.p_value:.4f}")
        if self.mcnemar is not None:
            only = f"only A right {self.mcnemar.only_a_right}, only B right {self.mcnemar.only_b_right}"
            lines.append(f"  same answer {self.agreement:.2%}; {only}; McNemar's exact p {self.mcnemar.p_value:.4f}")
        for by, values in self.swings.items():
            lines.append(f"  by {by} (only A right / only B right)")
            lines += [f"    {value}: {one} / {two}" for value, (one, two) in values.items() if one or two]
        for row in self.disagreements[:8]:
            told = f"A {row.a} ({row.a_probability:.2f}), B {row.b} ({row.b_probability:.2f}), truth {row.truth}"
            lines.append(f"  row {row.row}: {told}: {' '.join(row.text.split())[:70]}")
        return "\n".join(lines)


def versus(
    task: Task, split: Split, a: np.ndarray, b: np.ndarray, label_names: Sequence[str], *, names: tuple[str, str], split_name: str
) -> Versus:
    """Compare two models' outputs (float [rows, width]) on the same rows."""
    score_a, score_b = (score_of(task, outputs, split, label_names) for outputs in (a, b))
    changes = differences(score_a, score_b, len(split))
    if not isinstance(task, Classification) or split.labels is None:
        return Versus(*names, split_name, len(split), changes, None, None, {}, [])
    answers_a, answers_b = a.argmax(axis=1), b.argmax(axis=1)
    right_a, right_b = answers_a == split.labels, answers_b == split.labels
    swings = {}
    for by, values in (("label", [label_names[int(i)] for i in split.labels]), ("length in tokens", length_bins(split.encoded.lengths))):
        array = np.asarray(values, dtype=object)
        swings[by] = {
            value: (int((right_a & ~right_b)[array == value].sum()), int((right_b & ~right_a)[array == value].sum()))
            for value in dict.fromkeys(values)
        }
    chances_a, chances_b = probabilities(a), probabilities(b)
    differ = np.flatnonzero(answers_a != answers_b)
    # Those first where one of the two is right, and the two are surest of different things.
    order = sorted(differ, key=lambda i: (-int(right_a[i] or right_b[i]), -float(chances_a[i].max() + chances_b[i].max())))
    rows = [
        Disagreement(
            split.texts.row_numbers[i],
            split.texts.texts[i][:1000],
            label_names[int(split.labels[i])],
            label_names[int(answers_a[i])],
            float(chances_a[i].max()),
            label_names[int(answers_b[i])],
            float(chances_b[i].max()),
        )
        for i in order[:NUM_EXAMPLES]
    ]
    return Versus(
        *names, split_name, len(split), changes, mcnemar(right_a, right_b), float((answers_a == answers_b).mean()), swings, rows
    )  # fmt: skip
