"""Fakes that answer at a settable speed, without a model: for load tests of everything around the engine."""

from __future__ import annotations

import asyncio
import codecs
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from danlu import traces
from danlu.errors import ModelError, RequestError, ResourceError
from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.serve.engine import Answer
from danlu.serve.generation import Chat, Delta, FinishReason, Generation, Guide, Prompt, TokenLogprob, Usage
from danlu.serve.openai.tools import CLOSE, OPEN, CallDelta, Content, ToolCallParser
from danlu.spec.serve import Echo, EchoText
from danlu.spec.task import Classification
from danlu.tasks.exchange import Example, Prediction, Text

END = 256
ROLES = {"system": 257, "user": 258, "assistant": 259, "tool": 260}
NAMES = {END: "<|end|>"} | {token: f"<|{role}|>" for role, token in ROLES.items()}
VOCABULARY = 261
"""A token is a byte of UTF-8, the end of a text, or the begin of a message."""


class EchoEngine:
    """The same text always gets the same label: its length decides."""

    def __init__(self, spec: Echo) -> None:
        self.spec, self.labels, self.task = spec, list(spec.labels), Classification()
        self.running = False

    async def start(self) -> None:
        self.running = True

    async def predict(self, inputs: Sequence[Example]) -> list[Answer]:
        with traces.span("forward", {"danlu.inputs": len(inputs)}):
            if self.spec.latency_ms:
                await asyncio.sleep(self.spec.latency_ms / 1000)
        return [self._answer(one) for one in inputs if isinstance(one, Text)]

    def check_health(self) -> None:
        if not self.running:
            raise ResourceError("the echo engine is not running")

    async def stop(self) -> None:
        self.running = False

    def _answer(self, one: Text) -> Answer:
        chosen = (len(one.text) + len(one.text_pair or "")) % len(self.labels)
        probabilities = [float(i == chosen) for i in range(len(self.labels))]
        return Answer(Prediction(self.labels[chosen], probabilities), len(one.text.split()))


