"""Engines: answers in order for any number of requests at once; nothing waits for ever; what is served is what was evaluated."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import make_rows
from transformers import AutoModelForSequenceClassification

from danlu.artifact.bundle import Bundle, BundleMeta, Lineage, Probe
from danlu.data.pack import Packed
from danlu.errors import QualityError, ResourceError
from danlu.serve.engine import Answer, Engine
from danlu.serve.engines.echo import EchoEngine
from danlu.serve.engines.encoder import BatchRecord, EncoderEngine
from danlu.serve.gateway import Gateway
from danlu.spec.serve import Echo, Encoder, Limits
from danlu.spec.task import Classification
from danlu.tasks.exchange import Text
from danlu.tasks.packed import PackedClassifier
from danlu.tasks.predictor import Predictor, load_predictor

LABELS = ["grain", "ship", "trade"]
TEXTS = [row["text"] for row in make_rows(40, 9)]


@pytest.fixture
def predictor(tiny_model: Path) -> Predictor:
    import torch

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).eval()
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    return load_predictor(tiny_model, LABELS, max_length=32, model=PackedClassifier(model))


def bundle(probes: list[Probe] | None = None) -> Bundle:
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    meta = BundleMeta(
        name="topics", task=Classification(), labels=LABELS, max_length=32, precision="fp32", probes=probes or [], lineage=lineage
    )
    return Bundle(Path("nowhere"), meta)


def encoder(predictor: Predictor, *, probes: list[Probe] | None = None, **spec: Any) -> EncoderEngine:
    return EncoderEngine(Encoder(**spec), bundle(probes), predictor=predictor)


@pytest.fixture(params=["encoder", "echo"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "echo":
        return EchoEngine(Echo(labels=LABELS))
    return encoder(request.getfixturevalue("predictor"))


# Conformance: what holds for every engine.


def test_requests_at_once_get_the_answers_they_get_alone(engine: Engine) -> None:
    async def life() -> tuple[list[list[Answer]], list[list[Answer]]]:
        await engine.start()
        requests = [[Text(text) for text in TEXTS[i : i + 1 + i % 3]] for i in range(0, 36, 2)]
        alone = [await engine.predict(request) for request in requests]
        together = await asyncio.gather(*(engine.predict(request) for request in requests))
        await engine.stop()
        return alone, list(together)

    alone, together = asyncio.run(life())
    for one, other in zip(alone, together, strict=True):
        assert [answer.label for answer in one] == [answer.label for answer in other]
        np.testing.assert_allclose([a.probabilities for a in one], [a.probabilities for a in other], atol=1e-6)
        assert [answer.num_tokens for answer in one] == [answer.num_tokens for answer in other]


def test_probabilities_are_in_the_order_of_the_labels_and_sum_to_one(engine: Engine) -> None:
    async def life() -> list[Answer]:
        await engine.start()
        answers = await engine.predict([Text(text) for text in TEXTS])
        await engine.stop()
        return answers

    for answer in asyncio.run(life()):
        assert sum(answer.probabilities) == pytest.approx(1.0, abs=1e-5)
        assert engine.labels[int(np.argmax(answer.probabilities))] == answer.label


def test_health_follows_the_engines_life(engine: Engine) -> None:
    async def life() -> None:
        with pytest.raises(ResourceError):
            engine.check_health()
        await engine.start()
        engine.check_health()
        await engine.stop()
        with pytest.raises(ResourceError):
            engine.check_health()

    asyncio.run(life())


# The encoder engine.


def test_answers_are_the_predictors(predictor: Predictor) -> None:
    async def life() -> list[Answer]:
        engine = encoder(predictor)
        await engine.start()
        answers = await engine.predict([Text(text) for text in TEXTS])
        await engine.stop()
        return answers

    expected = predictor.predict(TEXTS)
    for answer, one in zip(asyncio.run(life()), expected, strict=True):
        assert answer.label == one.label
        np.testing.assert_allclose(answer.probabilities, one.probabilities, atol=1e-6)


def test_a_request_larger_than_a_batch_takes_several_and_batches_keep_the_limit(predictor: Predictor) -> None:
    batches: list[BatchRecord] = []

    async def life() -> list[Answer]:
        engine = encoder(predictor, max_batch_tokens=60)
        engine.on_batch = batches.append
        await engine.start()
        answers = await engine.predict([Text(text) for text in TEXTS])
        await engine.stop()
        return answers

    answers = asyncio.run(life())
    assert [answer.label for answer in answers] == [one.label for one in predictor.predict(TEXTS)]
    assert len(batches) > 5
    assert all(batch.tokens <= 60 for batch in batches)
    assert sum(batch.rows for batch in batches) == len(TEXTS)


def test_requests_that_come_while_a_forward_runs_share_the_next_one(predictor: Predictor) -> None:
    batches: list[BatchRecord] = []

    async def life() -> None:
        engine = encoder(predictor)
        engine.on_batch = batches.append
        await engine.start()
        await asyncio.gather(*(engine.predict([Text(text)]) for text in TEXTS))
        await engine.stop()

    asyncio.run(life())
    assert max(batch.rows for batch in batches) > 4
    assert len(batches) < len(TEXTS) / 2


def test_a_cancelled_request_leaves_the_queue(predictor: Predictor) -> None:
    batches: list[BatchRecord] = []

    async def life() -> None:
        engine = encoder(predictor, batch_wait_ms=100)
        engine.on_batch = batches.append
        await engine.start()
        gone = asyncio.create_task(engine.predict([Text(text) for text in TEXTS]))
        kept = asyncio.create_task(engine.predict([Text(TEXTS[0])]))
        await asyncio.sleep(0.01)
        gone.cancel()
        await kept
        await engine.stop()

    asyncio.run(life())
    assert sum(batch.rows for batch in batches) == 1


def raising(error: BaseException) -> Callable[[Packed], np.ndarray]:
    def forward(batch: Packed) -> np.ndarray:
        raise error

    return forward


def giving(value: float) -> Callable[[Packed], np.ndarray]:
    return lambda batch: np.full((batch.num_rows, 3), value, dtype=np.float32)


SICK: dict[str, tuple[Callable[[Packed], np.ndarray], str]] = {
    "a broken kernel": (raising(RuntimeError("a broken kernel")), "a broken kernel"),
    "no memory": (raising(MemoryError("no memory")), "no memory"),
    "the end of its thread": (raising(SystemExit("the end")), "the end"),
    "NaN": (giving(np.nan), "no numbers"),
    "infinity": (giving(np.inf), "no numbers"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_forward_that_breaks_fails_every_request_and_health(name: str, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, told = SICK[name]

    async def life() -> None:
        engine = encoder(predictor, max_batch_tokens=30)  # a few of them; the others wait
        await engine.start()
        monkeypatch.setattr(predictor, "forward", forward)
        asked = asyncio.gather(*(engine.predict([Text(text)]) for text in TEXTS), return_exceptions=True)
        for error in await asyncio.wait_for(asked, 20):
            assert isinstance(error, ResourceError)
            assert told in str(error)
        with pytest.raises(ResourceError, match=told):
            engine.check_health()
        with pytest.raises(ResourceError, match=told):
            await engine.predict([Text(TEXTS[0])])
        await engine.stop()

    asyncio.run(life())


def test_a_step_that_never_ends_fails_every_request_and_health(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    release, whole = threading.Event(), predictor.forward

    def stuck(batch: Packed) -> np.ndarray:
        release.wait(60)
        return whole(batch)

    async def life() -> EncoderEngine:
        engine = encoder(predictor, max_batch_tokens=30, step_timeout_s=0.3)
        await engine.start()
        monkeypatch.setattr(predictor, "forward", stuck)
        for error in await asyncio.gather(*(engine.predict([Text(text)]) for text in TEXTS), return_exceptions=True):
            assert isinstance(error, ResourceError)
            assert "step_timeout_s=0.3" in str(error)
        with pytest.raises(ResourceError, match=r"step_timeout_s=0\.3"):
            engine.check_health()
        await engine.stop()  # and does not wait for it
        return engine

    try:
        engine = asyncio.run(life())
    finally:
        release.set()
    assert engine.thread is not None
    engine.thread.join(20)
    with pytest.raises(ResourceError, match="step_timeout_s"):  # what comes too late changes nothing
        engine.check_health()


def test_a_sick_model_is_a_503_a_red_replica_and_counted(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, served: Callable[..., AbstractContextManager[str]], meter: Any
) -> None:
    """As it is behind a language model's engine."""
    gateway = Gateway(encoder(predictor), "topics", Limits(), meter)
    with served(gateway) as url:
        assert httpx.get(f"{url}/healthz").status_code == 200
        monkeypatch.setattr(predictor, "forward", giving(np.nan))
        for _ in range(2):
            answer = httpx.post(f"{url}/v1/classify", json={"input": TEXTS[:2]})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", 503)
            assert "no numbers" in error["message"]
        assert [httpx.get(f"{url}/{probe}").status_code for probe in ("healthz", "readyz")] == [503, 503]
    assert meter.by_label["danlu_serve_requests", "503"] >= 2
    assert meter.by_label["danlu_serve_refusals", "503"] >= 2


