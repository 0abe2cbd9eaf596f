"""The answers of one request while the engine makes them: started together, gathered, metered once for every engine, ended together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from danlu import traces
from danlu.errors import RequestError
from danlu.metrics import catalog
from danlu.serve.generation import Delta, Generation, TextEngine, Usage
from danlu.serve.patience import Patience

Count = Callable[..., None]

WINDOW_S = 0.005
"""An engine that is faster than this is not followed token by token: what came meanwhile is sent together (1.55x the tokens per second)."""


class Sequences:
    """An async context: inside, `whole` or `pieces`; at its end what still runs is cancelled.

    There are `n` answers for each prompt, in order. `silence_s` bounds the wait for a first token, and from one to the next.
    `count(metric, value, **labels)` meters.
    """

    def __init__(
        self, engine: TextEngine, generations: Sequence[Generation], n: int, count: Count, *, began: float, silence_s: float
    ) -> None:
        self.engine, self.generations, self.n, self.count = engine, generations, n, count
        self.began, self.silence_s = began, silence_s
        self.pending: dict[int, list[Delta]] = {}
        self.finished: dict[int, Delta] = {}
        self.came = asyncio.Event()
        self.error: Exception | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.num_made = 0
        self.first_token_s: float | None = None
        self.waited_s: float | None = None

    async def __aenter__(self) -> Sequences:
        self.tasks = [asyncio.create_task(self._follow(i, one)) for i, one in enumerate(self.generations)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def fail(self, error: Exception) -> None:
        """End all of it; whoever waits is told."""
        self.error = self.error or error
        for task in self.tasks:
            task.cancel()
        self.came.set()

    async def first(self) -> None:
        """Until something came. Raises what went wrong before."""
        await self.came.wait()
        if self.error is not None:
            raise self.error

    async def whole(self) -> list[Delta]:
        """Every answer in one piece."""
        await asyncio.wait(self.tasks)
        if self.error is not None:
            raise self.error
        return [_joined(self.pending[i]) for i in range(len(self.generations))]

    async def pieces(self) -> AsyncGenerator[dict[int, Delta]]:
        """What came for each answer since the last time. Raises what went wrong after all that came before."""
        sent = 0.0
        while self.pending or len(self.finished) < len(self.generations):
            await self.came.wait()
            if (wait := sent + WINDOW_S - time.perf_counter()) > 0 and len(self.finished) < len(self.generations) and not self.error:
                await asyncio.sleep(wait)
            self.came.clear()
            batch, self.pending = self.pending, {}
            sent = time.perf_counter()
            if batch:
                yield {index: _joined(deltas) for index, deltas in batch.items()}
            if self.error is not None:
                raise self.error

    def usage(self) -> Usage:
        """Of all answers; a prompt counts once."""
        found = [self.finished[i].usage or Usage(0, 0, 0) for i in range(len(self.generations))]
        return Usage(
            prompt_tokens=sum(one.prompt_tokens for one in found[:: self.n]),
            cached_tokens=sum(one.cached_tokens for one in found[:: self.n]),
            completion_tokens=sum(one.completion_tokens for one in found),
        )

    def facts(self) -> dict[str, object]:
        """What there is to say of them in a log line, however they ended."""
        waited, first = self.waited_s, self.first_token_s
        return {
            "prompt_tokens": sum(len(one.prompt) for one in self.generations[:: self.n] if isinstance(one.prompt, tuple)),
            "completion_tokens": self.num_made,
            **({} if waited is None else {"queue_s": round(waited, 6)}),
            **({} if first is None else {"time_to_first_token_s": round(first, 6)}),
            "finish_reasons": sorted({str(one.finish_reason) for one in self.finished.values()}),
        }

    async def _follow(self, index: int, generation: Generation) -> None:
        assert isinstance(generation.prompt, tuple), "the routes give token ids"
        how, num_deltas, num_tokens = "error", 0, 0
        came = time.perf_counter()
        begun, first, last = came, None, self.began
        silence = Patience(self.silence_s)
        try:
            async with silence, aclosing(self.engine.generate(generation)) as deltas:
                silence.begin()
                async for delta in deltas:
                    now = time.perf_counter()
                    if not num_deltas:
                        first = now
                        if not index % self.n:
                            self.count(catalog.SERVE_PROMPT_TOKENS, len(generation.prompt))
                        if delta.begun is not None:
                            begun = delta.begun
                            self.waited_s = max(self.waited_s or 0.0, begun - came)
                            self.count(catalog.SERVE_QUEUE_SECONDS, begun - came)
                    num_deltas += 1
                    if new := len(delta.token_ids):
                        metric = catalog.SERVE_INTER_TOKEN_SECONDS if num_tokens else catalog.SERVE_FIRST_TOKEN_SECONDS
                        self.count(metric, (now - last) / (new if num_tokens else 1))
                        if self.first_token_s is None:
                            self.first_token_s = now - self.began
                        num_tokens, last = num_tokens + new, now
                    silence.begin()
                    self.pending.setdefault(index, []).append(delta)
                    if delta.finish_reason is not None:
                        how, self.finished[index] = delta.finish_reason, delta
                    self.came.set()
            assert how != "error", "the engine's answer ended without a terminal delta"
        except TimeoutError as error:
            self.fail(_silent(self.silence_s) if silence.is_over else error)
        except asyncio.CancelledError:
            how = how if index in self.finished else "cancelled" if self.error is None else "error"
            raise
        except Exception as error:  # noqa: BLE001  # it is raised where the answer is awaited
            self.fail(error)
        finally:
            self.num_made += num_tokens
            if traces.is_on():
                _trace(index, generation, came, begun, first, num_tokens, how)
            self.count(catalog.SERVE_COMPLETION_TOKENS, num_tokens)
            self.count(catalog.SERVE_SEQUENCES, 1, finish_reason=how)
            usage = self.finished[index].usage if index in self.finished else None
            if usage and not index % self.n:
                self.count(catalog.SERVE_CACHED_TOKENS, usage.cached_tokens)


def _joined(deltas: Sequence[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        text="".join(one.text for one in deltas),
        token_ids=tuple(token for one in deltas for token in one.token_ids),
        logprobs=tuple(token for one in deltas for token in one.logprobs),
        prompt_logprobs=deltas[0].prompt_logprobs,
        finish_reason=deltas[-1].finish_reason,
        usage=deltas[-1].usage,
        begun=deltas[0].begun,
    )


def _trace(index: int, generation: Generation, came: float, begun: float, first: float | None, num_tokens: int, how: str) -> None:
    """A sequence's spans: waiting, reading its prompt, making its tokens. One that ended early has those that it came to."""
    now, which = time.perf_counter(), {"gen_ai.choice.index": index}
    traces.add("queue", came, begun, which)
    traces.add("prefill", begun, first or now, which | {"gen_ai.usage.input_tokens": len(generation.prompt)})  # type: ignore[arg-type]
    if first is not None:
        made = {"gen_ai.usage.output_tokens": num_tokens, "gen_ai.response.finish_reasons": [how]}
        traces.add("decode", first, now, which | made)


def _silent(seconds: float) -> RequestError:
    return RequestError(f"no token within {seconds:g} s", status=504, kind="server_error", fix="again later, or a shorter prompt")