class EchoTextEngine:
    """Repeats the last message of a chat, or the whole of a plain prompt; a guide's smallest document where one is given.

    With `ignore_eos`, and until `min_tokens`, it begins again. An adapter puts `[its name] ` before. Nothing is drawn, so a temperature
    and penalties change nothing. What a prompt begins with like the one before it counts as cached.
    """

    def __init__(self, spec: EchoText) -> None:
        self.spec, self.max_model_len = spec, spec.max_model_len
        self.loaded: dict[str, str] = {}
        self.running, self.active, self.idle = False, 0, asyncio.Event()
        self.idle.set()
        self.last_prompt: Sequence[int] = ()
        self.queried = self.hit = 0

    async def start(self) -> None:
        for name, source in self.spec.adapters.items():
            await self.load_adapter(name, source)
        self.running = True

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta]:
        """As TextEngine has it."""
        began, sampling = asyncio.get_running_loop().time(), generation.sampling
        prompt = self.tokenize(generation.prompt)
        room = self.max_model_len - len(prompt)
        if not prompt or room < 0:
            raise RequestError(f"the prompt has {len(prompt)} tokens; 1 to {self.max_model_len} fit", param="prompt", fix="another prompt")
        if generation.adapter is not None and generation.adapter not in self.loaded:
            raise RequestError(f"there is no adapter {generation.adapter!r}", status=404, param="model", fix=str(self.adapters()))
        self.check_health()
        answer = _answer(prompt, generation)
        limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        read = _prompt_logprobs(prompt, sampling.logprobs or 0) if sampling.prompt_logprobs else ()
        text, num_tokens = _Text(sampling.stop), 0
        cached = self._cached(prompt)
        reason: FinishReason | None = None if limit else "length"
        begun: float | None = time.perf_counter()  # nobody waits here
        self.active += 1
        self.idle.clear()
        try:
            if not limit:
                await self._wait_until(began, 0)
                yield Delta(prompt_logprobs=read, finish_reason=reason, usage=Usage(len(prompt), cached, 0), begun=begun)
            while reason is None:
                await self._wait_until(began, num_tokens)
                token = _token(answer, num_tokens, endless=sampling.ignore_eos or num_tokens < sampling.min_tokens)
                num_tokens += 1
                piece = text.add(token)
                if token == END or token in sampling.stop_token_ids or text.stopped:
                    reason = "stop"
                elif num_tokens == limit:
                    reason = "length"
                logprobs = (_logprob(token, sampling.logprobs),) if sampling.logprobs is not None else ()
                usage = Usage(len(prompt), cached, num_tokens) if reason else None
                yield Delta(piece + (text.rest() if reason else ""), (token,), logprobs, read, reason, usage, begun)
                read, begun = (), None
        finally:
            self.active -= 1
            if not self.active:
                self.idle.set()

    def tokenize(self, prompt: Prompt) -> list[int]:
        match prompt:
            case str():
                return list(prompt.encode())
            case Chat():
                return _render(prompt)
        if bad := next((token for token in prompt if not 0 <= token < VOCABULARY), None):
            raise RequestError(f"there is no token {bad}", param="prompt", fix=f"0 to {VOCABULARY - 1}")
        return list(prompt)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        self.tokenize(tuple(token_ids))
        raw = b"".join(NAMES[token].encode() if token in NAMES else bytes([token]) for token in token_ids)
        return raw.decode("utf-8", "replace")

    async def load_adapter(self, name: str, source: str, *, in_place: bool = False) -> None:
        """As TextEngine has it."""
        if not Path(source).is_dir():
            raise ModelError(f"{source} is not a folder", where=name, fix="a PEFT folder or a bundle")
        self.loaded[name] = source

    async def unload_adapter(self, name: str) -> None:
        if self.loaded.pop(name, None) is None:
            raise ModelError(f"there is no adapter {name!r}", where=name, fix=str(self.adapters()))

    def adapters(self) -> list[str]:
        return list(self.loaded)

    def stats(self) -> Mapping[Metric, float]:
        return {
            catalog.SERVE_RUNNING: self.active,
            catalog.SERVE_WAITING: 0,
            catalog.SERVE_CACHE_USE: 0,
            catalog.SERVE_PREFIX_QUERIED: self.queried,
            catalog.SERVE_PREFIX_HIT: self.hit,
        }

    def check_health(self) -> None:
        if not self.running:
            raise ResourceError("the echo engine is not running")

    async def stop(self) -> None:
        self.running = False
        await self.idle.wait()

    def _cached(self, prompt: Sequence[int]) -> int:
        pairs = enumerate(zip(prompt[:-1], self.last_prompt, strict=False))
        same = next((i for i, (one, other) in pairs if one != other), min(len(prompt) - 1, len(self.last_prompt)))
        self.last_prompt, self.queried, self.hit = prompt, self.queried + len(prompt), self.hit + same
        return same

    async def _wait_until(self, began: float, num_tokens: int) -> None:
        """By the clock and not by adding up sleeps, so that the speed is the asked-for one however busy the loop is."""
        due = began + (self.spec.time_to_first_token_ms + num_tokens * self.spec.time_per_output_token_ms) / 1000
        await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))