@pytest.mark.parametrize("method", ["encode", "made_of"])
def test_what_breaks_before_or_after_the_model_is_its_requests_affair_alone(
    method: str, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, poison = getattr(predictor, method), Text("a poison")

    def broken(*given: Any) -> Any:
        if poison in given[-1]:
            raise IndexError("a text of one's own")
        return whole(*given)

    async def life() -> list[Any]:
        engine = encoder(predictor)
        await engine.start()
        monkeypatch.setattr(predictor, method, broken)
        asked = [[Text(TEXTS[0])], [poison], [Text(TEXTS[1])]]
        found = await asyncio.gather(*map(engine.predict, asked), return_exceptions=True)
        engine.check_health()
        await engine.stop()
        return found

    first, error, other = asyncio.run(life())
    assert isinstance(error, IndexError)
    monkeypatch.undo()
    assert [first[0].label, other[0].label] == [answer.label for answer in predictor.predict(TEXTS[:2])]


def test_an_engine_whose_answers_are_not_the_evaluations_does_not_start(predictor: Predictor) -> None:
    (answer,) = predictor.predict(TEXTS[:1])
    shifted = [answer.probabilities[1], answer.probabilities[2], answer.probabilities[0]]
    good = Probe(text=TEXTS[0], input={"text": TEXTS[0]}, margin=1.0, label=answer.label, probabilities=answer.probabilities)
    asyncio.run(encoder(predictor, probes=[good]).start())
    wrong = Probe(text=TEXTS[0], input={"text": TEXTS[0]}, margin=1.0, label=LABELS[int(np.argmax(shifted))], probabilities=shifted)
    with pytest.raises(QualityError, match="where its evaluation answered"):
        asyncio.run(encoder(predictor, probes=[wrong]).start())


def test_stopping_answers_what_was_asked_before(predictor: Predictor) -> None:
    async def life() -> list[Any]:
        engine = encoder(predictor, batch_wait_ms=50)
        await engine.start()
        asked = [asyncio.create_task(engine.predict([Text(text)])) for text in TEXTS[:6]]
        await asyncio.sleep(0)
        await engine.stop()
        return await asyncio.gather(*asked, return_exceptions=True)

    assert all(isinstance(result, list) for result in asyncio.run(life()))


def test_a_request_that_comes_as_the_engine_ends_is_answered_or_refused_but_does_not_wait(predictor: Predictor) -> None:
    class Ending(EncoderEngine):
        """Is told to end between its check and what follows."""

        def check_health(self) -> None:
            super().check_health()
            self.stopping = True
            with self.wake:
                self.wake.notify()
            assert self.thread is not None
            self.thread.join(0.5)

    async def life() -> None:
        engine = Ending(Encoder(), bundle(), predictor=predictor)
        await engine.start()
        (result,) = await asyncio.gather(asyncio.wait_for(engine.predict([Text(TEXTS[0])]), 20), return_exceptions=True)
        assert isinstance(result, list | ResourceError)
        await engine.stop()

    asyncio.run(life())


def test_who_asks_while_an_engine_starts_that_cannot_is_told(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    (answer,) = predictor.predict(TEXTS[:1])
    wrong = Probe(
        text=TEXTS[0], input={"text": TEXTS[0]}, margin=1.0, label=answer.label, probabilities=[1.0 - p for p in answer.probabilities]
    )
    all_asked, predict = threading.Event(), predictor.predict

    def later(*args: Any) -> Any:
        assert all_asked.wait(20)
        return predict(*args)

    monkeypatch.setattr(predictor, "predict", later)

    async def life() -> list[Any]:
        engine = encoder(predictor, probes=[wrong])
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(engine.start())]
        tasks += [asyncio.create_task(engine.predict([Text(text)])) for text in TEXTS]
        await asyncio.sleep(0)  # all of them run until they wait
        assert len(engine.jobs) == len(TEXTS)
        all_asked.set()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)

    first, *others = asyncio.run(life())
    assert isinstance(first, QualityError)
    assert all(isinstance(other, ResourceError) for other in others)


def test_no_texts_have_no_answers_and_disturb_no_one(engine: Engine) -> None:
    async def life() -> list[list[Answer]]:
        await engine.start()
        asked = [asyncio.create_task(engine.predict(inputs)) for inputs in ([], [Text(TEXTS[0])], [])]
        answers = await asyncio.wait_for(asyncio.gather(*asked), 20)
        await engine.stop()
        return answers

    assert [len(answers) for answers in asyncio.run(life())] == [0, 1, 0]
