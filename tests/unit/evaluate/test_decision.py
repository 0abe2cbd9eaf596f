"""Calibrated probabilities, answers by their cost, and words that explain them: from the job to the endpoint, beside plain formulas."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas
import pytest
import torch
from conftest import make_rows
from sklearn.metrics import confusion_matrix
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from danlu import sdk
from danlu.artifact.bundle import Bundle
from danlu.cli import app
from danlu.errors import DataError, SpecError
from danlu.evaluate.calibration import calibration, fit_temperature
from danlu.evaluate.cost import decided
from danlu.evaluate.explain import explain
from danlu.serve.engines.encoder import EncoderEngine
from danlu.serve.gateway import Gateway
from danlu.spec.files import dump
from danlu.spec.serve import Encoder, Limits
from danlu.spec.task import Classification, Decision
from danlu.spec.train import TrainJob
from danlu.tasks.decision import choose_threshold, cost_matrix, decide, expected_threshold
from danlu.tasks.exchange import Text
from danlu.tasks.predictor import Predictor
from danlu.tasks.tokenizer import load_tokenizer

COSTS = {"bad": {"good": 10.0}, "good": {"bad": 1.0}}
LABELS = ["bad", "good"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noisy_rows(number: int, seed: int) -> list[dict[str, str]]:
    """Texts on ships are bad, but for every fourth row, whatever it says: a model that learns these by heart is too sure."""
    draw = random.Random(seed)
    rows = []
    for row in make_rows(number, seed):
        bad = row["label"] == "ship"
        rows.append({"text": row["text"], "label": "bad" if bad != (draw.random() < 0.25) else "good"})
    return rows


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    folder = tmp_path_factory.mktemp("decision")
    for name, number, seed in (("train", 150, 1), ("dev", 120, 2), ("test", 150, 3)):
        pandas.DataFrame(noisy_rows(number, seed)).to_csv(folder / f"{name}.csv", index=False)
    document = {
        "name": "risk",
        "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
        "data": {**{name: str(folder / f"{name}.csv") for name in ("train", "dev", "test")}, "cache_dir": str(folder / "cache")},
        "task": {"kind": "classification", "calibration": {"kind": "temperature"}, "decision": {"costs": COSTS}},
        "optim": {"learning_rate": 3e-3, "schedule": {"kind": "constant"}},
        "evaluation": {"eval_steps": 100, "metric_for_best_model": "accuracy"},
        "precision": "fp32",
        "global_batch_size": 16,
        "max_steps": 100,
        "compress": {"max_quality_drop": 0.2, "min_speedup": 0.01},
        "storage": str(folder / "runs"),
    }
    return TrainJob.model_validate(document)


@pytest.fixture(scope="module")
def prepared(job: TrainJob) -> sdk.Prepared:
    return sdk.prepare(job, calibrate=False)


@pytest.fixture(scope="module")
def trained(prepared: sdk.Prepared) -> sdk.Trained:
    return sdk.train(prepared.job, prepared=prepared)


def plain_logits(folder: Path, texts: list[str]) -> np.ndarray:
    """What plain transformers says of texts, one by one."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).double().numpy()


def settled(trained: sdk.Trained) -> tuple[float, float]:
    task = trained.bundle.meta.task
    assert isinstance(task, Classification)
    assert task.calibration is not None
    assert task.calibration.temperature is not None
    assert task.decision is not None
    assert task.decision.threshold is not None
    return task.calibration.temperature, task.decision.threshold


# From the job to the endpoint.


