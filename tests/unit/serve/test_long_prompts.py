"""A long prompt is tokenised beside the event loop: whoever else is being answered does not wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from lm import engine, write_family

from danlu.serve.engines.echo import EchoTextEngine
from danlu.serve.gateway import Gateway
from danlu.serve.generation import Chat, Prompt
from danlu.serve.routes.text import LONG_BODY_BYTES
from danlu.spec.serve import EchoText, Limits

LONG = "wheat " * (LONG_BODY_BYTES // 5)
MANY = ["wheat " * (LONG_BODY_BYTES // 8), "corn", "rye " * (LONG_BODY_BYTES // 8)]


class Waiting(EchoTextEngine):
    """Tokenises nothing long before it is told to, and remembers what it read."""

    def __init__(self, spec: EchoText) -> None:
        super().__init__(spec)
        self.release = threading.Event()
        self.read: list[str] = []

    def tokenize(self, prompt: Prompt) -> list[int]:
        ids = super().tokenize(prompt)
        if len(ids) > LONG_BODY_BYTES // 8:
            assert self.release.wait(30), "nobody else was answered meanwhile"
        if not isinstance(prompt, tuple):
            text = str(prompt.messages[0]["content"] if isinstance(prompt, Chat) else prompt)
            self.read.append(text.split()[0])
        return ids

    def detokenize(self, token_ids: Any) -> str:
        if len(token_ids) > LONG_BODY_BYTES // 8:
            assert self.release.wait(30), "nobody else was answered meanwhile"
        return super().detokenize(token_ids)


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "a chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1}),
    "a completion": ("/v1/completions", {"prompt": LONG, "max_tokens": 1}),
    "several": ("/v1/completions", {"prompt": MANY, "max_tokens": 1}),
    "an echo": ("/v1/completions", {"prompt": [119] * LONG_BODY_BYTES, "max_tokens": 0, "echo": True}),
    "tokens": ("/tokenize", {"prompt": LONG}),
    "a text": ("/detokenize", {"tokens": [119] * LONG_BODY_BYTES}),
}


def run(life: Coroutine[Any, Any, Any], engine: Waiting) -> Any:
    try:
        return asyncio.run(life)
    finally:
        engine.release.set()


@pytest.mark.parametrize("name", ASKED)
def test_others_are_answered_while_a_long_prompt_is_read(name: str) -> None:
    path, body = ASKED[name]
    engine = Waiting(EchoText(max_model_len=100_000))
    gateway = Gateway(engine, "echo", Limits(), lambda *_, **__: None)

    async def life() -> tuple[httpx.Response, httpx.Response]:
        await gateway.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://test") as client:
            long = asyncio.create_task(client.post(path, json=body))
            await asyncio.sleep(0)  # it comes first
            short = await client.post("/v1/completions", json={"prompt": "rye"})
            assert not long.done()
            engine.release.set()
            return short, await long

    short, long = run(life(), engine)
    assert (short.status_code, long.status_code) == (200, 200)
    assert short.json()["choices"][0]["text"] == "rye"
    if name == "several":
        assert engine.read == ["rye", "wheat", "corn", "rye"], "in order, the short request before all of them"


def test_long_prompts_are_read_in_the_order_they_came() -> None:
    engine = Waiting(EchoText(max_model_len=100_000))
    gateway = Gateway(engine, "echo", Limits(), lambda *_, **__: None)
    words = [f"word{i}" for i in range(6)]

    async def life() -> None:
        await gateway.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://test") as client:
            asked = [asyncio.create_task(client.post("/v1/completions", json={"prompt": f"{word} {LONG}"})) for word in words]
            assert (await client.post("/v1/completions", json={"prompt": "rye"})).status_code == 200
            engine.release.set()
            assert {one.status_code for one in await asyncio.gather(*asked)} == {200}

    run(life(), engine)
    assert engine.read == ["rye", *words]


def test_a_long_prompt_that_does_not_fit_is_refused_as_a_short_one_is(tmp_path: Path) -> None:
    gateway = Gateway(engine(write_family(tmp_path, "qwen3")), "tiny", Limits(), lambda *_, **__: None)

    async def life() -> httpx.Response:
        await gateway.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://test") as client:
            found = await client.post("/v1/completions", json={"prompt": LONG})
        await gateway.drain()
        return found

    response = asyncio.run(life())
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
