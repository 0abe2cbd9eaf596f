"""`/v1/completions`: prompts as texts or token ids in, their continuations out; with `echo` and `logprobs` for evaluation harnesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from danlu.errors import RequestError
from danlu.serve.generation import Delta, TokenLogprob, Usage
from danlu.serve.openai.common import TextEvents, Wire, event, parse, usage_response
from danlu.serve.openai.sampling import SamplingFields, check_stream_options
from danlu.spec.base import ModelName

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """The body of a completion."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "NAME", "prompt": "Once upon a time"}]})

    prompt: Prompts
    """A text, token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """16 if left out. With `echo`, 0 only reads the prompt."""
    echo: bool | None = None
    """The prompt before its continuation, also in `logprobs`."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def parse_completion(body: bytes) -> CompletionRequest:
    """The request in a body; RequestError names the field, the rule and what would work."""
    request = parse(CompletionRequest, body)
    check_stream_options(request)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("`max_tokens` is 0: nothing would be answered", param="max_tokens", fix="1 or more, or echo: true")
    return request


def prompts(request: CompletionRequest) -> list[str | tuple[int, ...]]:
    """Each prompt, as the engine takes it."""
    given = request.prompt
    if isinstance(given, str):
        return [given]
    ids = [item for item in given if isinstance(item, int)]
    if ids:
        return [tuple(ids)]
    return [item if isinstance(item, str) else tuple(item) for item in given if not isinstance(item, int)]


class Choices:
    """The choices of an answer, whole or as a stream's events. `echoed` has a text for each choice to put before it."""

    def __init__(self, request: CompletionRequest, head: Mapping[str, Any], echoed: Sequence[str]) -> None:
        self.request, self.head = request, {**head, "object": "text_completion"}
        self.unsent, self.offsets = list(echoed), [0] * len(echoed)
        plain = {"text": TextEvents.HOLE, "logprobs": None, "finish_reason": None}
        self.plain = [TextEvents(self._chunk({"index": i} | plain)) for i in range(len(echoed))]

    def response(self, answers: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return {**self.head, "choices": choices, "usage": usage_response(usage)}

    def add(self, index: int, delta: Delta) -> bytes:
        if not (delta.text or delta.logprobs or delta.finish_reason or self.unsent[index]):
            return b""
        if delta.finish_reason or self.request.logprobs is not None or self.unsent[index]:
            return event(self._chunk(self._choice(index, delta)))
        return self.plain[index].event(delta.text)

    def usage(self, usage: Usage) -> bytes:
        return event({**self.head, "choices": [], "usage": usage_response(usage)})

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": [choice], **({"usage": None} if self.request.includes_usage else {})}

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        echoed, self.unsent[index] = self.unsent[index], ""
        logprobs = None
        if self.request.logprobs is not None:
            logprobs, self.offsets[index] = _logprobs(delta.prompt_logprobs + delta.logprobs, self.offsets[index])
        return {"index": index, "text": echoed + delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
    """OpenAI's older form, and where the next token begins."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
    }, offset


def _top(token: TokenLogprob) -> dict[str, float] | None:
    """Text -> log probability; of two tokens with one text, the more probable one. The token itself is always there."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for _, text, logprob in (*token.top, (token.token_id, token.text, token.logprob)):
        found[text] = max(logprob, found.get(text, logprob))
    return found


class TokenizeRequest(Wire):
    """The body of `/tokenize`, vLLM's: a text."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "a text"}]})

    model: str | None = None
    prompt: str


class DetokenizeRequest(Wire):
    """The body of `/detokenize`, vLLM's."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [1, 2, 3]}]})

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class LoadAdapterRequest(Wire):
    """The body of `/v1/load_lora_adapter`, vLLM's."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "NAME", "lora_path": "/a/folder"}]})

    lora_name: ModelName
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False
    """Take the place of a loaded adapter with that name."""


class UnloadAdapterRequest(Wire):
    """The body of `/v1/unload_lora_adapter`, vLLM's."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "NAME"}]})

    lora_name: Annotated[str, Field(min_length=1)]
    lora_int_id: int | None = None
