"""An evaluation is its logits scored; a comparison counts what changed and how fast each was."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows, split_of
from sklearn import metrics

from danlu.data.columns import Labelled
from danlu.evaluate.score import Evaluation, compare, evaluate, scores_text
from danlu.spec.task import Classification
from danlu.tasks.classification import Split, build_model, scores
from danlu.tasks.exchange import Text
from danlu.tasks.packed import PackedClassifier
from danlu.tasks.predictor import Predictor
from danlu.tasks.tokenizer import load_tokenizer

NAMES = ["grain", "ship", "trade"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than such small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def predictor(tiny_model: Path) -> Predictor:
    torch.manual_seed(1)
    model = build_model(tiny_model, NAMES)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    return Predictor(PackedClassifier(model), load_tokenizer(tiny_model), NAMES, max_length=16)


@pytest.fixture
def split(predictor: Predictor) -> Split:
    rows = make_rows(60, 4)
    texts = [row["text"] for row in rows]
    labels = np.array([NAMES.index(row["label"]) for row in rows])
    return Split(
        predictor.encode(texts),
        labels,
        Labelled(texts, None, [row["label"] for row in rows], list(range(1, 61)), {}),
        [Text(text) for text in texts],
    )


def changed(predictor: Predictor, by: float) -> Predictor:
    """The same predictor with a shifted first label."""
    model = copy.deepcopy(predictor.model)
    with torch.no_grad():
        model.model.classifier.bias[0] += by
    return Predictor(model, predictor.tokenizer, predictor.label_names, max_length=predictor.max_length)


class Slower(Predictor):
    """Takes its time over every batch."""

    def forward(self, batch):  # type: ignore[no-untyped-def]
        until = time.perf_counter() + 0.01
        while time.perf_counter() < until:
            pass
        return super().forward(batch)


def test_an_evaluation_scores_every_row(predictor: Predictor, split: Split) -> None:
    found = evaluate(predictor, split)
    texts = split.texts.texts
    answers = [NAMES.index(answer.label) for answer in predictor.predict(texts)]
    assert found.scores.accuracy == metrics.accuracy_score(split.labels, answers)
    assert found.scores.confusion == metrics.confusion_matrix(split.labels, answers).tolist()
    assert found.outputs.shape == (60, 3)
    assert found.rows_per_second == 60 / found.seconds > 0
    np.testing.assert_allclose(evaluate(predictor, split, batch_tokens=1).outputs, found.outputs, atol=1e-5)


def test_a_comparison_counts_what_changed(predictor: Predictor, split: Split) -> None:
    other = changed(predictor, 0.7)
    delta = compare(predictor, other, split, name="int8", split_name="test", bytes_original=4000, bytes_compressed=1000, runs=3)
    before, after = predictor.outputs(split.encoded), other.outputs(split.encoded)
    agreement = metrics.accuracy_score(before.argmax(1), after.argmax(1))
    assert 0 < agreement < 1
    assert delta.agreement == agreement
    change = (torch.from_numpy(before).softmax(-1) - torch.from_numpy(after).softmax(-1)).abs().max()
    assert delta.largest_probability_change == pytest.approx(float(change), abs=1e-6)
    assert delta.original == scores(before, split, NAMES, Classification()).metrics()
    assert delta.compressed == scores(after, split, NAMES, Classification()).metrics()
    assert (delta.num_rows, delta.runs, delta.split, delta.bytes_original, delta.bytes) == (60, 3, "test", 4000, 1000)
    assert 0 < delta.speedup_min <= delta.speedup <= delta.speedup_max
    text = delta.text()
    assert f"{delta.compressed['accuracy'] - delta.original['accuracy']:+.4f}" in text
    assert f"{agreement:.2%}" in text
    assert "4.00x smaller" in text
    assert "over 3 interleaved runs" in text


def test_the_same_model_changes_nothing(predictor: Predictor, split: Split) -> None:
    delta = compare(predictor, predictor, split, name="same", split_name="dev", bytes_original=1, bytes_compressed=1, runs=1)
    assert (delta.agreement, delta.largest_probability_change) == (1.0, 0.0)
    assert delta.original == delta.compressed


def test_a_faster_version_is_seen_as_faster(predictor: Predictor, split: Split) -> None:
    slow = Slower(predictor.model, predictor.tokenizer, NAMES, max_length=16)
    delta = compare(slow, predictor, split, name="fast", split_name="dev", bytes_original=1, bytes_compressed=1, batch_tokens=128, runs=3)
    assert delta.speedup > 1.2
    assert delta.rate > delta.rate_original


def test_an_evaluation_at_hand_is_not_made_again(predictor: Predictor, split: Split) -> None:
    before = evaluate(predictor, split)
    marked = Evaluation(before.scores, -before.outputs, 1.0)
    delta = compare(
        predictor, predictor, split, name="x", split_name="dev", bytes_original=1, bytes_compressed=1, before=marked, runs=1
    )  # fmt: skip
    assert delta.agreement == metrics.accuracy_score((-before.outputs).argmax(1), before.outputs.argmax(1))


def test_the_text_has_every_label_and_count() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 2, 2]]
    text = scores_text(scores(logits, split_of([0, 1, 1, 2, 2, 0]), ["a", "中文", "c"], Classification()))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:2] == ["accuracy", "0.6667"]
    assert ["中文", "1.0000", "0.5000", "0.6667", "2"] in lines
    assert ["a", "1", ".", "1"] in lines
    assert ["中文", "1", "1", "."] in lines
