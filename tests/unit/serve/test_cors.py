"""Pages of other origins: who is named may ask and read, with a key as everybody; who is not, may not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from danlu.serve.cors import open_to
from danlu.serve.engines.echo import EchoTextEngine
from danlu.serve.gateway import Gateway
from danlu.serve.keys import Authenticated, KeyRing, create_key
from danlu.spec.serve import EchoText, Limits

HERE, ELSEWHERE = "https://chat.example", "https://evil.example"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


def ask(origins: Sequence[str], keys_file: Path, *requests: tuple[str, dict[str, str], Any]) -> list[httpx.Response]:
    async def life() -> list[httpx.Response]:
        gateway = Gateway(EchoTextEngine(EchoText()), "echo", Limits(), lambda *_, **__: None)
        app = open_to(Authenticated(gateway, KeyRing(keys_file), gateway.count), origins)
        await gateway.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.request(method, "/v1/chat/completions", headers=headers, json=body) for method, headers, body in requests]

    return asyncio.run(life())


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, str]:
    return tmp_path / "keys.json", create_key(tmp_path / "keys.json", "web")


@pytest.mark.parametrize(("origins", "told"), [([HERE], HERE), (["http://a:1", HERE], HERE), (["*"], "*")])
def test_a_page_that_is_named_asks_whether_it_may_and_then_asks(origins: list[str], told: str, key: tuple[Path, str]) -> None:
    signed = {"origin": HERE, "authorization": f"Bearer {key[1]}"}
    first, answer, stream, unsigned = ask(
        origins,
        key[0],
        ("OPTIONS", {"origin": HERE, **PREFLIGHT}, None),
        ("POST", signed, BODY),
        ("POST", signed, BODY | {"stream": True}),
        ("POST", {"origin": HERE}, BODY),
    )
    assert first.status_code == 200
    assert first.headers["access-control-allow-methods"] == "GET, POST"
    assert first.headers["access-control-allow-headers"] == "authorization, content-type"
    assert [one.status_code for one in (answer, stream, unsigned)] == [200, 200, 401]
    assert {one.headers["access-control-allow-origin"] for one in (first, answer, stream, unsigned)} == {told}
    assert "retry-after" in answer.headers["access-control-expose-headers"]
    assert answer.json()["choices"][0]["message"]["content"] == "hi"


def test_a_page_that_is_not_named_may_not(key: tuple[Path, str]) -> None:
    first, answer, none = ask(
        [HERE],
        key[0],
        ("OPTIONS", {"origin": ELSEWHERE, **PREFLIGHT}, None),
        ("POST", {"origin": ELSEWHERE, "authorization": f"Bearer {key[1]}"}, BODY),
        ("POST", {"authorization": f"Bearer {key[1]}"}, BODY),
    )
    assert first.status_code == 400
    # The browser keeps the answer from the page; who is no browser does not ask a browser's question.
    assert [one.status_code for one in (answer, none)] == [200, 200]
    assert not any("access-control-allow-origin" in one.headers for one in (first, answer, none))
