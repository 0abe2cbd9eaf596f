"""Score a predictor on a split, and measure what a smaller version costs and gains."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from danlu.spec.task import Preference, Task
from danlu.tasks.exchange import Embedding, Value, largest_change
from danlu.tasks.judge import LanguageJudge
from danlu.tasks.predictor import Predictor
from danlu.tasks.rows import Scored, Split


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split, what they were made of (float32 [sequences or tokens, width]; a classifier's logits) and how long that took."""

    scores: Scored
    outputs: np.ndarray
    seconds: float

    @property
    def rows_per_second(self) -> float:
        return self.scores.num_rows / self.seconds


@dataclass(frozen=True)
class Delta:
    """A compressed version beside its original, on the same rows. Speed ratios are medians of interleaved runs: of scoring rows, or of a
    language model making tokens, as `unit` says."""

    name: str
    original: dict[str, float]
    compressed: dict[str, float]
    agreement: float | None
    """Share of rows with the same answer; None where answers are numbers alone."""
    largest_probability_change: float
    """Of a language model, of the mean (geometric) probability of a row's tokens."""
    rate_original: float
    rate: float
    speedup: float
    speedup_min: float
    speedup_max: float
    runs: int
    bytes_original: int
    bytes: int
    num_rows: int
    split: str
    unit: str = "rows a second"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def text(self) -> str:
        """A table for the terminal."""
        lines = [f"  {'on the ' + self.split + ' split':<24} {'original':>12} {self.name:>12} {'change':>12}"]
        for metric, before in self.original.items():
            after = self.compressed[metric]
            lines.append(f"  {metric:<24} {before:>12.4f} {after:>12.4f} {after - before:>+12.4f}")
        if self.agreement is not None:
            lines.append(f"  {'same answer':<24} {'':>12} {self.agreement:>12.2%} {'':>12}")
        lines.append(f"  {'largest prob. change':<24} {'':>12} {self.largest_probability_change:>12.4f} {'':>12}")
        spread = f"{self.speedup_min:.2f}-{self.speedup_max:.2f}"
        lines.append(
            f"  {self.unit:<24} {self.rate_original:>12.0f} {self.rate:>12.0f} {self.speedup:>11.2f}x"
            f"  ({spread} over {self.runs} interleaved runs)"
        )
        ratio = self.bytes_original / self.bytes
        lines.append(f"  {'MB of weights':<24} {self.bytes_original / 1e6:>12.1f} {self.bytes / 1e6:>12.1f} {ratio:>11.2f}x smaller")
        return "\n".join(lines)


@dataclass(frozen=True)
class Race:
    """Two models in turns: what each run made, how much of it, and its seconds, the original's first."""

    unit: str
    number: int
    seconds: list[tuple[float, float]]


def evaluate(judge: Predictor | LanguageJudge, split: Split, *, batch_tokens: int = 1024) -> Evaluation:
    """Score every row of a split."""
    began = time.perf_counter()
    if isinstance(judge, LanguageJudge):
        outputs = judge.outputs(split, batch_tokens=batch_tokens)
    else:
        outputs = judge.outputs(split.encoded, batch_tokens=batch_tokens)
    found = judge.scores(outputs, split)
    return Evaluation(found, outputs, time.perf_counter() - began)


def compare(
    original: Predictor | LanguageJudge,
    compressed: Predictor | LanguageJudge,
    split: Split,
    *,
    name: str,
    split_name: str,
    bytes_original: int,
    bytes_compressed: int,
    before: Evaluation | None = None,
    race: Race | None = None,
    speed_rows: int = 256,
    runs: int = 5,
    batch_tokens: int = 1024,
) -> Delta:
    """Both on every row for quality; for speed, unless a `race` has been run, both in turns on `speed_rows` evenly spaced rows, `runs`
    times."""
    before = before or evaluate(original, split, batch_tokens=batch_tokens)
    after = evaluate(compressed, split, batch_tokens=batch_tokens)
    if isinstance(original, Predictor) and isinstance(compressed, Predictor):
        one, other = (original.predictions(found.outputs, split.encoded, split.examples) for found in (before, after))
        answers = list(zip(one, other, strict=True))
        agreement = None if isinstance(answers[0][0], Value | Embedding) else float(np.mean([a.label == b.label for a, b in answers]))
        change = max(largest_change(a.probabilities, b.probabilities) for a, b in answers)
        race = race or _score_rows(original, compressed, split, speed_rows, runs, batch_tokens)
    else:
        mine, theirs = (_token_probabilities(found.outputs, original.task) for found in (before, after))
        agreement, change = None, float(np.abs(mine - theirs).max())
    assert race is not None, "of language models rows are not what counts"
    ratios = [one / other for one, other in race.seconds]
    return Delta(
        name=name,
        original=dict(before.scores.metrics()),
        compressed=dict(after.scores.metrics()),
        agreement=agreement,
        largest_probability_change=change,
        rate_original=race.number / median(one for one, _ in race.seconds),
        rate=race.number / median(other for _, other in race.seconds),
        speedup=median(ratios),
        speedup_min=min(ratios),
        speedup_max=max(ratios),
        runs=len(race.seconds),
        bytes_original=bytes_original,
        bytes=bytes_compressed,
        num_rows=len(split),
        split=split_name,
        unit=race.unit,
    )


def _score_rows(original: Predictor, compressed: Predictor, split: Split, rows: int, runs: int, batch_tokens: int) -> Race:
    sample = split.encoded.take(np.linspace(0, len(split) - 1, min(rows, len(split))).astype(int))
    times: list[tuple[float, float]] = []
    for _ in range(runs):
        pair = []
        for predictor in (original, compressed):
            began = time.perf_counter()
            predictor.outputs(sample, batch_tokens=batch_tokens)
            pair.append(time.perf_counter() - began)
        times.append((pair[0], pair[1]))
    return Race("rows a second", len(sample), times)


def _token_probabilities(outputs: np.ndarray, task: Task) -> np.ndarray:
    """Each row's, of what a language task's `row_outputs` are."""
    is_pair = isinstance(task, Preference)
    found: np.ndarray = np.exp(outputs[:, :2] / outputs[:, 2:4].clip(1) if is_pair else -outputs[:, 0] / outputs[:, -1].clip(1))
    return found


def scores_text(found: Scored) -> str:
    """Scores for the terminal."""
    return found.text()