def test_a_bundle_is_calibrated_on_its_dev_rows_and_decides_by_cost(job: TrainJob, trained: sdk.Trained) -> None:
    temperature, threshold = settled(trained)
    dev, test = (pandas.read_csv(str(source)) for source in (job.data.dev, job.data.test))
    truth = np.array([LABELS.index(label) for label in dev["label"]])
    logits = plain_logits(trained.bundle.path / "model", list(dev["text"]))
    assert temperature == pytest.approx(fit_temperature(logits, truth), rel=1e-3)
    second = torch.from_numpy(logits / temperature).softmax(-1).numpy()[:, 1]
    costs = [sum(COSTS[t].get(a, 0) for t, a in zip(dev["label"], np.where(second >= x, "good", "bad"), strict=True)) for x in second]
    here = sum(COSTS[t].get(a, 0) for t, a in zip(dev["label"], np.where(second >= threshold, "good", "bad"), strict=True))
    assert here <= min(costs)

    raw = plain_logits(trained.bundle.path / "model", list(test["text"]))
    found, labels = trained.evaluations["test"].outputs, np.array([LABELS.index(label) for label in test["label"]])
    np.testing.assert_allclose(found, raw / temperature, atol=1e-4)
    assert (found.argmax(1) == raw.argmax(1)).all()
    assert temperature > 1.5
    assert calibration(found, labels).ece < 0.7 * calibration(raw, labels).ece
    assert trained.bundle.meta.scores["test"]["loss"] == pytest.approx(calibration(raw / temperature, labels).loss, abs=1e-4)


def test_predictions_probes_int8_and_http_answer_alike(job: TrainJob, trained: sdk.Trained) -> None:
    temperature, threshold = settled(trained)
    texts = [row["text"] for row in make_rows(40, 5)]
    expected = torch.from_numpy(plain_logits(trained.bundle.path / "model", texts) / temperature).softmax(-1).numpy()
    answers = np.where(expected[:, 1] >= threshold, "good", "bad").tolist()
    assert answers != [LABELS[i] for i in expected.argmax(1)], "a decision that never differs would show nothing"
    found = sdk.predict(trained.bundle, texts)
    np.testing.assert_allclose([one.probabilities for one in found], expected, atol=1e-5)
    assert [one.label for one in found] == answers
    assert [one.probability for one in found] == pytest.approx([row[LABELS.index(a)] for row, a in zip(expected, answers, strict=True)])
    probes = trained.bundle.meta.probes
    assert [probe.label for probe in probes] == [one.label for one in sdk.predict(trained.bundle, [probe.text for probe in probes])]
    assert [probe.margin for probe in probes] == pytest.approx([2 * abs(probe.probabilities[1] - threshold) for probe in probes], abs=1e-6)

    body = asyncio.run(_asked(trained.bundle, texts))  # its engine asks the probes before it serves
    assert [one["label"] for one in body["data"]] == answers
    np.testing.assert_allclose([one["probs"] for one in body["data"]], expected, atol=1e-5)

    smaller = sdk.quantize(job).bundle
    assert smaller is not None
    assert smaller.meta.task == trained.bundle.meta.task
    wide = dict(zip(texts, expected, strict=True))
    for text, one in zip(texts, sdk.predict(smaller, texts), strict=True):
        assert one.probabilities == pytest.approx(wide[text], abs=0.05)
        assert one.label == LABELS[int(one.probabilities[1] >= threshold)]


async def _asked(bundle: Bundle, texts: list[str]) -> Any:
    gateway = Gateway(EncoderEngine(Encoder(), bundle), "risk", Limits(max_inputs=len(texts)), lambda *_, **__: None)
    await gateway.start()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://test") as client:
        response = await client.post("/v1/classify", json={"input": texts})
    await gateway.drain()
    return response.raise_for_status().json()


