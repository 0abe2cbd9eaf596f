"""Every task from a file to an answer: rows and their report, training, scores, a bundle, an endpoint on one Ray, predictions; in English
and in Chinese, with models of one to three million weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import CHINESE, TOPICS, make_rows, write_tiny_model
from language import CAPITALS, preferences, talks, translations, write_chat_model, write_rows, write_t5

from danlu import sdk
from danlu.artifact.bundle import read_bundle
from danlu.spec.task import EncoderTask, LanguageTask
from danlu.spec.train import TrainJob

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("ray_local")]

ENGLISH = make_rows(60, 1)
CHINESE_TEXTS = [("小明在北京大学读书", "grain"), ("他喜欢苹果和香蕉", "ship"), ("谁在哪里", "trade")] * 8
QUESTION = "What is the capital of Peru?"
ZH_TALK = {"messages": [{"role": "user", "content": "法国的首都是哪里"}, {"role": "assistant", "content": "巴黎"}]}
ZH_PAIR = {"prompt": "法国的首都是哪里", "chosen": "巴黎", "rejected": "罗马"}


def chosen(text: str, options: list[str]) -> dict[str, Any]:
    return {"question": text, "options": options, "answer": options[len(text) % len(options)]}


def tagged(text: str) -> dict[str, Any]:
    words = text.split() if text.isascii() else list(text)
    topics = {word for some in TOPICS.values() for word in some} | {"北", "京"}
    return {"tokens": words, "ner_tags": ["B-TOPIC" if word in topics else "O" for word in words]}


def asked(text: str) -> dict[str, Any]:
    word = text.split()[-1] if text.isascii() else text[-2:]
    return {"context": text, "question": "which is last", "answers": {"text": [word], "answer_start": [text.rindex(word)]}}


TEXTS = [row["text"] for row in ENGLISH] + [text for text, _ in CHINESE_TEXTS]
LABELS = [row["label"] for row in ENGLISH] + [label for _, label in CHINESE_TEXTS]
CAPITAL_TEXTS = [{"text": f"The capital of {country} is {city}."} for country, city in CAPITALS.items()] * 8 + [
    {"text": "法国的首都是巴黎"}
] * 8
ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)],
    "sentence pairs": [{"text": text, "text_pair": label, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)],
    "multi_label_classification": [
        {"text": text, "labels": [label, "zh"][: 1 + (not text.isascii())]} for text, label in zip(TEXTS, LABELS, strict=True)
    ],
    "regression": [{"text": text, "score": len(text) / 10} for text in TEXTS],
    "extractive_qa": [asked(text) for text in TEXTS],
    "multiple_choice": [chosen(text, ["grain", "ship", "小明", "北京"][: 2 + i % 3]) for i, text in enumerate(TEXTS)],
    "token_classification": [tagged(text) for text in TEXTS],
    "embedding": [{"anchor": text, "positive": text[len(text) // 2 :]} for text in dict.fromkeys(TEXTS)],
    "chat": [*talks(60), *[ZH_TALK] * 20],
    "dpo": [*preferences(60), *[ZH_PAIR] * 20],
    "kto": [*preferences(60), *[ZH_PAIR] * 20],
    "causal": CAPITAL_TEXTS,
    "masked": [{"text": text} for text in TEXTS],
    "seq2seq": translations(60),
}
ENCODERS = {"masked", *list(ROWS)[:8]}
TASKS: dict[str, dict[str, Any]] = {name: {"kind": name} for name in ROWS} | {
    "sentence pairs": {"kind": "classification"},
    "extractive_qa": {"kind": "extractive_qa", "max_answer_length": 6},
    "dpo": {"kind": "preference"},
    "kto": {"kind": "preference", "loss": {"kind": "kto"}},
    "causal": {"kind": "pretrain"},
    "masked": {"kind": "pretrain", "objective": {"kind": "masked", "whole_word_mask": True}},
    "seq2seq": {"kind": "seq2seq", "max_target_length": 8},
}
ASKED_AT_ENDPOINTS = ("classification", "chat", "causal", "seq2seq")
"""Tasks that `danlu evaluate --url` scores an endpoint for."""
PREDICT = {"masked": "the [MASK] rose", "seq2seq": "one two", "causal": "The capital of", **dict.fromkeys(("chat", "dpo", "kto"), QUESTION)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    encoder = write_tiny_model(folder / "bert", hidden_size=192, layers=4, more=CHINESE)
    decoder = write_chat_model(folder / "qwen3", hidden_size=256)
    found = {name: encoder if name in ENCODERS else decoder for name in ROWS}
    return found | {"seq2seq": write_t5(folder / "t5", hidden_size=256)}


@pytest.fixture(scope="module", autouse=True)
def within_six_minutes() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < 360


def test_no_task_is_left_out() -> None:
    known = {task.model_fields["kind"].default for task in (*get_args(EncoderTask), *get_args(LanguageTask))}
    assert {task["kind"] for task in TASKS.values()} == known


@pytest.mark.parametrize("name", ROWS)
def test_a_file_becomes_an_endpoint_that_answers_as_it_was_evaluated(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROWS[name])
    decodes = name not in (*ENCODERS, "seq2seq")
    fields: dict[str, Any] = {
        "name": "walk",
        "model": {"model_name_or_path": str(models[name]), "max_length": 48},
        "data": {"train": file, "dev_size": 0.2, "cache_dir": str(tmp_path / "cache")},
        "task": TASKS[name],
        "optim": {"learning_rate": 1e-3},
        "precision": "fp32",
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "max_steps": 20,
        "storage": str(tmp_path / "storage"),
        "serve": {"http": {"port": 0}} | ({"engine": {"kind": "torch", "kv_cache_memory_gb": 0.1}} if decodes else {}),
    }
    job = TrainJob.model_validate(fields)
    found = sdk.data_report([file], job=job)
    assert found.splits["train"].rows == len(ROWS[name])
    assert not found.splits["train"].broken.rows
    assert found.example is not None, found.warnings
    prepared = sdk.prepare(job, calibrate=False)
    assert 1e6 < prepared.plan.num_parameters < 5e6
    losses: list[float] = []
    trained = sdk.train(job, prepared=prepared, listener=lambda record: losses.append(record.loss) if record.kind == "step" else None)  # type: ignore[union-attr]
    assert len(losses) == 20
    assert losses[-1] < losses[0] or name == "kto"
    evaluation, split = sdk.evaluate(trained.reference, storage=job.storage)
    assert dict(evaluation.scores.metrics()) == pytest.approx(trained.bundle.meta.scores["dev"], abs=1e-5)
    assert read_bundle(trained.bundle.path, verify=True).meta.probes
    with sdk.serving(job.service(trained.reference)) as endpoint:
        assert "over HTTP" in sdk.check_served(endpoint.url, trained.bundle, split)
        if name in ASKED_AT_ENDPOINTS:
            asked = sdk.examine(trained.reference, storage=job.storage, url=endpoint.url).evaluation.scores.metrics()
            assert dict(asked) == pytest.approx({metric: evaluation.scores.metrics()[metric] for metric in asked}, abs=1e-3)
    examples = [PREDICT[name]] if name in PREDICT else list(split.examples[:3])
    answers = sdk.predict(trained.reference, examples, storage=job.storage)
    assert len(answers) == len(examples)
    if name in PREDICT:
        assert json.loads(json.dumps(answers[0].to_dict(), ensure_ascii=False))["tokens"] >= 1  # type: ignore[union-attr]
