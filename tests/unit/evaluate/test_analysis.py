"""Intervals, calibration, slices and comparisons: each number is one that scipy, scikit-learn or a plain loop gives too."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from danlu.data.columns import Labelled
from danlu.data.encode import Encoded
from danlu.errors import RequestError, ResourceError
from danlu.evaluate.analysis import analyse, length_bins, score_of
from danlu.evaluate.analysis_html import analysis_page, versus_page
from danlu.evaluate.bootstrap import differences, intervals, label_score, mcnemar
from danlu.evaluate.calibration import calibration, fit_temperature, probabilities, scaled
from danlu.evaluate.endpoint import classify
from danlu.evaluate.versus import versus
from danlu.spec.task import Classification, MultiLabelClassification, Pretrain
from danlu.tasks.classification import scores
from danlu.tasks.multi_label import scores as label_set_scores
from danlu.tasks.pretrain import scores as language_scores
from danlu.tasks.rows import Split

NAMES = ["grain", "ship", "trade"]


def made(rows: int, seed: int, sharpness: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels: the more sharpness, the surer and the more often right."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, rows)
    logits = draw.normal(size=(rows, 3)) + sharpness * np.eye(3)[labels]
    return logits.astype(np.float32), labels


def split_of(labels: np.ndarray, seed: int = 0) -> Split:
    lengths = np.random.default_rng(seed).integers(3, 40, len(labels))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    encoded = Encoded(np.zeros(offsets[-1], dtype=np.int32), offsets, np.zeros(len(labels), dtype=bool))
    texts = Labelled([f"text {i}" for i in range(len(labels))], None, [NAMES[i] for i in labels], list(range(1, len(labels) + 1)), {})
    return Split(encoded, labels, texts)


# Bootstrap.


def test_the_metrics_from_counts_are_the_tasks_own() -> None:
    logits, labels = made(200, 0)
    rows = np.random.default_rng(1).integers(0, 200, 200)
    for some in (np.arange(200), rows, rows[labels[rows] != 1]):
        assert label_score(logits, labels)(some) == pytest.approx(
            scores(logits[some], split_of(labels[some]), NAMES, Classification()).metrics()
        )


def test_intervals_are_scipys_percentile_bootstrap() -> None:
    logits, labels = made(300, 2)
    found = intervals(label_score(logits, labels), 300, number=4000)
    right = (logits.argmax(1) == labels).astype(float)
    losses = -np.log(probabilities(logits)[np.arange(300), labels])

    def macro_f1(truth: np.ndarray, answers: np.ndarray) -> float:
        return float(metrics.f1_score(truth, answers, average="macro"))

    for name, data, statistic in (
        ("accuracy", (right,), np.mean),
        ("loss", (losses,), np.mean),
        ("macro_f1", (labels, logits.argmax(1)), macro_f1),
    ):
        number = 600 if name == "macro_f1" else 4000
        theirs = scipy.stats.bootstrap(data, statistic, paired=True, vectorized=False, n_resamples=number, method="percentile", rng=3)
        width = theirs.confidence_interval.high - theirs.confidence_interval.low
        assert found[name].value == pytest.approx(statistic(*data))
        assert found[name].low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * width)
        assert found[name].high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * width)


def test_sets_of_labels_are_resampled_from_counts_too() -> None:
    """Also where a resample has none of a label, none at all, or no answer."""
    draw, task = np.random.default_rng(0), MultiLabelClassification(threshold=0.6)
    logits = draw.normal(size=(80, 3)).astype(np.float32) - np.array([0, 0, 3], dtype=np.float32)
    labels = (draw.random((80, 3)) < (0.5, 0.3, 0.05)).astype(np.float32)
    split = replace(split_of(np.zeros(80, dtype=np.int64)), labels=labels)
    score = score_of(task, logits, split, NAMES)
    nothing = np.flatnonzero(labels.sum(axis=1) == 0)
    for some in (np.arange(80), draw.integers(0, 80, 80), np.flatnonzero(labels[:, 2] == 0), nothing, nothing[:1]):
        assert score(some) == pytest.approx(
            label_set_scores(logits[some], replace(split, labels=labels[some]), NAMES, task).metrics(), abs=1e-6
        )


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        right = np.random.default_rng(seed).random(150) < 0.8
        found = intervals(lambda rows, right=right: {"accuracy": float(right[rows].mean())}, 150, number=300, seed=seed)["accuracy"]
        held += found.low <= 0.8 <= found.high
    assert 0.89 <= held / 200 <= 0.99  # 0.95, with a standard deviation of 0.015


def test_a_tasks_own_scores_are_resampled_too() -> None:
    outputs = np.stack([np.random.default_rng(0).gamma(4, 2, 50), np.full(50, 7.0)], axis=1).astype(np.float32)
    split = split_of(np.zeros(50, dtype=np.int64))
    found = intervals(score_of(Pretrain(), outputs, split, []), 50, number=200)
    assert found["loss"].value == pytest.approx(language_scores(outputs, split, [], Pretrain()).loss)
    assert found["loss"].low < found["loss"].value < found["loss"].high


# Two models.


@pytest.mark.parametrize(("only_a", "only_b", "both"), [(10, 3, 40), (3, 10, 0), (5, 5, 9), (0, 0, 8), (200, 260, 1000), (0, 7, 1)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, both: int) -> None:
    right_a = np.array([True] * only_a + [False] * only_b + [True] * both)
    right_b = np.array([False] * only_a + [True] * only_b + [True] * both)
    found = mcnemar(right_a, right_b)
    assert (found.only_a_right, found.only_b_right, found.both_right, found.both_wrong) == (only_a, only_b, both, 0)
    expected = scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert found.p_value == pytest.approx(expected)


def test_differences_are_paired() -> None:
    logits, labels = made(300, 4)
    better = logits + np.float32(0.6) * np.eye(3, dtype=np.float32)[labels]
    found = differences(label_score(logits, labels), label_score(better, labels), 300)
    draw = np.random.default_rng(17)
    changes = []
    for _ in range(1000):
        rows = draw.integers(0, 300, 300, dtype=np.int64)
        one, two = (metrics.accuracy_score(labels[rows], outputs[rows].argmax(1)) for outputs in (logits, better))
        changes.append(two - one)
    assert (found["accuracy"].low, found["accuracy"].high) == pytest.approx(tuple(np.percentile(changes, [2.5, 97.5])))
    assert found["accuracy"].p_value < 0.01
    both = intervals(label_score(logits, labels), 300)["accuracy"]
    assert found["accuracy"].high - found["accuracy"].low < both.high - both.low, "the same rows on both sides: less noise"
    same = differences(label_score(logits, labels), label_score(logits, labels), 300, number=50)
    assert (same["accuracy"].change, same["accuracy"].p_value) == (0.0, 1.0)


def test_a_comparison_shows_where_two_models_disagree() -> None:
    logits, labels = made(120, 5)
    other, _ = made(120, 6)
    split = split_of(labels)
    found = versus(Classification(), split, logits, other, NAMES, names=("a@v1", "b@v1"), split_name="test")
    right_a, right_b = logits.argmax(1) == labels, other.argmax(1) == labels
    assert found.agreement == metrics.accuracy_score(logits.argmax(1), other.argmax(1))
    assert found.mcnemar is not None
    assert found.mcnemar.only_a_right == (right_a & ~right_b).sum()
    for label, (one, two) in found.swings["label"].items():
        of = labels == NAMES.index(label)
        assert (one, two) == ((right_a & ~right_b & of).sum(), (right_b & ~right_a & of).sum())
    first = found.disagreements[0]
    i = first.row - 1
    assert (first.a, first.b, first.truth) == (NAMES[logits[i].argmax()], NAMES[other[i].argmax()], NAMES[labels[i]])
    assert first.a != first.b
    assert first.truth in (first.a, first.b)
    assert "McNemar's exact two-sided p" in versus_page(found)
    assert "a@v1" in found.text()
    json.dumps(found.to_dict())


# Calibration.


def test_calibration_errors_are_those_of_a_plain_loop_and_of_scikit_learn() -> None:
    logits, labels = made(500, 7)
    found = calibration(logits, labels, num_bins=10)
    chances = probabilities(logits)
    gaps, weights = [], []
    for i in range(10):
        rows = [r for r in range(500) if i / 10 < chances[r].max() <= (i + 1) / 10]
        if rows:
            right = sum(chances[r].argmax() == labels[r] for r in rows) / len(rows)
            gaps.append(abs(right - sum(chances[r].max() for r in rows) / len(rows)))
            weights.append(len(rows) / 500)
    assert found.ece == pytest.approx(sum(gap * weight for gap, weight in zip(gaps, weights, strict=True)))
    assert found.mce == pytest.approx(max(gaps))
    assert found.brier == pytest.approx(metrics.brier_score_loss(labels, chances, labels=[0, 1, 2], scale_by_half=False))
    assert found.loss == pytest.approx(metrics.log_loss(labels, chances))
    assert sum(one.rows for one in found.bins) == 500


def test_the_temperature_is_the_best_of_a_grid_and_mends_what_it_was_not_fitted_on() -> None:
    logits, labels = made(1500, 8)
    too_sure = 8 * logits
    found = fit_temperature(too_sure[:1000], labels[:1000])
    grid = np.exp(np.linspace(np.log(0.5), np.log(19), 400))
    losses = [metrics.log_loss(labels[:1000], probabilities(too_sure[:1000] / t)) for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)
    fix = scaled(too_sure[1000:], labels[1000:], found, "dev")
    assert fix.after.ece < 0.6 * fix.before.ece
    assert fix.after.loss < fix.before.loss
    assert (probabilities(too_sure / found).argmax(1) == too_sure.argmax(1)).all()


# Slices and the page.


def test_slices_are_the_scores_of_their_rows() -> None:
    logits, labels = made(160, 9)
    split = split_of(labels)
    kinds = [["short", "long", "odd"][i % 3] for i in range(160)]
    found = analyse(Classification(), split, logits, NAMES, name="test", columns={"kind": kinds}, temperature=(1.5, "dev"), number=100)
    by = {(one.by, one.value): one for one in found.slices}
    for kind in set(kinds):
        rows = [i for i in range(160) if kinds[i] == kind]
        one = by["kind", kind]
        assert one.rows == len(rows)
        assert one.metrics["accuracy"].value == metrics.accuracy_score(labels[rows], logits[rows].argmax(1))
        assert one.metrics["accuracy"].low <= one.metrics["accuracy"].value <= one.metrics["accuracy"].high
    for name in NAMES:
        rows = np.flatnonzero(labels == NAMES.index(name))
        assert by["label", name].metrics["accuracy"].value == metrics.recall_score(
            labels, logits.argmax(1), labels=[NAMES.index(name)], average="macro"
        )
    lengths = [one for one in found.slices if one.by == "length in tokens"]
    assert sum(one.rows for one in lengths) == 160
    assert len(lengths) == 4
    wrong = logits.argmax(1) != labels
    assert len(found.mistakes) == min(50, wrong.sum())
    surest = found.mistakes[0]
    assert surest.probability == pytest.approx(probabilities(logits).max(1)[wrong].max())
    assert (surest.truth, surest.text) == (NAMES[labels[surest.row - 1]], f"text {surest.row - 1}")
    json.dumps(found.to_dict())
    html = analysis_page("<i>topics</i>", found, {"bundle": "topics@v1"})
    assert re.findall(r'<svg[^>]*aria-label="([^"]*)"', html) == ["Reliability: As trained", "Reliability: Logits divided by 1.500"]
    assert not re.search(r"https?:|<script|<link|<img", html)
    assert "&lt;i&gt;topics" in html
    assert "by kind" in found.text()


def test_lengths_fall_into_quarters() -> None:
    lengths = np.arange(1, 101)
    assert sorted(set(length_bins(lengths)), key=lambda name: int(name.split("-")[0])) == ["1-25", "26-50", "51-75", "76-100"]
    assert set(length_bins(np.full(10, 7))) == {"7-7"}


# Endpoints.


class Endpoint(BaseHTTPRequestHandler):
    """Answers like /v1/classify, busy at every third request."""

    chances: np.ndarray
    labels = ["trade", "grain", "ship"]
    asked = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        Endpoint.asked += 1
        if self.headers.get("authorization") == "Bearer wrong":
            self._answer(401, {"error": {"message": "no such key"}})
        elif Endpoint.asked % 3 == 0:
            self._answer(503, {"error": {"message": "busy"}}, {"retry-after": "0"})
        else:
            order = [NAMES.index(name) for name in self.labels]
            rows = [int((item["text"] if isinstance(item, dict) else item).split()[1]) for item in body["input"]]
            self._answer(200, {"labels": self.labels, "data": [{"probs": [float(p) for p in self.chances[row][order]]} for row in rows]})

    def _answer(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoints_answers_have_the_metrics_of_the_model_behind_it(endpoint: str) -> None:
    logits, labels = made(100, 10)
    Endpoint.chances = probabilities(logits)
    split = split_of(labels)
    outputs, seconds = classify(endpoint, split.texts, NAMES, batch=16)
    assert scores(outputs, split, NAMES, Classification()).metrics() == pytest.approx(
        scores(logits, split, NAMES, Classification()).metrics(), abs=1e-5
    )
    assert scores(outputs, split, NAMES, Classification()).confusion == scores(logits, split, NAMES, Classification()).confusion
    assert seconds > 0
    with pytest.raises(RequestError, match="answers 401"):
        classify(endpoint, split.texts, NAMES, api_key="wrong")
    with pytest.raises(RequestError, match="the endpoint's labels are"):
        classify(endpoint, split.texts, ["a", "b", "c"])


def test_an_endpoint_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="does not answer"):
        classify("http://127.0.0.1:9", split_of(np.array([0, 1])).texts, NAMES)
