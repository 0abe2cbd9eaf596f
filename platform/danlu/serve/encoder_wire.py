"""Wire types of the encoders' routes: bodies in, answers out, and their JSON Schemas. Pure."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from danlu.errors import RequestError
from danlu.serve.engine import Answer
from danlu.serve.openai.common import unknown_field
from danlu.spec.serve import Limits
from danlu.spec.task import (
    AnsweredTask,
    Classification,
    Embed,
    ExtractiveQA,
    MultiLabelClassification,
    MultipleChoice,
    Regression,
    TokenClassification,
)
from danlu.tasks.exchange import (
    BadExample,
    Choice,
    Embedding,
    Example,
    LabelSet,
    Prediction,
    Reading,
    Span,
    Tagging,
    Text,
    TokenIds,
    Value,
    Words,
    read_example,
    to_fields,
)

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
NUMBER: Schema = {"type": "number"}


def object_of(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required), "additionalProperties": False}


def array_of(items: Schema, **limits: Any) -> Schema:
    return {"type": "array", "items": items, **limits}


@dataclass(frozen=True)
class Request:
    """What a body asks: examples of the engine's task, and what else the route takes."""

    model: str | None
    inputs: Sequence[Example]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wire:
    """A route that takes `input`, an example or a list of them, and gives `data`, an entry each, in the shape of vLLM's /v1/classify."""

    task: AnsweredTask
    path: str
    summary: str
    item: Schema
    """What `input` may be, or a list of."""
    sample: object
    """One such."""

    ASKED_IN: ClassVar[str] = "input"
    """Where the examples stand in a body."""
    MORE: ClassVar[tuple[str, ...]] = ()
    """Fields that the route takes beside them, `model` and `user`."""

    @property
    def example(self) -> str:
        return json.dumps({"model": "NAME", "input": [self.sample]}, ensure_ascii=False)

    def parse_body(self, body: bytes, max_inputs: int) -> Request:
        """The request in a body as it came."""
        return self.parse(read_json(body, self.example), max_inputs)

    def parse(self, document: Mapping[str, Any], max_inputs: int) -> Request:
        """The request in a body; RequestError names the field, the rule and what would work."""
        items, name = self._items(document, self.ASKED_IN, max_inputs), self.ASKED_IN
        self._check_fields(document)
        single = items is not document[name]
        inputs = [self._read(item, name if single else f"{name}[{i}]") for i, item in enumerate(items)]
        return Request(asked_model(document), inputs)

    def request(self, model: str, examples: Sequence[Example]) -> dict[str, Any]:
        """The body that asks `examples`."""
        return {"model": model, "input": [_item(example) for example in examples]}

    def respond(self, model: str, request: Request, answers: Sequence[Answer], labels: Sequence[str]) -> dict[str, Any]:
        """The body that answers a request."""
        data = [
            {"index": i, **entry(answer.prediction, example)}
            for i, (answer, example) in enumerate(zip(answers, request.inputs, strict=True))
        ]
        named = {"labels": list(labels)} if labels else {}
        return answers_body(self.path, model, data, answers) | named

    def read(self, document: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
        """What the answers of a body say, and the numbers behind them, as predictions hold them."""
        return [read_entry(found, self.task) for found in document["data"]]

    def schemas(self, labels: Sequence[str], limits: Limits) -> tuple[Schema, Schema]:
        """JSON Schema of the two bodies."""
        several = array_of(self.item, minItems=1, maxItems=limits.max_inputs)
        request = object_of({"input": {"anyOf": [self.item, several]}}, model=MODEL, user=USER)
        answer = {"type": "object", "properties": {"index": {"type": "integer"}, **entry_schema(self.task, labels)}}
        shared = {"id": TEXT, "object": {"const": "list"}, "created": {"type": "integer"}, "model": TEXT, "usage": {"type": "object"}}
        properties = {**shared, "data": array_of(answer), **({"labels": array_of(TEXT)} if labels else {})}
        return request, {"type": "object", "required": ["data", "model", "usage"], "properties": properties}

    def _check_fields(self, document: Mapping[str, Any]) -> None:
        """Closed, as every body here: a field that is not known is refused with the name that was meant."""
        known = [self.ASKED_IN, "model", "user", *self.MORE]
        if unknown := next((name for name in document if name not in known), None):
            raise unknown_field(unknown, known)
        if not isinstance(document.get("user"), str | None):
            raise RequestError("`user` is a text", param="user", fix="leave it out")

    def _read(self, item: object, where: str) -> Example:
        try:
            return read_example(item, self.task, where)
        except BadExample as error:
            raise RequestError(error.problem, param=error.field, fix=error.fix) from error

    def _items(self, document: Mapping[str, Any], name: str, max_inputs: int) -> list[object]:
        if name not in document:
            raise RequestError(f"there is no `{name}`", param=name, fix=self.example)
        given = document[name]
        items = given if isinstance(given, list) else [given]
        if not items:
            raise RequestError(f"`{name}` is an empty list: there is nothing to answer", param=name, fix=self.example)
        if len(items) > max_inputs:
            raise RequestError(
                f"{len(items)} texts in one request; the limit is {max_inputs}",
                status=413,
                param=name,
                fix=f"send them {max_inputs} at a time",
            )
        return items


MODEL: Schema = {"type": ["string", "null"], "description": "A name from GET /v1/models, or nothing."}
USER: Schema = {"type": ["string", "null"], "description": "Taken, not looked at."}


def read_json(body: bytes, example: str) -> dict[str, Any]:
    """The object in a body."""
    try:
        document = json.loads(body)
    except RecursionError as error:
        raise RequestError("the body is nested too deep", fix=example) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}", fix="send JSON in UTF-8") from error
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}", fix=example) from error
    if not isinstance(document, dict):
        raise RequestError(f"an object is needed, not {type(document).__name__}", fix=example)
    return document


