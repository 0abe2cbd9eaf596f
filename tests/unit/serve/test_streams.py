"""What a stream is made of: events that are written once but for their text, and the bound of each of its waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from openai.types.chat import ChatCompletionChunk

from danlu.serve.asgi import ClientGone, Stream, send_stream
from danlu.serve.generation import Delta, TokenLogprob, Usage
from danlu.serve.openai.chat import ChatChunks, parse_chat
from danlu.serve.openai.common import TextEvents, event
from danlu.serve.openai.completions import Choices, parse_completion
from danlu.serve.patience import Patience

T = TypeVar("T")
HEAD = {"id": "chatcmpl-1", "created": 1, "model": 'a "model"'}
TEXTS = ["wheat", ' "quoted" \\ and\nlines\t', "小麦\N{REPLACEMENT CHARACTER}\U0001f33e", "\0text\0", "\u2028</script>\x7f"]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}


def documents(raw: bytes) -> list[Any]:
    *events, rest = raw.split(b"\n\n")
    assert rest == b""
    assert all(one.startswith(b"data: ") for one in events)
    return [json.loads(one.removeprefix(b"data: ")) for one in events]


@pytest.mark.parametrize("text", TEXTS)
def test_an_event_written_around_its_text_is_the_event_written_whole(text: str) -> None:
    made = TextEvents({"a": 1, "delta": {"content": TextEvents.HOLE}, "b": None}).event(text)
    assert made == event({"a": 1, "delta": {"content": text}, "b": None})


@pytest.mark.parametrize("with_usage", [False, True])
def test_every_piece_of_a_chat_is_a_chunk_by_itself(with_usage: bool) -> None:
    asked = CHAT | {"n": 2} | ({"stream_options": {"include_usage": True}} if with_usage else {})
    chunks = ChatChunks(parse_chat(json.dumps(asked).encode()), HEAD, 2)
    texts = ["", ""]
    seen = []
    for i, text in enumerate([*TEXTS, *TEXTS]):
        for found in documents(chunks.add(i % 2, Delta(text, (i,)))):
            chunk = ChatCompletionChunk.model_validate(found, strict=True)
            assert (chunk.id, chunk.created, chunk.model) == tuple(HEAD.values())
            assert ("usage" in found) == with_usage
            (choice,) = chunk.choices
            assert choice.finish_reason is None
            texts[choice.index] += choice.delta.content or ""
            seen.append((choice.index, choice.delta.role))
    assert texts == ["".join(([*TEXTS, *TEXTS])[0::2]), "".join(([*TEXTS, *TEXTS])[1::2])]
    assert [role for _, role in seen].count("assistant") == 2
    assert dict(reversed(seen)) == {0: "assistant", 1: "assistant"}
    ends = [documents(chunks.add(i, Delta(" end", (9,), finish_reason="stop"))) for i in range(2)]
    for i, (last, end) in enumerate(ends):
        assert last["choices"][0]["delta"] == {"content": " end"}
        assert (end["choices"][0]["index"], end["choices"][0]["finish_reason"]) == (i, "stop")


def test_a_piece_with_log_probabilities_keeps_them_and_the_next_one_has_its_own() -> None:
    chunks = ChatChunks(parse_chat(json.dumps(CHAT | {"logprobs": True}).encode()), HEAD, 1)
    chunks.add(0, Delta("a", (1,), (TokenLogprob(1, "a", -1.0),)))
    for token in (2, 3):
        (found,) = documents(chunks.add(0, Delta("b", (token,), (TokenLogprob(token, "b", -token),))))
        assert [one["logprob"] for one in found["choices"][0]["logprobs"]["content"]] == [-token]


def test_every_piece_of_a_completion_is_a_chunk_by_itself() -> None:
    asked = {"model": "m", "prompt": ["p", "q"], "echo": True, "stream": True}
    choices = Choices(parse_completion(json.dumps(asked).encode()), HEAD, ["p", "q"])
    texts = ["", ""]
    for i, text in enumerate([*TEXTS, *TEXTS]):
        (found,) = documents(choices.add(i % 2, Delta(text, (i,))))
        (choice,) = found["choices"]
        assert (choice["finish_reason"], choice["logprobs"], found["object"]) == (None, None, "text_completion")
        texts[choice["index"]] += choice["text"]
    assert texts == ["p" + "".join([*TEXTS, *TEXTS][0::2]), "q" + "".join([*TEXTS, *TEXTS][1::2])]
    assert choices.add(0, Delta("", (1,))) == b""
    assert documents(choices.usage(Usage(1, 0, 2)))[0]["usage"]["completion_tokens"] == 2


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time goes on by itself where nobody has anything to do: waits take no time, and come out the same on a busy machine."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


def run(life: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(life())


async def endless(closed: asyncio.Event) -> Any:
    """Events without an end; `closed` once they are."""
    try:
        while True:
            yield b"data: 1\n\n"
    finally:
        closed.set()


def test_many_waits_may_last_longer_together_than_one_may() -> None:
    async def life() -> int:
        waits = 0
        async with Patience(0.1) as patience:
            for _ in range(10):
                patience.begin()
                await asyncio.sleep(0.02)
                waits += 1
        return waits

    assert run(life) == 10


def test_one_wait_that_is_too_long_ends_the_block_in_time() -> None:
    async def life() -> None:
        began = 0.0

        async def wait() -> None:
            nonlocal began
            async with Patience(0.1) as patience:
                for _ in range(5):
                    patience.begin()
                    await asyncio.sleep(0.02)
                patience.begin()
                began = asyncio.get_running_loop().time()
                await asyncio.sleep(30)

        with pytest.raises(TimeoutError):
            await wait()
        assert 0.1 <= asyncio.get_running_loop().time() - began < 0.2

    run(life)


def test_time_that_nobody_waits_for_does_not_count() -> None:
    async def life() -> bool:
        async with Patience(0.02) as patience:
            patience.begin()
            patience.end()
            await asyncio.sleep(0.1)
            patience.begin()
            patience.end()
            return True  # and nothing was raised, neither here nor at the end of the block

    assert run(life)


def test_who_is_cancelled_hears_that_and_nothing_else() -> None:
    async def life() -> None:
        async def wait() -> None:
            async with Patience(30) as patience:
                patience.begin()
                await asyncio.sleep(30)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(life())


def test_a_client_that_takes_nothing_is_gone_and_the_answer_is_closed() -> None:
    async def life() -> None:
        closed, sent = asyncio.Event(), []

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 3:
                await asyncio.sleep(30)

        with pytest.raises(ClientGone):
            await send_stream(send, Stream(endless(closed)), {}, silence_s=0.05)
        assert closed.is_set()
        assert [one["type"] for one in sent] == ["http.response.start", *["http.response.body"] * 3]

    run(life)


@pytest.mark.parametrize("error", [ConnectionResetError("the engine's"), TimeoutError("the engine's"), RuntimeError("the engine's")])
def test_what_the_events_raise_is_not_taken_for_the_clients_going(error: Exception) -> None:
    async def life() -> None:
        async def events() -> Any:
            yield b"data: 1\n\n"
            raise error

        async def send(message: Any) -> None:
            await asyncio.sleep(0)

        with pytest.raises(type(error), match="the engine's"):
            await send_stream(send, Stream(events()), {}, silence_s=5)

    run(life)


@pytest.mark.parametrize("broken_at", [0, 2])
def test_a_connection_that_breaks_is_the_clients_going(broken_at: int) -> None:
    async def life() -> None:
        closed, sent = asyncio.Event(), 0

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent > broken_at:
                raise BrokenPipeError("gone")

        answer = endless(closed)
        await anext(answer)  # as a route does, which has its first event ready
        with pytest.raises(ClientGone):
            await send_stream(send, Stream(answer), {}, silence_s=5)
        assert closed.is_set()

    run(life)
