"""What the gateway hands to a route and what a route hands back; reading bodies and sending answers. Plain ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from danlu.errors import RequestError
from danlu.serve.keys import Key
from danlu.serve.patience import Patience

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ClientGone(Exception):
    """Nobody is there any more to be answered."""


@dataclass(frozen=True)
class Call:
    """One request, as a route sees it."""

    body: bytes
    began: float
    """time.perf_counter() at its arrival."""
    key: Key | None = None
    """Whose request it is; None where no keys are asked for."""
    rest: str = ""
    """What follows the path of a route that ends with a slash."""
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    """What a route takes for the request, given back when it ended, however it ended."""
    facts: dict[str, object] = field(default_factory=dict)
    """What a route has to say of the request in its log line: counts, the model, never what was written."""


@dataclass(frozen=True)
class Reply:
    """A whole answer; an object becomes JSON."""

    body: object
    status: int = 200
    content_type: str = "application/json"


@dataclass(frozen=True)
class Stream:
    """Server-sent events; a route that gives one has its first event ready."""

    events: AsyncGenerator[bytes]


@dataclass(frozen=True)
class Route:
    """A method and what answers it."""

    method: str
    answer: Callable[[Call], Awaitable[Reply | Stream]]
    is_open: bool = False
    """Answered without a key."""
    follows_client: bool = False
    """Cancelled as soon as the client has gone, also where the server does not do that."""


Routes = Mapping[str, Route]


async def read_body(headers: Mapping[str, str], receive: Receive, *, limit: int) -> bytes:
    """The body; RequestError if it is larger, before all of it is read."""
    length = headers.get("content-length", "")
    parts: list[bytes] = []
    size = 0
    too_large = length.isdigit() and int(length) > limit
    while not too_large:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        too_large = size > limit
        if not message.get("more_body"):
            break
    if too_large:
        raise RequestError(f"the body is larger than {limit:,} bytes", status=413, fix="fewer or shorter texts in a request")
    return b"".join(parts)


async def send_reply(send: Send, reply: Reply, headers: Mapping[str, str]) -> None:
    """Status, headers, body."""
    raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body, ensure_ascii=False).encode("utf-8", "replace")
    await send(_start(reply.status, {**headers, "content-type": reply.content_type, "content-length": str(len(raw))}))
    await send({"type": "http.response.body", "body": raw})


async def send_stream(send: Send, stream: Stream, headers: Mapping[str, str], *, silence_s: float) -> None:
    """The events as they come, but not the end of the body. ClientGone if the client's connection breaks, or it takes nothing for
    `silence_s`; what the events themselves raise is not the client's, and passes."""
    # nginx would otherwise keep events back until its buffer is full.
    extra = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
    taken = Patience(silence_s)

    async def give(message: Message) -> None:
        try:
            await send(message)
        except OSError as error:  # as ASGI servers tell it
            raise ClientGone from error

    async with aclosing(stream.events) as events:
        try:
            async with taken:
                await give(_start(200, {**headers, **extra}))
                async for chunk in events:
                    taken.begin()
                    await give({"type": "http.response.body", "body": chunk, "more_body": True})
                    taken.end()
        except TimeoutError as error:
            if not taken.is_over:
                raise
            raise ClientGone from error


def _start(status: int, headers: Mapping[str, str]) -> Message:
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}