def test_an_evaluation_says_what_the_decision_saves_and_marks_the_words(
    job: TrainJob, prepared: sdk.Prepared, trained: sdk.Trained
) -> None:
    temperature, threshold = settled(trained)
    found = sdk.examine(trained.bundle).analysis
    outputs, labels = trained.evaluations["test"].outputs, trained.evaluations["test"].scores.num_rows
    truth = np.array([LABELS.index(label) for label in pandas.read_csv(str(job.data.test))["label"]])
    second = torch.from_numpy(outputs).softmax(-1).numpy()[:, 1]
    assert found.decision is not None
    assert found.decision.confusion == confusion_matrix(truth, second >= threshold).tolist()
    assert found.decision.cost.value == pytest.approx(np.sum(np.array(found.decision.confusion) * [[0, 10], [1, 0]]) / labels)
    likeliest = confusion_matrix(truth, outputs.argmax(1))
    assert found.decision.cost_of_likeliest.value == pytest.approx(np.sum(likeliest * [[0, 10], [1, 0]]) / labels)
    assert found.decision.cost.value < 0.8 * found.decision.cost_of_likeliest.value
    assert found.temperature is not None
    assert (found.temperature.applied, found.temperature.value) == (True, temperature)
    assert found.temperature.after.ece == found.calibration.ece < found.temperature.before.ece  # type: ignore[union-attr]
    assert "cost a row" in found.text()
    wrong = [one for one in found.mistakes if one.answer == "bad"]
    assert wrong
    assert all(one.probability > 1 - threshold - 1e-6 for one in wrong)

    page = Path(sdk.report(prepared, trained)).read_text(encoding="utf-8")
    assert "What the answers to the test rows cost" in page
    assert "<mark" in page.split("Surest wrong answers")[1]


# Decisions.


def test_the_threshold_is_the_cheapest_on_the_rows_and_near_the_expected_one_where_many_are() -> None:
    draw = np.random.default_rng(0)
    for costs in (np.array([[0, 10.0], [1, 0]]), np.array([[0, 1.0], [3, -1]]) + 1, np.array([[0, 1.0], [1, 0]])):
        second = draw.random(60).round(2)
        labels = (draw.random(60) < second).astype(int)
        found = choose_threshold(second, labels, costs)

        def paid(threshold: float, second: Any = second, labels: Any = labels, costs: Any = costs) -> float:
            return float(costs[labels, (second >= threshold).astype(int)].sum())

        grid = np.arange(0.005, 1, 0.01)  # one between each two of the rounded probabilities
        paids = [paid(x) for x in grid]
        cheapest = [x for x, one in zip(grid, paids, strict=True) if one == min(paids)]
        assert paid(found) == pytest.approx(min(paids))
        expected = expected_threshold(costs)
        assert expected is not None
        assert abs(found - expected) <= min(abs(x - expected) for x in cheapest) + 1e-2
    sure = np.array([0.1, 0.9])
    assert choose_threshold(sure, np.array([0, 1]), np.array([[0, 4.0], [1, 0]])) == pytest.approx(0.8), "of all between 0.1 and 0.9"


def test_with_more_labels_the_answer_has_the_least_expected_cost_and_a_margin_that_holds() -> None:
    draw = np.random.default_rng(1)
    names = ["a", "b", "c"]
    decision = Decision(costs={"a": {"b": 1.0, "c": 5.0}, "b": {"a": 2.0, "c": 0.5}, "c": {"a": 9.0, "b": 3.0}})
    chances = draw.dirichlet([1, 1, 1], 200)
    answers, margins = decide(chances, names, decision)
    for row, answer in zip(chances, answers, strict=True):
        expected = {a: sum(p * decision.costs[t].get(a, 0.0) for p, t in zip(row, names, strict=True)) for a in names}
        assert names[answer] == min(expected, key=lambda a: expected[a])
    assert (answers != chances.argmax(1)).any()
    moved = chances + draw.uniform(-1, 1, chances.shape) * 0.5 * margins[:, None] * (1 - 1e-9)
    assert (decide(moved, names, decision)[0] == answers).all()


def test_costs_of_resampled_rows_are_plain_means() -> None:
    draw = np.random.default_rng(2)
    logits, labels = draw.normal(size=(80, 2)), draw.integers(0, 2, 80)
    found = decided(Decision(costs=COSTS, threshold=0.9), logits, labels, LABELS, number=200)
    costs = cost_matrix(Decision(costs=COSTS), LABELS)
    assert found.always == "bad"
    assert found.cost_of_always.value == (labels == 1).mean()
    assert found.accuracy_of_likeliest == (logits.argmax(1) == labels).mean()
    paid = costs[labels, (torch.from_numpy(logits).softmax(-1).numpy()[:, 1] >= 0.9).astype(int)]
    means = [paid[draw.integers(0, 80, 80)].mean() for _ in range(2000)]
    assert (found.cost.low, found.cost.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.12 * np.ptp(means))


