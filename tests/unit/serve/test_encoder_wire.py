"""The encoders' bodies: OpenAI's embeddings, Jina's reranking, and what each answer says."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from danlu.errors import RequestError
from danlu.serve.encoder_wire import Wire, read_json
from danlu.serve.engine import Answer
from danlu.serve.wires import routes_of, wire_of
from danlu.spec.serve import Limits
from danlu.spec.task import (
    AnsweredTask,
    Classification,
    Embed,
    EncoderTask,
    ExtractiveQA,
    MultiLabelClassification,
    MultipleChoice,
    Pretrain,
    Regression,
    TokenClassification,
)
from danlu.tasks.exchange import (
    Choice,
    Choices,
    Embedding,
    Example,
    LabelSet,
    Prediction,
    Question,
    Reading,
    Span,
    Tagging,
    Text,
    TokenIds,
    Value,
    from_fields,
    join_words,
    to_fields,
)

VECTORS = [[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]]


def answers(*vectors: list[float]) -> list[Answer]:
    return [Answer(Embedding("", vector), 3) for vector in vectors]


def test_embeddings_are_in_openais_shape() -> None:
    wire = routes_of(Embed())["/v1/embeddings"]
    request = wire.parse({"input": ["wheat", "corn"], "model": "m", "encoding_format": "float", "user": "u"}, 8)
    assert request.inputs == [Text("wheat"), Text("corn")]
    body = wire.respond("m", request, answers(*VECTORS[:2]), [])
    assert body == {
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": i, "embedding": VECTORS[i]} for i in range(2)],
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }


def test_base64_is_little_endian_float32_as_openais_client_reads_it() -> None:
    wire = routes_of(Embed())["/v1/embeddings"]
    request = wire.parse({"input": "wheat", "encoding_format": "base64"}, 8)
    (found,) = wire.respond("m", request, answers(VECTORS[0]), [])["data"]
    assert np.frombuffer(base64.b64decode(found["embedding"]), dtype="<f4").tolist() == pytest.approx(VECTORS[0])


def test_documents_are_ordered_by_their_cosine_with_the_query() -> None:
    wire = routes_of(Embed())["/v1/rerank"]
    request = wire.parse({"query": "wheat", "documents": ["corn", "port"], "top_n": 1}, 8)
    assert request.inputs == [Text("wheat"), Text("corn"), Text("port")]
    (best,) = wire.respond("m", request, answers(*VECTORS), [])["results"]
    assert best == {"index": 0, "document": {"text": "corn"}, "relevance_score": pytest.approx(0.96)}
    every = wire.parse({"query": "wheat", "documents": ["corn", "port"], "return_documents": False}, 8)
    found = wire.respond("m", every, answers(VECTORS[0], VECTORS[2], VECTORS[1]), [])["results"]
    assert [(one["index"], "document" in one) for one in found] == [(1, False), (0, False)]


def test_token_ids_are_one_text_or_many() -> None:
    wire = routes_of(Embed())["/v1/embeddings"]
    assert wire.parse({"input": [1, 2, 3]}, 2).inputs == [TokenIds((1, 2, 3))], "one text, however many ids it has"
    assert wire.parse({"input": [[1], [2, 3]]}, 2).inputs == [TokenIds((1,)), TokenIds((2, 3))]
    assert wire.parse(wire.request("m", [TokenIds((1, 2)), TokenIds((3,))]), 2).inputs == [TokenIds((1, 2)), TokenIds((3,))]


def test_shorter_vectors_are_the_first_numbers_of_length_one() -> None:
    wire = routes_of(Embed())["/v1/embeddings"]

    def asked(dimensions: int | None) -> list[float]:
        request = wire.parse({"input": "wheat", "dimensions": dimensions}, 8)
        found: list[float] = wire.respond("m", request, answers([2 / 3, 1 / 3, 2 / 3]), [])["data"][0]["embedding"]
        return found

    assert asked(None) == asked(3) == [2 / 3, 1 / 3, 2 / 3]
    assert asked(2) == pytest.approx([2 / 5**0.5, 1 / 5**0.5])
    with pytest.raises(RequestError, match="this model's vectors have 3 numbers"):
        asked(4)


@pytest.mark.parametrize("task", [Classification(), ExtractiveQA(), MultipleChoice(), TokenClassification(), Embed(), Pretrain()])
def test_a_field_that_is_not_known_is_refused_with_the_name_that_was_meant(task: AnsweredTask) -> None:
    for path, wire in routes_of(task).items():
        body = json.loads(wire.example)
        assert wire.parse(body | {"user": "u"}, 8).inputs
        with pytest.raises(RequestError, match="did you mean `model`") as raised:
            wire.parse(body | {"modell": "m"}, 8)
        assert (raised.value.param, raised.value.code, raised.value.status) == ("modell", "unknown_parameter", 400)
        schema, _ = wire.schemas([], Limits())
        Draft202012Validator(schema).validate(body | {"user": "u"})
        assert not Draft202012Validator(schema).is_valid(body | {"modell": "m"}), path


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "an id that is none": ("/v1/embeddings", {"input": [1, "a"]}, "input"),
    "an id below nothing": ("/v1/embeddings", {"input": [[1], [2, -1]]}, "input[1]"),
    "a truth for an id": ("/v1/embeddings", {"input": [True]}, "input"),
    "half an id": ("/v1/embeddings", {"input": [[1.5]]}, "input[0]"),
    "no ids": ("/v1/embeddings", {"input": [[]]}, "input[0]"),
    "texts and ids": ("/v1/embeddings", {"input": ["a", [1]]}, "input"),
    "ids of too many texts": ("/v1/embeddings", {"input": [[1]] * 9}, "input"),
    "another field": ("/v1/embeddings", {"input": "a", "encoding": "float"}, "encoding"),
    "another user": ("/v1/embeddings", {"input": "a", "user": 3}, "user"),
    "half a character": ("/v1/embeddings", {"input": ["a", "b\ud800"]}, "input[1]"),
    "another encoding": ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
    "no dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
    "dimensions in words": ("/v1/embeddings", {"input": "a", "dimensions": "8"}, "dimensions"),
    "a document's field": ("/v1/rerank", {"query": "a", "documents": ["a"], "top_k": 1}, "top_k"),
    "documents that are no truth": ("/v1/rerank", {"query": "a", "documents": ["a"], "return_documents": "no"}, "return_documents"),
    "no query": ("/v1/rerank", {"documents": ["a"]}, "query"),
    "no documents": ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
    "too many documents": ("/v1/rerank", {"query": "a", "documents": ["a"] * 9}, "documents"),
    "none of them": ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
    "a document that is no text": ("/v1/rerank", {"query": "a", "documents": ["a", 3]}, "documents[1]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_name_their_field(name: str) -> None:
    path, document, field = BAD[name]
    with pytest.raises(RequestError) as raised:
        routes_of(Embed())[path].parse(document, 8)
    assert raised.value.param == field
    assert raised.value.fix


ANSWERED: dict[str, tuple[EncoderTask, Example, Prediction, dict[str, Any]]] = {
    "a label": (
        Classification(),
        Text("a", "b"),
        Prediction("x", [0.7, 0.3]),
        {"label": "x", "probs": [0.7, 0.3], "num_classes": 2},
    ),
    "labels": (
        MultiLabelClassification(),
        Text("a"),
        LabelSet("x, y", [0.7, 0.6], ("x", "y"), 0.5),
        {"labels": ["x", "y"], "probs": [0.7, 0.6], "num_classes": 2},
    ),
    "a number": (Regression(), Text("a"), Value("3.5", [3.5]), {"value": 3.5}),
    "an answer": (
        ExtractiveQA(),
        Question("q", "ab"),
        Reading("b", [0.6, 0.3, 0.1], (Span("b", 1, 2, 0.6), Span("a", 0, 1, 0.1)), 0.3),
        {
            "answer": "b",
            "start": 1,
            "end": 2,
            "score": 0.6,
            "no_answer_score": 0.3,
            "candidates": [{"text": "b", "start": 1, "end": 2, "score": 0.6}, {"text": "a", "start": 0, "end": 1, "score": 0.1}],
        },
    ),
    "no answer": (
        ExtractiveQA(),
        Question("q", "ab"),
        Reading("", [0.8, 0.2], (Span("b", 1, 2, 0.2),), 0.8),
        {
            "answer": "",
            "start": None,
            "end": None,
            "score": 0.8,
            "no_answer_score": 0.8,
            "candidates": [{"text": "b", "start": 1, "end": 2, "score": 0.2}],
        },
    ),
    "an option": (
        MultipleChoice(),
        Choices("q", ("a", "b")),
        Choice("b", [0.4, 0.6], 1),
        {"index_of_option": 1, "option": "b", "probs": [0.4, 0.6]},
    ),
    "entities": (
        TokenClassification(),
        join_words(["北", "京", "ok"]),
        Tagging("B-LOC I-LOC O", [0.9, 0.7, 0.8], ("B-LOC", "I-LOC", "O"), (Span("北京", 0, 2, 0.8, "LOC"),), 0.4),
        {
            "text": "北京 ok",
            "entities": [{"entity": "LOC", "text": "北京", "start": 0, "end": 2, "score": 0.8}],
            "tokens": [
                {"text": "北", "start": 0, "end": 1, "tag": "B-LOC", "score": 0.9},
                {"text": "京", "start": 1, "end": 2, "tag": "I-LOC", "score": 0.7},
                {"text": "ok", "start": 3, "end": 5, "tag": "O", "score": 0.8},
            ],
        },
    ),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_is_written_read_and_described(name: str) -> None:
    task, example, prediction, entry = ANSWERED[name]
    wire: Wire = wire_of(task)
    body = json.loads(json.dumps(wire.request("m", [example]), ensure_ascii=False))
    request = wire.parse(body, 8)
    assert request.inputs == [example]
    labels = ["x", "y"] if "label" in entry or "labels" in entry else ["O", "B-LOC", "I-LOC"] if "entities" in entry else []
    found = wire.respond("m", request, [Answer(prediction, 5)], labels)
    assert found["data"] == [{"index": 0, **entry}]
    assert found["usage"]["total_tokens"] == 5
    numbers = prediction.probabilities
    assert wire.read(found) == [(prediction.label, sorted(numbers, reverse=True) if isinstance(prediction, Reading) else numbers)]
    for schema, told in zip(wire.schemas(labels, Limits()), (body, found), strict=True):
        Draft202012Validator(schema).validate(told)
    assert from_fields(json.loads(json.dumps(to_fields(example))), task) == example


def test_a_body_is_json_in_utf_8() -> None:
    deep = b'{"a":' + b"[" * 100_000
    for body, told in ((b"[1]", "an object is needed"), (b"{", "not JSON"), (b'{"a": "\xff"}', "not UTF-8"), (deep, "too deep")):
        with pytest.raises(RequestError, match=told):
            read_json(body, "{}")
