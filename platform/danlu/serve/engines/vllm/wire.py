"""Generation -> the body of vLLM's `/v1/completions`; its events -> Deltas. Pure."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from danlu.errors import DanluError, RequestError, ResourceError
from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.serve.engines.vllm.command import BASE
from danlu.serve.generation import Delta, FinishReason, Generation, Guide, TokenLogprob, Usage

TokenText = Callable[[int], str]
"""A token's own text."""

GAUGES: dict[str, Metric] = {
    "vllm:num_requests_waiting": catalog.SERVE_WAITING,
    "vllm:kv_cache_usage_perc": catalog.SERVE_CACHE_USE,
    "vllm:prefix_cache_queries_total": catalog.SERVE_PREFIX_QUERIED,
    "vllm:prefix_cache_hits_total": catalog.SERVE_PREFIX_HIT,
}
"""vLLM's metric -> the catalogue's. What else it counts, the gateway counts for every engine."""


def body(generation: Generation, prompt: Sequence[int], *, max_tokens: int, end_ids: Sequence[int]) -> dict[str, Any]:
    """What vLLM is asked. RequestError for a guide that cannot be read."""
    s = generation.sampling
    asked: dict[str, Any] = {
        "model": generation.adapter or BASE,
        "prompt": list(prompt),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "max_tokens": max_tokens,
        "min_tokens": s.min_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        "min_p": s.min_p,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "repetition_penalty": s.repetition_penalty,
        "seed": s.seed,
        "stop": list(s.stop),
        # What ends a turn is said here, as the bundle and the tokenizer have it, and not left to the model's files.
        "stop_token_ids": [*s.stop_token_ids, *([] if s.ignore_eos else end_ids)],
        "ignore_eos": s.ignore_eos,
        # The prompt's log probabilities come with an echo; one that makes no token is an echo alone.
        "echo": s.prompt_logprobs or max_tokens == 0,
        "logprobs": (s.logprobs or 0) if s.prompt_logprobs else s.logprobs,
    }
    if s.logit_bias:
        asked["logit_bias"] = {str(token): bias for token, bias in s.logit_bias.items()}
    if generation.guide is not None:
        asked["structured_outputs"] = _guide(generation.guide)
    return asked


async def deltas(chunks: AsyncIterator[bytes], generation: Generation, num_prompt: int, text: TokenText) -> AsyncGenerator[Delta]:
    """A stream's pieces: the terminal one comes with the usage, which vLLM tells in an event of its own. Errors are raised."""
    reader = _Reader(generation, num_prompt, text)
    last: Delta | None = None
    async for event in events(chunks):
        _raise_if_error(event)
        for choice in event["choices"]:
            delta = reader.delta(choice)
            if delta.finish_reason is None:
                yield delta
            else:
                last = delta
        if event.get("usage") and last is not None:
            yield reader.ended(last, event["usage"])
            return
    raise ResourceError("vLLM's answer broke off")


async def events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[dict[str, Any]]:
    """Server-sent events, however the bytes were cut."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])


def error(status: int, content: bytes) -> DanluError:
    """What an answer that is not 200 says: the client's fault, or the server's."""
    try:
        found = json.loads(content)["error"]
        message, param = str(found["message"]), found.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = content[:500].decode("utf-8", "replace") or "no reason given", None
    if status in (400, 404, 413, 422):
        return RequestError(message, param=param if isinstance(param, str) else None)
    return ResourceError(f"vLLM answered with {status}: {message}")


def numbers(metrics: str) -> dict[Metric, float]:
    """Of vLLM's page of metrics, those that the catalogue has, added up over its engines."""
    found: dict[Metric, float] = {}
    for line in metrics.splitlines():
        name, _, rest = line.partition("{")
        if name in GAUGES:
            found[GAUGES[name]] = found.get(GAUGES[name], 0.0) + float(rest.rpartition(" ")[2])
    return found


@dataclass
class _Reader:
    """One answer's events."""

    generation: Generation
    num_prompt: int
    text: TokenText
    has_begun: bool = False

    def delta(self, choice: Mapping[str, Any]) -> Delta:
        sampling = self.generation.sampling
        ids = tuple(choice.get("token_ids") or ())
        logprobs = self._logprobs(choice.get("logprobs"))
        read: tuple[TokenLogprob, ...] = ()
        if sampling.prompt_logprobs and not self.has_begun:
            read, logprobs = logprobs[: self.num_prompt], logprobs[self.num_prompt :]
        self.has_begun = True
        reason = choice.get("finish_reason")
        if reason is not None and reason not in get_args(FinishReason):
            raise ResourceError(f"vLLM ended the answer: {reason}")
        if sampling.max_tokens == 0:
            return Delta(prompt_logprobs=read, finish_reason="length")
        return Delta(choice["text"], ids, logprobs if sampling.logprobs is not None else (), read, reason)

    def ended(self, last: Delta, usage: Mapping[str, Any]) -> Delta:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        made = 0 if self.generation.sampling.max_tokens == 0 else int(usage["completion_tokens"])
        counted = Usage(self.num_prompt, int(cached), made)
        return Delta(last.text, last.token_ids, last.logprobs, last.prompt_logprobs, last.finish_reason, counted)

    def _logprobs(self, found: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
        if found is None:
            return ()
        tops = found.get("top_logprobs") or [None] * len(found["tokens"])
        return tuple(self._one(*row) for row in zip(found["tokens"], found["token_logprobs"], tops, strict=True))

    def _one(self, token: str, logprob: float | None, top: Mapping[str, float] | None) -> TokenLogprob:
        own, number = _id(token), self.generation.sampling.logprobs or 0
        best = sorted((top or {}).items(), key=lambda one: -one[1])[:number]
        return TokenLogprob(own, self.text(own), logprob, tuple((_id(one), self.text(_id(one)), value) for one, value in best))


def _id(token: str) -> int:
    """`token_id:17`"""
    return int(token.removeprefix("token_id:"))


def _guide(guide: Guide) -> dict[str, Any]:
    match guide.kind:
        case "json_object":
            return {"json_object": True}
        case "regex":
            return {"regex": guide.pattern}
        case "tool_calls":
            return {"grammar": guide.pattern}  # the engine has written it out
    try:
        pattern = json.loads(guide.pattern)
    except ValueError as error:
        raise RequestError(
            f"the {guide.kind} cannot be followed: it is not JSON: {error}", param=guide.param, fix="a simpler one"
        ) from error
    return {"json" if guide.kind == "json_schema" else "choice": pattern}


def _raise_if_error(event: Mapping[str, Any]) -> None:
    if found := event.get("error"):
        raise error(int(found.get("code") or 500), json.dumps({"error": found}).encode())