REFUSED = {
    "an unknown label": ({"bad": {"god": 1.0}}, None, "names 'god', which is no label; there are: bad, good"),
    "one answer that is always cheapest": ({"bad": {"good": 1.0}}, None, "makes 'bad' the cheapest answer to every row"),
    "answers that cost the same": ({"bad": {"good": 1.0, "bad": 1.0}}, None, "makes 'bad' the cheapest answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_costs_that_decide_nothing_are_refused_before_anything_starts(name: str, job: TrainJob) -> None:
    costs, threshold, told = REFUSED[name]
    decision = {"costs": costs} | ({} if threshold is None else {"threshold": threshold})
    with pytest.raises(SpecError, match=told):
        sdk.prepare(job.model_copy(update={"task": Classification.model_validate({"decision": decision})}), calibrate=False)
    with pytest.raises(ValueError, match=told):
        Classification.model_validate({"labels": LABELS, "decision": decision})


def test_a_threshold_is_between_two_labels() -> None:
    with pytest.raises(ValueError, match="stands between two labels, and there are 3; leave it out"):
        Classification.model_validate({"labels": ["a", "b", "c"], "decision": {"costs": {"a": {"b": 1.0}}, "threshold": 0.5}})


# Explanations.


class WordCounts(nn.Module):
    """A linear model of the words' counts, called as a packed encoder is."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.weights = nn.Embedding(vocabulary, 2)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, *_: object) -> torch.Tensor:
        rows = self.weights(input_ids).split(cu_seqlens.diff().tolist())
        return torch.stack([row.sum(0) for row in rows])


def test_the_effects_of_a_linear_model_are_its_words_weights(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    torch.manual_seed(0)
    predictor = Predictor(WordCounts(len(tokenizer)), tokenizer, LABELS, max_length=32)  # type: ignore[arg-type]
    weights = predictor.model.weights.weight.detach().numpy()
    text = "wheat exports, the port strike 小明读书 wheat"
    found = explain(predictor, [Text(text), Text("corn", "a vessel")])
    for one, texts in zip(found, ((text, ""), ("corn", "a vessel")), strict=True):
        label = LABELS.index(one.prediction.label)
        assert one.words
        for word in one.words:
            assert texts[word.in_pair][word.start : word.end] == word.word
            pieces = tokenizer(word.word, add_special_tokens=False).input_ids
            assert word.effect == pytest.approx(sum(weights[piece, label] - weights[piece, 1 - label] for piece in pieces), abs=1e-5)
    assert [word.word for word in found[0].words][-6:] == ["strike", "小", "明", "读", "书", "wheat"]
    assert [abs(word.effect) for word in found[0].strongest(3)] == sorted((abs(word.effect) for word in found[0].words), reverse=True)[:3]


def test_a_word_is_explained_by_the_text_without_it(job: TrainJob, trained: sdk.Trained, tmp_path: Path) -> None:
    temperature, _ = settled(trained)
    text = "the vessel said a port fell in"
    (tmp_path / "job.yaml").write_text(dump(job), encoding="utf-8")
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "job.yaml"), text, "--bundle", "risk@v1", "--explain"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    label = LABELS.index(said["label"])
    words = text.split()
    without = [" ".join([*words[:i], *words[i + 1 :]]) for i in range(len(words))]
    chances = torch.from_numpy(plain_logits(trained.bundle.path / "model", [text, *without]) / temperature).softmax(-1).numpy()[:, label]
    odds = np.log(chances / (1 - chances))
    expected = dict(zip(words, odds[0] - odds[1:], strict=True))
    assert {one["word"]: one["effect"] for one in said["words"]} == pytest.approx(expected, abs=1e-3)
    assert said["probability"] == pytest.approx(chances[0], abs=1e-3)
    assert abs(said["words"][0]["effect"]) == pytest.approx(max(map(abs, expected.values())), abs=1e-3)
    with pytest.raises(DataError, match="empty"):
        sdk.explain(trained.bundle, [" "])
