"""Wire types of what a masked language model and an encoder-decoder are asked: bodies in, answers out, and their JSON Schemas. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from danlu.errors import RequestError
from danlu.serve.encoder_wire import NUMBER, TEXT, Request, Schema, Wire, answers_body, array_of, object_of
from danlu.serve.engine import Answer
from danlu.serve.generation import Usage
from danlu.serve.openai.common import Wire as Body
from danlu.serve.openai.common import new_id, parse, usage_response
from danlu.spec.serve import Limits
from danlu.tasks.exchange import MAX_TOP_K, Example, Filled, Guess, MaskedText, SourceText, Written


@dataclass(frozen=True)
class FillMaskWire(Wire):
    """`POST /v1/fill_mask`: for each mask of each text what transformers' fill-mask pipeline says."""

    MORE: ClassVar[tuple[str, ...]] = ("top_k",)

    def parse(self, document: Mapping[str, Any], max_inputs: int) -> Request:
        request, top_k = super().parse(document, max_inputs), document.get("top_k")
        if top_k is None:
            return request
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= MAX_TOP_K:
            raise RequestError(f"`top_k` is {top_k!r}", param="top_k", fix=f"a number of tokens, 1 to {MAX_TOP_K}")
        asked = [replace(one, top_k=top_k) for one in request.inputs if isinstance(one, MaskedText)]
        return Request(request.model, asked, {"top_k": top_k})

    def request(self, model: str, examples: Sequence[Example]) -> dict[str, Any]:
        return {"model": model, "input": [one.text for one in examples if isinstance(one, MaskedText)]}

    def respond(self, model: str, request: Request, answers: Sequence[Answer], labels: Sequence[str]) -> dict[str, Any]:
        data = [{"index": i, "masks": _guesses(answer)} for i, answer in enumerate(answers)]
        return answers_body(self.path, model, data, answers)

    def read(self, document: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
        best = [[guesses[0] for guesses in found["masks"]] for found in document["data"]]
        return [(" ".join(one["token_str"].strip() for one in some), [one["score"] for one in some]) for some in best]

    def schemas(self, labels: Sequence[str], limits: Limits) -> tuple[Schema, Schema]:
        request, response = super().schemas(labels, limits)
        request["properties"]["top_k"] = {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_TOP_K, "description": "5 if left out."}
        whole = {"type": "string", "description": "The text with the token in it, where it has one mask."}
        guess = object_of({"token": {"type": "integer"}, "token_str": {"type": "string"}, "score": NUMBER}, sequence=whole)
        response["properties"]["data"] = array_of(object_of({"index": {"type": "integer"}, "masks": array_of(array_of(guess))}))
        return request, response


def _guesses(answer: Answer) -> list[list[dict[str, Any]]]:
    assert isinstance(answer.prediction, Filled)
    return [[_told(guess) for guess in guesses] for guesses in answer.prediction.masks]


def _told(guess: Guess) -> dict[str, Any]:
    return {name: value for name, value in asdict(guess).items() if value is not None}


class WritingRequest(Body):
    """The body of a completion that an encoder-decoder writes. How it searches is the task's: `num_beams`, and no drawing."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "NAME", "prompt": "Wheat exports rose."}]})

    model: str | None = None
    """A name from `GET /v1/models`, or nothing."""
    prompt: str | Annotated[list[str], Field(min_length=1)]
    """A text, or several."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """What is written is cut there. Left out: as many as the task learned to write."""
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    """One answer for each text."""
    temperature: Annotated[float, Field(ge=0, le=0)] | None = None
    """Nothing is drawn."""
    stream: Annotated[bool, Field(json_schema_extra={"const": False})] | None = None
    """Answers come whole."""
    user: str | None = None
    """Taken, not looked at."""


@dataclass(frozen=True)
class CompletionsWire(Wire):
    """`POST /v1/completions`, OpenAI's: a text for each prompt."""

    ASKED_IN: ClassVar[str] = "prompt"

    @property
    def example(self) -> str:
        return json.dumps({"model": "NAME", "prompt": self.sample}, ensure_ascii=False)

    def parse_body(self, body: bytes, max_inputs: int) -> Request:
        asked = parse(WritingRequest, body)
        if asked.stream:
            raise RequestError("`stream` is true, and what an encoder-decoder writes comes whole", param="stream", fix="leave it out")
        request = self.parse({"model": asked.model, self.ASKED_IN: asked.prompt}, max_inputs)
        return replace(request, inputs=[replace(one, max_tokens=asked.max_tokens) for one in request.inputs if isinstance(one, SourceText)])

    def request(self, model: str, examples: Sequence[Example]) -> dict[str, Any]:
        return {"model": model, "prompt": [one.text for one in examples if isinstance(one, SourceText)]}

    def respond(self, model: str, request: Request, answers: Sequence[Answer], labels: Sequence[str]) -> dict[str, Any]:
        choices, made = [], 0
        for i, answer in enumerate(answers):
            written = answer.prediction
            assert isinstance(written, Written)
            choices.append({"index": i, "text": written.label, "logprobs": None, "finish_reason": written.finish_reason})
            made += written.num_tokens
        head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model}
        usage = Usage(sum(answer.num_tokens for answer in answers), 0, made)
        return {**head, "choices": choices, "usage": usage_response(usage)}

    def read(self, document: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
        return [(choice["text"], []) for choice in document["choices"]]

    def schemas(self, labels: Sequence[str], limits: Limits) -> tuple[Schema, Schema]:
        choice = object_of(
            {
                "index": {"type": "integer"},
                "text": {"type": "string"},
                "logprobs": {"type": "null"},
                "finish_reason": {"enum": ["stop", "length"], "description": "length: it was cut at max_tokens."},
            }
        )
        shared = {"id": TEXT, "object": {"const": "text_completion"}, "created": {"type": "integer"}, "model": TEXT}
        properties = {**shared, "choices": array_of(choice), "usage": {"type": "object"}}
        return WritingRequest.model_json_schema(), {"type": "object", "required": list(properties), "properties": properties}