class _Text:
    """Bytes in, text out: whole characters only, and nothing that may still become a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.stopped = stops, "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        self.held += "" if token in NAMES else self.decoder.decode(bytes([token]))
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.held, self.stopped = self.held[: min(found)], True
        keep = 0 if self.stopped else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return piece

    def rest(self) -> str:
        """What was held back, at the end."""
        return "" if self.stopped else self.held + self.decoder.decode(b"", final=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _render(chat: Chat) -> list[int]:
    ids: list[int] = []
    if chat.tools:
        ids += [ROLES["system"], *json.dumps(list(chat.tools)).encode(), END]
    for message in chat.messages:
        if message["role"] not in ROLES:
            raise RequestError(f"the chat template knows no role {message['role']!r}", param="messages", fix=", ".join(ROLES))
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
        content = str(message.get("content") or "") + "".join(f"<tool_call>{call}</tool_call>" for call in calls)
        ids += [ROLES[message["role"]], *content.encode(), END]
    return [*ids, ROLES["assistant"]]


def _answer(prompt: Sequence[int], generation: Generation) -> bytes:
    """What is said: the guide's document, or the bytes of the last message, its calls valid where they have to be."""
    guide = generation.guide
    if guide is not None and guide.kind != "tool_calls":
        return _guided(guide).encode()
    begins = [at for at, token in enumerate(prompt) if token in NAMES and token != END]
    last = prompt[begins[-2] + 1 :] if len(begins) > 1 else prompt
    named = f"[{generation.adapter}] " if generation.adapter else ""
    said = named.encode() + bytes(token for token in last if token < END)
    return said if guide is None else _called(said.decode("utf-8", "replace"), guide).encode()


def _token(answer: bytes, index: int, *, endless: bool) -> int:
    if index < len(answer) or (endless and answer):
        return answer[index % len(answer)]
    return END


def _logprob(token: int, num_top: int) -> TokenLogprob:
    """Made up, and the same each time: the token is the most probable one, the others follow it."""
    first = -(1 + token % 7) / 2
    others = ((token + i) % VOCABULARY for i in count())
    top = tuple((other, _token_text(other), first - 2 * i) for i, other in zip(range(num_top), others, strict=False))
    return TokenLogprob(token, _token_text(token), first, top)


def _prompt_logprobs(prompt: Sequence[int], num_top: int) -> tuple[TokenLogprob, ...]:
    first = TokenLogprob(prompt[0], _token_text(prompt[0]), None)
    return (first, *(_logprob(token, max(num_top, 1)) for token in prompt[1:]))


def _token_text(token: int) -> str:
    return NAMES[token] if token in NAMES else bytes([token]).decode("utf-8", "replace")


def _guided(guide: Guide) -> str:
    match guide.kind:
        case "choice":
            return str(json.loads(guide.pattern)[0])
        case "json_object":
            return '{"echo": true}'
        case "json_schema":
            try:
                schema = json.loads(guide.pattern)
                return json.dumps(_instance(schema, schema), ensure_ascii=False)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                raise RequestError(f"the JSON Schema cannot be followed: {error}", param=guide.param, fix="a simpler one") from error
    raise RequestError("the echo engine follows no regular expression", param=guide.param, fix="a JSON Schema or choices")


def _called(text: str, guide: Guide) -> str:
    """A text with its calls written anew, each with the smallest arguments; or the guide's document, where it has one and there is none."""
    asked = json.loads(guide.pattern)
    tools, answer = asked["tools"], asked["answer"]
    parser = ToolCallParser(tools)
    pieces = parser.feed(text) + parser.end()
    called = [piece.name for piece in pieces if isinstance(piece, CallDelta) and piece.name in tools]
    calls = [{"name": name, "arguments": _instance(tools[name], tools[name])} for name in called]
    if answer is not None:
        text = "" if calls else json.dumps(_instance(answer, answer), ensure_ascii=False)
    elif calls:
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    return text + "".join(f"{OPEN}{json.dumps(call, ensure_ascii=False)}{CLOSE}" for call in calls)


def _instance(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """A small document that fits a simple schema."""
    if "$ref" in schema:
        found: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return _instance(found, root)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return _instance(schema[key][0], root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    match schema.get("type", "object"):
        case "object":
            fields = schema.get("properties", {})
            return {name: _instance(fields.get(name, {}), root) for name in schema.get("required", ())}
        case "array":
            return [_instance(schema.get("items", {}), root) for _ in range(schema.get("minItems", 0))]
        case "string":
            return "echo".ljust(schema.get("minLength", 0), "o")[: schema.get("maxLength")]
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return True
    return None
