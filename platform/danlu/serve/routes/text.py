"""Language models: chats, completions, tokens, adapters."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from danlu.errors import DanluError, ModelError, RequestError, ResourceError, StorageError
from danlu.metrics import catalog
from danlu.serve.admission import Admission
from danlu.serve.asgi import Call, Reply, Route, Routes, Stream
from danlu.serve.generation import Chat, Delta, Generation, TextEngine, Usage
from danlu.serve.openai.chat import ChatChunks, chat_response, conversation, parse_chat, tool_guide
from danlu.serve.openai.common import DONE, ModelCard, error_response, event, new_id, parse
from danlu.serve.openai.completions import (
    Choices,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    parse_completion,
    prompts,
)
from danlu.serve.openai.sampling import SamplingFields, generations, guide, sampling
from danlu.serve.openapi import text_paths, text_try_it
from danlu.serve.routes.predict import check_model
from danlu.serve.sequences import Sequences
from danlu.spec.serve import Limits

T = TypeVar("T")

LONG_BODY_BYTES = 8192
"""A longer body's texts are tokenised beside the event loop, which has others' tokens to send: 8 KiB take some milliseconds."""

logger = logging.getLogger("danlu.serve")


class Chunks(Protocol):
    """What makes a stream's events of what came."""

    def add(self, index: int, delta: Delta) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...


class TextApi:
    """The routes of an engine that continues texts. `updates` lets clients load and unload adapters."""

    def __init__(
        self, engine: TextEngine, model: str, limits: Limits, admission: Admission, count: Callable[..., None], *, updates: bool
    ) -> None:
        self.engine, self.model, self.limits, self.admission, self.count = engine, model, limits, admission, count
        self.updates = updates
        self.open: set[Sequences] = set()
        # One thread: a second would take the engine's cores, and long prompts would overtake each other.
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="danlu-tokenizer")
        for outcome in ("loaded", "failed"):
            # A counter that begins with its first event shows no increase.
            self.count(catalog.SERVE_ADAPTER_LOADS, 0, outcome=outcome)

    def routes(self) -> Routes:
        found = {
            "/v1/chat/completions": Route("POST", self._chat, follows_client=True),
            "/v1/completions": Route("POST", self._complete, follows_client=True),
            "/tokenize": Route("POST", self._tokenize),
            "/detokenize": Route("POST", self._detokenize),
        }
        if self.updates:
            found["/v1/load_lora_adapter"] = Route("POST", self._load_adapter)
            found["/v1/unload_lora_adapter"] = Route("POST", self._unload_adapter)
        return found

    def models(self) -> list[ModelCard]:
        length = self.engine.max_model_len
        return [ModelCard(self.model, None, None, length), *(ModelCard(name, self.model, None, length) for name in self.engine.adapters())]

    def paths(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the OpenAPI document: paths and schemas."""
        return text_paths(self.model, self.limits, updates=self.updates)

    def try_it(self) -> str:
        """A form for the docs page."""
        return text_try_it(self.model)

    def cut(self, error: RequestError) -> None:
        """End what is still being answered; each stream ends with this error."""
        for sequences in list(self.open):
            sequences.fail(error)

    async def _chat(self, call: Call) -> Reply | Stream:
        request = parse_chat(call.body)
        name, adapter = self._model(request.model, call)
        (prompt,) = await self._read(call, [conversation(request)], request.limit, param="messages", limit_param=request.limit_param)
        how = sampling(request, max_tokens=request.limit, logprobs=request.num_logprobs)
        head = _head("chatcmpl-", name)
        call.facts["answer_id"] = head["id"]
        asked = generations([prompt], request.n or 1, head["id"], how, adapter, guide(request, tool_guide(request)))
        sequences = await self._start(call, asked, request.n or 1)
        if request.stream:
            return await self._stream(request, sequences, ChatChunks(request, head, len(asked)))
        return Reply(chat_response(request, head, await sequences.whole(), sequences.usage()))

    async def _complete(self, call: Call) -> Reply | Stream:
        request = parse_completion(call.body)
        name, adapter = self._model(request.model, call)
        n, limit = request.n or 1, 16 if request.max_tokens is None else request.max_tokens
        given = prompts(request)
        read = await self._read(call, given, limit, param="prompt")
        reads_prompt = bool(request.echo) and request.logprobs is not None
        how = sampling(request, max_tokens=limit, logprobs=request.logprobs, prompt_logprobs=reads_prompt)
        head = _head("cmpl-", name)
        call.facts["answer_id"] = head["id"]
        asked = generations(read, n, head["id"], how, adapter, guide(request))
        texts = await self._beside(call, lambda: [self._text(prompt) for prompt in given]) if request.echo else [""] * len(given)
        choices = Choices(request, head, [text for text in texts for _ in range(n)])
        sequences = await self._start(call, asked, n)
        if request.stream:
            return await self._stream(request, sequences, choices)
        return Reply(choices.response(await sequences.whole(), sequences.usage()))

    async def _tokenize(self, call: Call) -> Reply:
        request = parse(TokenizeRequest, call.body)
        self._model(request.model, call)
        ids = await self._beside(call, lambda: self.engine.tokenize(request.prompt))
        return Reply({"count": len(ids), "max_model_len": self.engine.max_model_len, "tokens": ids})

    async def _detokenize(self, call: Call) -> Reply:
        request = parse(DetokenizeRequest, call.body)
        self._model(request.model, call)
        return Reply({"prompt": await self._beside(call, lambda: self.engine.detokenize(request.tokens))})

    async def _load_adapter(self, call: Call) -> Reply:
        request = parse(LoadAdapterRequest, call.body)
        _check_may_update(call)
        there = request.lora_name in self.engine.adapters()
        if request.lora_name == self.model or (there and not request.load_inplace):
            raise RequestError(f"there is a model {request.lora_name!r} already", param="lora_name", fix="another name")
        try:
            await self.engine.load_adapter(request.lora_name, request.lora_path, in_place=request.load_inplace)
        except DanluError as error:
            self.count(catalog.SERVE_ADAPTER_LOADS, 1, outcome="failed")
            if isinstance(error, ModelError | StorageError):
                raise RequestError(error.problem, param="lora_path", fix=error.fix) from error
            raise
        self.count(catalog.SERVE_ADAPTER_LOADS, 1, outcome="loaded")
        return _told(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    async def _unload_adapter(self, call: Call) -> Reply:
        request = parse(UnloadAdapterRequest, call.body)
        _check_may_update(call)
        check_model(request.lora_name, self.engine.adapters(), None)
        await self.engine.unload_adapter(request.lora_name)
        return _told(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    async def _start(self, call: Call, asked: Sequence[Generation], n: int) -> Sequences:
        if len(asked) > self.limits.max_inputs:
            raise RequestError(
                f"{len(asked)} answers in one request; the limit is {self.limits.max_inputs}", param="n", fix="several requests"
            )
        call.stack.enter_context(self.admission.room_for(len(asked), call.key))
        sequences = Sequences(self.engine, asked, n, self.count, began=call.began, silence_s=self.limits.request_timeout_s)
        call.stack.callback(lambda: call.facts.update(sequences.facts()))
        await call.stack.enter_async_context(sequences)
        self.open.add(sequences)
        call.stack.callback(self.open.discard, sequences)
        return sequences

    async def _stream(self, request: SamplingFields, sequences: Sequences, chunks: Chunks) -> Stream:
        await sequences.first()  # what is wrong before the first token is a status, not an event
        return Stream(_events(sequences, chunks, includes_usage=request.includes_usage))

    def _model(self, name: str | None, call: Call) -> tuple[str, str | None]:
        """The name that is answered to, and the adapter's."""
        name = name or self.model
        check_model(name, [self.model, *self.engine.adapters()], call.key)
        call.facts["model"] = name
        return name, None if name == self.model else name

    async def _beside(self, call: Call, read: Callable[[], T]) -> T:
        """What `read` gives; of a long body on a thread, one after the other."""
        if len(call.body) <= LONG_BODY_BYTES:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self.reader, read)

    async def _read(
        self,
        call: Call,
        prompts: Sequence[str | tuple[int, ...] | Chat],
        max_tokens: int | None,
        *,
        param: str,
        limit_param: str = "max_tokens",
    ) -> list[tuple[int, ...]]:
        """Each prompt's ids, once for all its answers. RequestError if they do not fit."""
        read = await self._beside(call, lambda: [tuple(self.engine.tokenize(prompt)) for prompt in prompts])
        for ids in read:
            self._check_fits(len(ids), max_tokens, param, limit_param)
        return read

    def _check_fits(self, length: int, max_tokens: int | None, param: str, limit_param: str) -> None:
        room = self.engine.max_model_len
        if not length:
            raise RequestError(f"`{param}` has no tokens", param=param, fix="a text")
        if length + (1 if max_tokens is None else max_tokens) > room:
            told = "" if max_tokens is None else f" and {max_tokens} for the answer"
            fix = "a shorter one" if length >= room or not max_tokens else f"{limit_param}: {room - length}, or a shorter one"
            raise RequestError(
                f"the prompt has {length} tokens{told}; the model has {room} positions",
                param=param if length >= room else limit_param,
                code="context_length_exceeded",
                fix=fix,
            )

    def _text(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self.engine.detokenize(prompt)


async def _events(sequences: Sequences, chunks: Chunks, *, includes_usage: bool) -> AsyncGenerator[bytes]:
    """Server-sent events up to the one [DONE]; an error is an event before it."""
    end = b""
    try:
        async for batch in sequences.pieces():
            if found := b"".join(chunks.add(index, delta) for index, delta in batch.items()):
                yield found
        if includes_usage:
            end = chunks.usage(sequences.usage())
    except RequestError as error:
        end = event(error_response(error))
    except Exception as error:
        logger.exception("an answer broke off")
        end = event(error_response(engine_failed(error)))
    yield end + DONE


def engine_failed(error: Exception) -> RequestError:
    """What a client is told of a fault that is not its own: none of its insides, but what we said ourselves."""
    if isinstance(error, ResourceError):
        return RequestError(error.problem, status=503, kind="server_error", retry_after_s=1, fix=error.fix)
    return RequestError(f"the engine failed: {type(error).__name__}", status=500, kind="server_error")


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": new_id(kind), "created": int(time.time()), "model": model}


def _check_may_update(call: Call) -> None:
    if call.key is not None and "*" not in call.key.models:
        raise RequestError(
            f"the key {call.key.name!r} is for {', '.join(call.key.models)} only",
            status=403,
            kind="permission_error",
            fix="a key for all models",
        )


def _told(text: str) -> Reply:
    return Reply(text.encode(), content_type="text/plain; charset=utf-8")
