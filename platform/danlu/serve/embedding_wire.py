"""Wire types of vectors: OpenAI's `/v1/embeddings` and Jina's `/v1/rerank`. Pure."""

from __future__ import annotations

import base64
import json
import math
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from danlu.errors import RequestError
from danlu.serve.encoder_wire import MODEL, NUMBER, TEXT, USER, Request, Schema, Wire, array_of, asked_model, object_of
from danlu.serve.engine import Answer
from danlu.spec.serve import Limits
from danlu.tasks.exchange import Example, Text, TokenIds

IDS: Schema = array_of({"type": "integer", "minimum": 0}, minItems=1)


@dataclass(frozen=True)
class EmbeddingsWire(Wire):
    """`POST /v1/embeddings`, OpenAI's: https://platform.openai.com/docs/api-reference/embeddings."""

    MORE: ClassVar[tuple[str, ...]] = ("encoding_format", "dimensions")

    def parse(self, document: Mapping[str, Any], max_inputs: int) -> Request:
        encoding, dimensions = document.get("encoding_format"), document.get("dimensions")
        if encoding not in (None, "float", "base64"):
            raise RequestError(f"`encoding_format` is {encoding!r}", param="encoding_format", fix="float or base64")
        if dimensions is not None and not _is_number(dimensions):
            raise RequestError(f"`dimensions` is {dimensions!r}", param="dimensions", fix="how many numbers a vector is to have, 1 or more")
        request = super().parse(document, max_inputs)
        if len({type(one) for one in request.inputs}) > 1:
            raise RequestError("`input` has texts and token ids", param="input", fix="one or the other")
        return Request(request.model, request.inputs, {"encoding_format": encoding or "float", "dimensions": dimensions})

    def _items(self, document: Mapping[str, Any], name: str, max_inputs: int) -> list[object]:
        given = document.get(name)
        is_one = isinstance(given, list) and given and isinstance(given[0], int | float)
        return [given] if is_one else super()._items(document, name, max_inputs)

    def _read(self, item: object, where: str) -> Example:
        if not isinstance(item, list):
            return super()._read(item, where)
        wrong = [one for one in item if not isinstance(one, int) or isinstance(one, bool) or one < 0]
        if wrong or not item:
            told = f"`{where}` has {wrong[0]!r} among its token ids" if wrong else f"`{where}` is an empty list"
            raise RequestError(told, param=where, fix="token ids, 0 or more, at least one; or a text")
        return TokenIds(tuple(item))

    def respond(self, model: str, request: Request, answers: Sequence[Answer], labels: Sequence[str]) -> dict[str, Any]:
        as_text = request.options["encoding_format"] == "base64"
        data = []
        for i, answer in enumerate(answers):
            vector = _shortened(answer.probabilities, request.options["dimensions"])
            told = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if as_text else vector
            data.append({"object": "embedding", "index": i, "embedding": told})
        tokens = sum(answer.num_tokens for answer in answers)
        return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}

    def schemas(self, labels: Sequence[str], limits: Limits) -> tuple[Schema, Schema]:
        request, response = super().schemas(labels, limits)
        several = {"minItems": 1, "maxItems": limits.max_inputs}
        request["properties"]["input"] = {
            "anyOf": [TEXT, array_of(TEXT, **several), IDS, array_of(IDS, **several)],
            "description": "Texts, or token ids of the model's own tokenizer. Ids are read as they are: none is added to them, so those "
            "of `tokenizer(text)`, which has put them there, give the text's own vector. A text that is too long is cut; ids are refused.",
        }
        request["properties"]["encoding_format"] = {"enum": ["float", "base64", None], "description": "float if left out."}
        request["properties"]["dimensions"] = {
            "type": ["integer", "null"],
            "minimum": 1,
            "description": "The first so many numbers of each vector, scaled to length 1. The model was evaluated with all of them.",
        }
        return request, response


@dataclass(frozen=True)
class RerankWire(Wire):
    """`POST /v1/rerank`, as Jina, Cohere and vLLM have it: documents by the cosine of their vectors with the query's."""

    ASKED_IN: ClassVar[str] = "documents"
    MORE: ClassVar[tuple[str, ...]] = ("query", "top_n", "return_documents")

    @property
    def example(self) -> str:
        return json.dumps(self.sample, ensure_ascii=False)

    def parse(self, document: Mapping[str, Any], max_inputs: int) -> Request:
        documents, top_n, returned = self._items(document, "documents", max_inputs), document.get("top_n"), document.get("return_documents")
        self._check_fields(document)
        if top_n is not None and not _is_number(top_n):
            raise RequestError(f"`top_n` is {top_n!r}", param="top_n", fix="a number of documents, 1 or more")
        if not isinstance(returned, bool | None):
            raise RequestError(f"`return_documents` is {returned!r}", param="return_documents", fix="true or false")
        if "query" not in document:
            raise RequestError("there is no `query`", param="query", fix=self.example)
        query = self._read(document["query"], "query")
        inputs = [query, *(self._read(item, f"documents[{i}]") for i, item in enumerate(documents))]
        return Request(asked_model(document), inputs, {"top_n": top_n, "return_documents": returned is not False})

    def respond(self, model: str, request: Request, answers: Sequence[Answer], labels: Sequence[str]) -> dict[str, Any]:
        query, *documents = (answer.probabilities for answer in answers)
        found = [sum(a * b for a, b in zip(query, vector, strict=True)) for vector in documents]
        texts = [example.text for example in request.inputs[1:] if isinstance(example, Text)]
        order = sorted(range(len(found)), key=lambda i: -found[i])[: request.options["top_n"]]
        told = [{"document": {"text": text}} if request.options["return_documents"] else {} for text in texts]
        results = [{"index": i, **told[i], "relevance_score": found[i]} for i in order]
        tokens = sum(answer.num_tokens for answer in answers)
        return {"id": f"rerank-{uuid.uuid4().hex}", "model": model, "results": results, "usage": {"total_tokens": tokens}}

    def schemas(self, labels: Sequence[str], limits: Limits) -> tuple[Schema, Schema]:
        documents = array_of(TEXT, minItems=1, maxItems=limits.max_inputs)
        request = object_of(
            {"query": TEXT, "documents": documents},
            model=MODEL,
            top_n={"type": ["integer", "null"], "minimum": 1},
            return_documents={"type": ["boolean", "null"], "description": "Their texts beside their scores; true if left out."},
            user=USER,
        )
        result = object_of({"index": {"type": "integer"}, "relevance_score": NUMBER}, document=object_of({"text": TEXT}))
        return request, {
            "type": "object",
            "properties": {"id": TEXT, "model": TEXT, "results": array_of(result), "usage": {"type": "object"}},
        }


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _shortened(vector: list[float], dimensions: int | None) -> list[float]:
    """The first numbers of a vector, scaled to length 1; RequestError if it has not as many."""
    if dimensions is None or dimensions == len(vector):
        return vector
    if dimensions > len(vector):
        told = f"`dimensions` is {dimensions}; this model's vectors have {len(vector)} numbers"
        raise RequestError(told, param="dimensions", fix=f"{len(vector)} or fewer, or leave it out")
    length = math.hypot(*vector[:dimensions]) or 1.0
    return [number / length for number in vector[:dimensions]]