def entry(prediction: Prediction, example: Example) -> dict[str, Any]:
    """An answer as JSON."""
    match prediction:
        case LabelSet():
            return {"labels": list(prediction.labels), "probs": prediction.probabilities, "num_classes": len(prediction.probabilities)}
        case Reading():
            told = [_span(span) for span in prediction.spans]
            # What is said, or that nothing is: the candidates stand beside it either way.
            best = told[0] if prediction.label else {"text": "", "start": None, "end": None, "score": prediction.no_answer or 0.0}
            return {
                "answer": best["text"],
                **{name: best[name] for name in ("start", "end", "score")},
                "no_answer_score": prediction.no_answer,
                "candidates": told,
            }
        case Choice():
            return {"index_of_option": prediction.index, "option": prediction.label, "probs": prediction.probabilities}
        case Tagging():
            assert isinstance(example, Words)
            words = zip(example.spans, prediction.tags, prediction.probabilities, strict=True)
            return {
                "text": example.text,
                "entities": [{"entity": span.label, **_span(span)} for span in prediction.spans],
                "tokens": [
                    {"text": example.text[start:end], "start": start, "end": end, "tag": tag, "score": score}
                    for (start, end), tag, score in words
                ],
            }
        case Embedding():
            return {"embedding": prediction.vector}
        case Value():
            return {"value": prediction.value}
        case _:
            numbers = prediction.probabilities
            return {"label": prediction.label, "probs": numbers, "num_classes": len(numbers)}


def summary(prediction: Prediction) -> dict[str, Any]:
    """An answer in a line: what it says, and how probable that is."""
    match prediction:
        case Value():
            return {"value": prediction.value}
        case LabelSet():
            return {"labels": list(prediction.labels)}
        case Tagging():
            return {"entities": [{"entity": span.label, **_span(span)} for span in prediction.spans]}
        case Embedding():
            return {"embedding": prediction.vector}
        case _:
            return {"label": prediction.label, "probability": round(prediction.probability, 4)}


def read_entry(found: Mapping[str, Any], task: AnsweredTask) -> tuple[str, list[float]]:
    """What `entry` says, as a prediction's `label` and `probabilities`."""
    match task:
        case MultiLabelClassification():
            return ", ".join(found["labels"]), found["probs"]
        case Regression():
            return f"{found['value']:.4g}", [found["value"]]
        case ExtractiveQA():
            none = found["no_answer_score"]
            return found["answer"], sorted(
                [*(one["score"] for one in found["candidates"]), *([] if none is None else [none])], reverse=True
            )
        case MultipleChoice():
            return found["option"], found["probs"]
        case TokenClassification():
            return " ".join(token["tag"] for token in found["tokens"]), [token["score"] for token in found["tokens"]]
        case Embed():
            return "", found["embedding"]
        case Classification():
            return found["label"], found["probs"]
    raise AssertionError(f"{task.kind} has a wire of its own")


def entry_schema(task: AnsweredTask, labels: Sequence[str]) -> dict[str, Schema]:
    """The properties of an answer."""
    probs = array_of(NUMBER)
    name: Schema = {"type": "string", "enum": list(labels)} if labels else TEXT
    place = {"type": ["integer", "null"]}
    span = {"text": {"type": "string"}, "start": {"type": "integer"}, "end": {"type": "integer"}, "score": NUMBER}
    match task:
        case MultiLabelClassification():
            return {"labels": array_of(name), "probs": probs | {"description": "Each label's own, in the order of `labels`."}}
        case Regression():
            return {"value": NUMBER}
        case ExtractiveQA():
            described: Schema = {
                "type": "string",
                "description": "Empty: the context has no answer. `start` and `end` are characters of it.",
            }
            none: Schema = {"type": ["number", "null"], "description": "Probability that there is no answer."}
            said = {"answer": described, "start": place, "end": place, "score": NUMBER, "no_answer_score": none}
            return {**said, "candidates": array_of(object_of(span))}
        case MultipleChoice():
            return {
                "index_of_option": {"type": "integer"},
                "option": TEXT,
                "probs": probs | {"description": "In the order of the options."},
            }
        case TokenClassification():
            tagged = {"text": TEXT, "start": {"type": "integer"}, "end": {"type": "integer"}, "tag": name, "score": NUMBER}
            return {"text": TEXT, "entities": array_of(object_of({"entity": TEXT, **span})), "tokens": array_of(object_of(tagged))}
        case Embed():
            vector = {"anyOf": [array_of(NUMBER), {"type": "string", "description": "base64 of little-endian float32"}]}
            return {"object": {"const": "embedding"}, "embedding": vector}
        case Classification():
            numbers = probs | {"description": "In the order of `labels`."}
            return {"label": name, "probs": numbers, "num_classes": {"type": "integer"}}
    return {}


def asked_model(document: Mapping[str, Any]) -> str | None:
    """The name that a body gives."""
    model = document.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError(f"`model` is a text, not {type(model).__name__}", param="model", fix="a name from GET /v1/models")
    return model


def _item(example: Example) -> object:
    match example:
        case Words():
            return {"tokens": [example.text[start:end] for start, end in example.spans]}
        case TokenIds():
            return list(example.ids)
        case Text(text_pair=None):
            return example.text
        case _:
            return to_fields(example)


def _span(span: Span) -> dict[str, Any]:
    return {"text": span.text, "start": span.start, "end": span.end, "score": span.score}


def answers_body(path: str, model: str, data: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> dict[str, Any]:
    """What every answer but OpenAI's own forms has around its `data`."""
    tokens = sum(answer.num_tokens for answer in answers)
    return {
        "id": f"{path.rpartition('/')[2]}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": list(data),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }
