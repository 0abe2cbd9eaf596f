"""The engine: a TextEngine whose answers vLLM gives, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import aiohttp

from danlu.artifact.bundle import Bundle
from danlu.errors import DanluError, ModelError, RequestError, ResourceError
from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.serve.engines.torch.requests import Reader
from danlu.serve.engines.vllm import wire
from danlu.serve.engines.vllm.adapters import servable_folder
from danlu.serve.engines.vllm.child import Child
from danlu.serve.engines.vllm.command import command, environment, has_lora, interpreter
from danlu.serve.engines.vllm.model import Files, find, make_reader
from danlu.serve.engines.vllm.probes import check_probes
from danlu.serve.generation import Delta, Generation, Prompt, Sampling, TokenLogprob
from danlu.spec.vllm import Vllm

LOOK_EVERY_S = 1.0
"""Between two looks at vLLM's health and metrics."""
SILENCE_S = 60.0
"""Without an answer to that, it is stuck: the replica is replaced."""
ASK_S = 30.0
"""For an answer that takes no computing, and for the news of a process's end."""
KEEP_S = 2.0
"""An idle connection is used again. vLLM closes its end after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE): what is sent just then is lost."""


class VllmEngine:
    """A TextEngine. All of it belongs to the event loop that `start` was called on."""

    def __init__(self, spec: Vllm, bundle: Bundle | None = None, *, storage: str = "runs") -> None:
        self.spec, self.bundle, self.storage = spec, bundle, storage
        self.max_model_len = 0
        self.failure: str | None = None
        self.child: Child | None = None
        self.stopping = False
        self.using: Counter[str | None] = Counter()
        """Answers that are being made, by adapter; None is the base model's."""
        self.changed = asyncio.Event()
        self.loaded: dict[str, str] = {}
        self.loading: set[str] = set()
        self.told: dict[Metric, float] = {}
        self.looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        python = interpreter(self.spec)
        files = await asyncio.to_thread(find, self.spec, self.bundle)
        self.base = files.folder
        child = self.child = Child(
            lambda folder: command(self.spec, python, files.folder, folder / "s", dtype=files.dtype),
            environment(self.spec, python, os.environ),
            self._has_ended,
        )
        connector = aiohttp.UnixConnector(str(child.folder / "s"), limit=0, keepalive_timeout=KEEP_S)
        self.session = aiohttp.ClientSession("http://vllm", connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        try:
            await self._until_it_answers(child)
            card = (await self._ask("GET", "/v1/models"))["data"][0]
            self.max_model_len = int(card["max_model_len"])
            self.reader: Reader = await asyncio.to_thread(make_reader, files.folder, self.max_model_len)
            for name, source in self.spec.adapters.items():
                await self.load_adapter(name, source)
            await self._check_probes(files)
        except BaseException:
            await self._close()
            raise
        self.looking = asyncio.create_task(self._look())

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta]:
        self.check_health()
        if self.stopping:
            raise ResourceError("the engine is stopping")
        adapter = generation.adapter
        if adapter is not None and adapter not in self.loaded:
            raise RequestError(f"there is no adapter {adapter!r}", status=404, kind="not_found_error", param="model")
        if generation.guide is not None and generation.guide.kind == "tool_calls":
            grammar = await asyncio.to_thread(lambda guide: self.reader.guides.lark(guide), generation.guide)
            generation = replace(generation, guide=replace(generation.guide, pattern=grammar))
        # Refused in the words of Danlu's own engine; the guide is vLLM's to compile.
        asked = self.reader.sequence(replace(generation, guide=None), None)
        body = wire.body(generation, asked.tokens, max_tokens=asked.max_tokens, end_ids=self.reader.end_ids)
        with self._use(adapter):
            try:
                async with self.session.post("/v1/completions", json=body) as response:
                    if response.status != 200:
                        raise self._named(wire.error(response.status, await response.read()), generation)
                    chunks = response.content.iter_any()
                    async with aclosing(wire.deltas(chunks, generation, len(asked.tokens), self.reader.token_text)) as deltas:
                        async for delta in deltas:
                            yield delta
            except aiohttp.ClientError as error:
                raise await self._lost(error) from error

    def tokenize(self, prompt: Prompt) -> list[int]:
        self.check_health()
        return self.reader.tokenize(prompt)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        self.check_health()
        return self.reader.detokenize(token_ids)

    async def load_adapter(self, name: str, source: str, *, in_place: bool = False) -> None:
        self.check_health()
        if not has_lora(self.spec):
            raise ModelError(
                f"{name!r} cannot be loaded: vLLM was started without LoRA", where=name, fix="engine.allow_runtime_lora_updating: true"
            )
        if name in self.loading or (name in self.loaded and not in_place):
            raise ModelError(f"the adapter {name!r} is loaded already", where=name, fix="unload it first, or another name")
        self.loading.add(name)
        try:
            rank = self.spec.max_lora_rank
            folder = await asyncio.to_thread(servable_folder, source, name, self.storage, self.bundle, base=self.base, max_lora_rank=rank)
            if name in self.loaded:
                await self.unload_adapter(name)
                self.loading.add(name)
            try:
                await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, timeout_s=None)
            except DanluError as error:
                self.check_health()
                raise ModelError(f"vLLM cannot load {source}: {error.problem}", where=name, fix="an adapter of this very model") from error
            self.loaded[name] = source
        finally:
            self.loading.discard(name)

    async def unload_adapter(self, name: str) -> None:
        self.check_health()
        if self.loaded.pop(name, None) is None:  # from now on nobody is answered by it who has not begun
            raise ModelError(f"there is no adapter {name!r}", where=name, fix=f"one of {self.adapters()}")
        self.loading.add(name)
        try:
            await self._until(lambda: not self.using[name])
            await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        finally:
            self.loading.discard(name)

    def adapters(self) -> list[str]:
        return list(self.loaded)

    def stats(self) -> Mapping[Metric, float]:
        """What is in flight is known here; what of that waits, and the cache, was read within the last second."""
        in_flight = self.using.total()
        waiting = min(in_flight, self.told.get(catalog.SERVE_WAITING, 0))
        return self.told | {catalog.SERVE_RUNNING: in_flight - waiting, catalog.SERVE_WAITING: waiting}

    def check_health(self) -> None:
        if self.failure is not None:
            raise ResourceError(self.failure)
        if self.child is None or not self.child.is_alive:
            raise ResourceError("the engine is not running")

    async def stop(self) -> None:
        self.stopping = True
        if self.child is not None and self.child.is_alive and self.failure is None:
            await self._until(lambda: not self.using.total())
        await self._close()

    async def _close(self) -> None:
        self.stopping = True
        if self.looking is not None:
            self.looking.cancel()
            self.looking = None
        await self.session.close()
        if self.child is not None:
            await self.child.stop()

    def _has_ended(self) -> None:
        assert self.child is not None
        if not self.stopping:
            self._fail(self.child.how_it_ended())
        self.changed.set()

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why
        self.changed.set()

    @contextmanager
    def _use(self, adapter: str | None) -> Iterator[None]:
        self.using[adapter] += 1
        try:
            yield
        finally:
            self.using[adapter] -= 1
            self.changed.set()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self.changed.clear()
            await self.changed.wait()

    async def _until_it_answers(self, child: Child) -> None:
        deadline = time.monotonic() + self.spec.start_timeout_s
        while True:
            try:
                await self._ask("GET", "/health", timeout_s=5)
                return
            except (DanluError, aiohttp.ClientError, TimeoutError):
                pass  # it is not listening yet
            if not child.is_alive:
                raise ResourceError(
                    child.how_it_ended(), where="engine", fix="what its log says; `python -m vllm.entrypoints.cli.main serve`"
                )
            if time.monotonic() > deadline:
                problem = f"vLLM has not answered within start_timeout_s={self.spec.start_timeout_s:g}: {child.how_it_ended()}"
                raise ResourceError(problem, where="engine.start_timeout_s", fix="a longer one, or what its log says")
            await asyncio.sleep(0.05)

    async def _look(self) -> None:
        """A vLLM that does not answer any more must not leave everybody waiting: health says so, and they get an error."""
        heard = time.monotonic()
        while self.failure is None:
            try:
                await self._ask("GET", "/health", timeout_s=SILENCE_S)
                self.told = wire.numbers(await self._text("/metrics"))
                heard = time.monotonic()
            except DanluError as error:
                self._fail(f"vLLM is not well: {error.problem}")
            except (aiohttp.ClientError, TimeoutError):
                if time.monotonic() - heard > SILENCE_S:
                    self._fail(f"vLLM has not answered for {SILENCE_S:g} s")
            await asyncio.sleep(LOOK_EVERY_S)
        await self.session.close()  # ends every answer that is still waited for

    async def _ask(self, method: str, path: str, body: object = None, *, timeout_s: float | None = ASK_S) -> Any:
        async with self.session.request(method, path, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s)) as response:
            content = await response.read()
            if response.status != 200:
                raise wire.error(response.status, content)
            return await response.json() if response.content_type == "application/json" and content else None

    async def _text(self, path: str) -> str:
        async with self.session.get(path, timeout=aiohttp.ClientTimeout(total=ASK_S)) as response:
            return await response.text()

    async def _lost(self, error: Exception) -> ResourceError:
        """Why an answer broke off; the news of a process's end come a moment later than the end."""
        if self.child is not None and self.failure is None:
            try:
                await asyncio.wait_for(self.child.ended.wait(), 1.0)
            except TimeoutError:
                return ResourceError(f"the connection to vLLM broke: {error!r}")
        return ResourceError(self.failure or "the engine is stopping")

    def _named(self, error: DanluError, generation: Generation) -> DanluError:
        """With our field for the guide's: vLLM names its own."""
        if isinstance(error, RequestError) and generation.guide is not None:
            return RequestError(error.problem, param=generation.guide.param, fix="a simpler one, or another kind")
        return error

    async def _check_probes(self, files: Files) -> None:
        if self.bundle is None:
            return

        async def score(ids: Sequence[int]) -> Sequence[TokenLogprob]:
            how = Sampling(max_tokens=0, temperature=0.0, logprobs=1, prompt_logprobs=True)
            found: list[TokenLogprob] = []
            async for delta in self.generate(Generation("probe", tuple(ids), how)):
                found += delta.prompt_logprobs
            return found

        await check_probes(score, self.reader, self.bundle, served_in_fp32=files.dtype == "fp32")
