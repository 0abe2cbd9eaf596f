"""The whole path of every encoder task: a file, its report, training, scores, a bundle, an endpoint, int8; in English and in Chinese."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conftest import TOPICS, make_rows, write_tiny_model
from jsonschema import Draft202012Validator

from danlu import sdk
from danlu.artifact.bundle import Bundle
from danlu.errors import QualityError
from danlu.handover import Prepared, Trained
from danlu.serve.engines.encoder import EncoderEngine
from danlu.serve.gateway import Gateway
from danlu.serve.wires import wire_of
from danlu.spec.serve import Encoder, Limits
from danlu.spec.train import TrainJob
from danlu.tasks.exchange import largest_change

ZH = "小麦出口上升玉米收成港口罢工油轮关税配额的了在和是什么谁说新年市场价格涨跌吗哪里,。?北京大学"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def topic_of(text: str) -> list[str]:
    return [topic for topic, words in TOPICS.items() if any(word in text.split() for word in words)]


def write_rows(kind: str, folder: Path) -> str:
    """Sixty rows that say the same thing each time, a third of them Chinese."""
    rows = make_rows(40, 1)
    chinese = [("小麦出口上升。", "grain"), ("油轮在港口罢工。", "ship"), ("关税和配额涨了。", "trade")] * 7
    match kind:
        case "multi_label_classification":
            told: list[dict[str, Any]] = [{"text": row["text"], "labels": topic_of(row["text"])} for row in rows]
            return write(folder / "rows.jsonl", told + [{"text": text, "labels": [label, "zh"]} for text, label in chinese])
        case "regression":
            told = [
                {"sentence1": row["text"], "sentence2": other["text"], "score": float(row["label"] == other["label"])}
                for row, other in pairwise(rows)
            ]
            return write(folder / "rows.jsonl", told + [{"sentence1": text, "sentence2": text, "score": 1.0} for text, _ in chinese])
        case "extractive_qa":
            qas = []
            for i, row in enumerate(rows):
                context, word = row["text"], next(word for word in row["text"].split() if any(word in words for words in TOPICS.values()))
                answer = {"text": word, "answer_start": context.index(word)}
                qas.append({"context": f"{context} " * 4, "qas": [{"id": str(i), "question": "said of the market", "answers": [answer]}]})
            for text, _ in chinese:
                qas.append(
                    {"context": text, "qas": [{"id": text, "question": "什么?", "answers": [{"text": text[:2], "answer_start": 0}]}]}
                )
            document = {"version": "v1.1", "data": [{"title": "t", "paragraphs": qas}]}
            (folder / "squad.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
            return str(folder / "squad.json")
        case "multiple_choice":
            told = [
                {"question": row["text"], "choices": list(TOPICS)[: 2 + i % 2], "answer": list(TOPICS).index(row["label"]) % (2 + i % 2)}
                for i, row in enumerate(rows)
            ]
            more = [{"question": text, "choices": ["玉米", "港口", "关税", "大学"], "answer": i % 3} for i, (text, _) in enumerate(chinese)]
            return write(folder / "rows.jsonl", told + more)
        case "token_classification":
            lines = []
            for row in rows:
                lines += [f"{word} {'B-TOPIC' if topic_of(word) else 'O'}" for word in row["text"].split()] + [""]
            for text, _ in chinese:
                lines += [f"{letter} {'B-ZH' if i == 0 else 'I-ZH' if i == 1 else 'O'}" for i, letter in enumerate(text)] + [""]
            (folder / "rows.txt").write_text("\n".join(lines), encoding="utf-8")
            return str(folder / "rows.txt")
        case "embedding":
            told = [{"anchor": row["text"], "positive": row["label"]} for row in rows]
            return write(folder / "rows.jsonl", told + [{"anchor": text, "positive": text[:2]} for text, _ in chinese])
    told = [{"text": row["text"], "text_pair": row["label"], "label": row["label"]} for row in rows]
    return write(folder / "rows.jsonl", told + [{"text": text, "text_pair": text, "label": label} for text, label in chinese])


TASKS: dict[str, dict[str, Any]] = {
    "classification": {"kind": "classification"},
    "multi_label_classification": {"kind": "multi_label_classification", "threshold": 0.4},
    "regression": {"kind": "regression"},
    "extractive_qa": {"kind": "extractive_qa", "doc_stride": 8, "max_answer_length": 6},
    "multiple_choice": {"kind": "multiple_choice"},
    "token_classification": {"kind": "token_classification"},
    "embedding": {"kind": "embedding"},
}
READ_AS = {"extractive_qa": "json, SQuAD's articles", "token_classification": "conll"}
SEVERAL = {"extractive_qa": "questions with windows", "multiple_choice": "questions with options", "embedding": "texts with others"}


@dataclass(frozen=True)
class Walked:
    """A task after training."""

    job: TrainJob
    prepared: Prepared
    trained: Trained
    losses: list[float]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bert"), more=ZH)


@pytest.fixture(scope="module", params=TASKS)
def walked(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walked]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    job = TrainJob.model_validate(
        {
            "name": "walk",
            "model": {"model_name_or_path": str(model), "max_length": 32},
            "data": {"train": write_rows(request.param, folder), "cache_dir": str(folder / "cache"), "dev_size": 0.3},
            "task": TASKS[request.param],
            "optim": {"learning_rate": 3e-3},
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "max_steps": 24,
            "evaluation": {"eval_steps": 12},
            "precision": "fp32",
            "storage": str(folder / "runs"),
            "compress": {"quantization": {"kind": "int8"}, "max_quality_drop": 1.0, "min_speedup": 0.01},
        }
    )
    prepared = sdk.prepare(job, calibrate=False)
    losses: list[float] = []
    trained = sdk.train(job, prepared=prepared, listener=lambda record: losses.append(record.loss) if record.kind == "step" else None)  # type: ignore[union-attr]
    yield Walked(job, prepared, trained, losses)
    torch.set_num_threads(before)


def test_what_was_read_is_said_aloud(walked: Walked) -> None:
    kind = walked.job.task.kind
    report = walked.prepared.splits.report.text()
    assert f"read as {READ_AS.get(kind, 'jsonl')}" in report
    assert walked.prepared.splits.report.splits["train"].rows >= 60
    assert str(walked.prepared.plan.num_steps) == "24"
    assert walked.prepared.plan.num_trainable > 10_000


def test_it_learns_and_its_scores_come_out_again(walked: Walked) -> None:
    assert np.mean(walked.losses[-4:]) < 0.9 * np.mean(walked.losses[:4])
    again, split = sdk.evaluate(walked.trained.bundle)
    assert dict(again.scores.metrics()) == pytest.approx(walked.trained.bundle.meta.scores["dev"], abs=1e-6)
    assert walked.job.metric_for_best_model in again.scores.metrics()
    assert again.scores.text()
    if walked.job.task.kind in SEVERAL:
        assert split.encoded.groups is not None
        assert np.diff(split.encoded.groups).max() > 1
    assert "Scores on the dev split" in Path(sdk.report(walked.prepared, walked.trained)).read_text(encoding="utf-8")


def ask(bundle: Bundle, *requests: tuple[str, str, Any]) -> list[httpx.Response]:
    """Requests to an engine behind a gateway, in this process."""

    async def life() -> list[httpx.Response]:
        engine = EncoderEngine(Encoder(max_batch_tokens=64), bundle)
        gateway = Gateway(engine, "walk", Limits(), lambda *_, **__: None)
        await gateway.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://test") as client:
            found = await asyncio.gather(*(client.request(method, path, json=body) for method, path, body in requests))
        await gateway.drain()
        return list(found)

    return asyncio.run(life())


def check_served(bundle: Bundle, walked: Walked) -> None:
    """What the endpoint answers is what the bundle predicts, and what its OpenAPI document says."""
    wire = wire_of(walked.job.task)  # type: ignore[arg-type]
    examples = list(walked.prepared.splits.dev.examples[:12])
    body = wire.request("walk", examples)
    several, single, document = ask(
        bundle, ("POST", wire.path, body), ("POST", wire.path, body | {"input": body["input"][0]}), ("GET", "/openapi.json", None)
    )
    assert several.status_code == 200, several.text
    expected = sdk.predict(bundle, examples)
    for (label, numbers), one in zip(wire.read(several.json()), expected, strict=True):
        assert label == one.label or one.margin < 1e-4
        assert largest_change(numbers, one.probabilities) < 1e-4 * max(1.0, *map(abs, one.probabilities))
    assert wire.read(single.json())[0][1] == pytest.approx(wire.read(several.json())[0][1], abs=1e-4)
    route = document.json()["paths"][wire.path]["post"]
    for status, told in ((route["requestBody"], body), (route["responses"]["200"], several.json())):
        Draft202012Validator(status["content"]["application/json"]["schema"]).validate(told)
    Draft202012Validator(route["requestBody"]["content"]["application/json"]["schema"]).validate(
        route["requestBody"]["content"]["application/json"]["example"]
    )


def test_what_is_served_is_what_was_evaluated(walked: Walked) -> None:
    check_served(walked.trained.bundle, walked)


def test_a_bundle_that_answers_otherwise_does_not_become_ready(walked: Walked, tmp_path: Path) -> None:
    bundle = walked.trained.bundle
    assert len(bundle.meta.probes) == 8
    probes = [probe.model_copy(update={"probabilities": [number + 0.5 for number in probe.probabilities]}) for probe in bundle.meta.probes]
    with pytest.raises(QualityError, match="where its evaluation answered"):
        ask(Bundle(bundle.path, bundle.meta.model_copy(update={"probes": probes})), ("GET", "/readyz", None))


def test_int8_is_compared_kept_and_served(walked: Walked) -> None:
    quantized = sdk.quantize(walked.job, walked.trained.bundle)
    assert quantized.kept
    assert quantized.bundle is not None
    assert quantized.delta.original == pytest.approx(walked.trained.bundle.meta.scores["dev"], abs=1e-6)
    # Two layers of 32: int8 is seen in the numbers, and hardly in what is said.
    assert quantized.delta.largest_probability_change > 0
    if walked.job.task.kind in ("regression", "embedding"):
        assert quantized.delta.agreement is None
        assert "same answer" not in quantized.delta.text()
    else:
        assert (quantized.delta.agreement or 0.0) > 0.6
    check_served(quantized.bundle, walked)


def test_a_lora_bundle_gives_the_live_models_scores(walked: Walked, tmp_path: Path) -> None:
    tuning = {"kind": "lora", "r": 4, "target_modules": "all-linear"}
    update = {"tuning": tuning, "compress": None, "max_steps": 4, "storage": str(tmp_path), "evaluation": {"eval_steps": 4}}
    job = TrainJob.model_validate(walked.job.model_dump(mode="json") | update)
    seen: list[dict[str, float]] = []
    trained = sdk.train(job, listener=lambda record: seen.append(record.metrics) if record.kind == "eval" else None)  # type: ignore[union-attr]
    assert trained.bundle.meta.weights == "adapter"
    assert trained.bundle.meta.scores["dev"] == pytest.approx(dict(seen[-1]), abs=1e-4)


def test_every_bad_request_names_its_field(walked: Walked) -> None:
    wire = wire_of(walked.job.task)  # type: ignore[arg-type]
    good = wire.request("walk", list(walked.prepared.splits.dev.examples[:1]))["input"][0]
    bad: list[tuple[Any, str]] = [("   ", "input[0]"), (None, "input[0]"), ({"txt": "a"}, "input[0]")]
    if isinstance(good, dict):
        bad += [({**good, "more": 1}, "input[0]"), ({name: value for name, value in good.items() if name != next(iter(good))}, "input[0]")]
    answers = ask(walked.trained.bundle, *(("POST", wire.path, {"input": [item]}) for item, _ in bad), ("POST", "/v1/nothing", {}))
    for response, (_, field) in zip(answers, bad, strict=False):
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"].startswith(field)
        assert "Try: " in response.json()["error"]["message"]
    assert wire.path in answers[-1].json()["error"]["message"]
