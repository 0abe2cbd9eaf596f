"""Score a predictor on a split, and measure what a smaller version costs and gains."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from danlu.tasks.classification import Predictor, Scores, predictions
from danlu.tasks.classification import scores as label_scores
from danlu.tasks.judge import LanguageJudge
from danlu.tasks.pretrain import LanguageScores
from danlu.tasks.rows import Scored, Split


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split, what they were made of (float32 [rows, width]; a classifier's logits) and how long that took."""

    scores: Scored
    outputs: np.ndarray
    seconds: float

    @property
    def rows_per_second(self) -> float:
        return len(self.outputs) / self.seconds


@dataclass(frozen=True)
class Delta:
    """A compressed version beside its original, on the same rows. Speed ratios are medians of interleaved runs."""

    name: str
    original: dict[str, float]
    compressed: dict[str, float]
    agreement: float
    """Share of rows with the same label."""
    largest_probability_change: float
    rows_per_second_original: float
    rows_per_second: float
    speedup: float
    speedup_min: float
    speedup_max: float
    runs: int
    bytes_original: int
    bytes: int
    num_rows: int
    split: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def text(self) -> str:
        """A table for the terminal."""
        lines = [f"  {'on the ' + self.split + ' split':<24} {'original':>12} {self.name:>12} {'change':>12}"]
        for metric, before in self.original.items():
            after = self.compressed[metric]
            lines.append(f"  {metric:<24} {before:>12.4f} {after:>12.4f} {after - before:>+12.4f}")
        lines.append(f"  {'same label':<24} {'':>12} {self.agreement:>12.2%} {'':>12}")
        lines.append(f"  {'largest prob. change':<24} {'':>12} {self.largest_probability_change:>12.4f} {'':>12}")
        spread = f"{self.speedup_min:.2f}-{self.speedup_max:.2f}"
        lines.append(
            f"  {'rows a second':<24} {self.rows_per_second_original:>12.0f} {self.rows_per_second:>12.0f} {self.speedup:>11.2f}x"
            f"  ({spread} over {self.runs} interleaved runs)"
        )
        ratio = self.bytes_original / self.bytes
        lines.append(f"  {'MB of weights':<24} {self.bytes_original / 1e6:>12.1f} {self.bytes / 1e6:>12.1f} {ratio:>11.2f}x smaller")
        return "\n".join(lines)


def evaluate(judge: Predictor | LanguageJudge, split: Split, *, batch_tokens: int = 2048) -> Evaluation:
    """Score every row of a split."""
    began = time.perf_counter()
    if isinstance(judge, LanguageJudge):
        outputs = judge.outputs(split, batch_tokens=batch_tokens)
        return Evaluation(judge.scores(outputs, split), outputs, time.perf_counter() - began)
    outputs = judge.outputs(split.encoded, batch_tokens=batch_tokens)
    return Evaluation(label_scores(outputs, split.labels, judge.label_names), outputs, time.perf_counter() - began)


def compare(
    original: Predictor,
    compressed: Predictor,
    split: Split,
    *,
    name: str,
    split_name: str,
    bytes_original: int,
    bytes_compressed: int,
    before: Evaluation | None = None,
    speed_rows: int = 256,
    runs: int = 5,
    batch_tokens: int = 2048,
) -> Delta:
    """Both on every row for quality; for speed, both in turns on `speed_rows` evenly spaced rows, `runs` times."""
    before = before or evaluate(original, split, batch_tokens=batch_tokens)
    after = evaluate(compressed, split, batch_tokens=batch_tokens)
    sample = split.encoded.take(np.linspace(0, len(split) - 1, min(speed_rows, len(split))).astype(int))
    times: list[tuple[float, float]] = []
    for _ in range(runs):
        pair = []
        for predictor in (original, compressed):
            began = time.perf_counter()
            predictor.logits(sample, batch_tokens=batch_tokens)
            pair.append(time.perf_counter() - began)
        times.append((pair[0], pair[1]))
    ratios = [one / other for one, other in times]
    changes = [
        np.abs(np.subtract(a.probabilities, b.probabilities)).max()
        for a, b in zip(predictions(before.outputs, original.label_names), predictions(after.outputs, original.label_names), strict=True)
    ]
    return Delta(
        name=name,
        original=dict(before.scores.metrics()),
        compressed=dict(after.scores.metrics()),
        agreement=float((before.outputs.argmax(1) == after.outputs.argmax(1)).mean()),
        largest_probability_change=float(max(changes)),
        rows_per_second_original=len(sample) / median(one for one, _ in times),
        rows_per_second=len(sample) / median(other for _, other in times),
        speedup=median(ratios),
        speedup_min=min(ratios),
        speedup_max=max(ratios),
        runs=runs,
        bytes_original=bytes_original,
        bytes=bytes_compressed,
        num_rows=len(split),
        split=split_name,
    )


def scores_text(found: Scored) -> str:
    """Scores for the terminal; a classifier's with per-class table and confusion matrix."""
    if isinstance(found, LanguageScores):
        size = f"tokens {found.num_tokens:,}   rows {found.num_rows:,}"
        return f"  loss {found.loss:.4f} nats a token   perplexity {found.perplexity:.3f}   {size}"
    if not isinstance(found, Scores):
        numbers = "   ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.metrics().items())
        return f"  {numbers}   rows {found.num_rows:,}"
    width = max(len(name) for name in found.per_class)
    lines = [f"  accuracy {found.accuracy:.4f}   macro F1 {found.macro_f1:.4f}   loss {found.loss:.4f}   rows {found.num_rows}", ""]
    lines.append(f"  {'':<{width}} precision    recall        f1   rows")
    for name, row in found.per_class.items():
        lines.append(f"  {name:<{width}} {row['precision']:>9.4f} {row['recall']:>9.4f} {row['f1']:>9.4f} {int(row['support']):>6}")
    lines += ["", f"  {'truth / answer':<{width}} " + " ".join(f"{name[:7]:>7}" for name in found.per_class)]
    for name, counts in zip(found.per_class, found.confusion, strict=True):
        lines.append(f"  {name:<{width}} " + " ".join(f"{count or '.':>7}" for count in counts))
    return "\n".join(lines)
