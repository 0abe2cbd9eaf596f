"""10,000 requests with clients that leave when they like: nothing is left behind, and the counters add up to the token."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from lm import write_family

from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.serve.engines.echo import EchoTextEngine
from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.gateway import Gateway
from danlu.serve.generation import Delta, Generation, TextEngine
from danlu.spec.serve import EchoText, Limits, Torch

pytestmark = pytest.mark.soak
REQUESTS, CLIENTS = 10_000, 32


def make_engine(kind: str, folder: Path) -> TextEngine:
    if kind == "echo":
        return EchoTextEngine(EchoText(time_to_first_token_ms=1, time_per_output_token_ms=1))
    return TorchEngine(Torch(model_name_or_path=str(write_family(folder, "qwen3")), dtype="fp32", kv_cache_memory_gb=0.1))


def count(engine: TextEngine) -> Counter[str]:
    """What the engine gives from now on, counted on its own side of the protocol."""
    given, generate = Counter[str](), engine.generate

    async def counted(generation: Generation) -> AsyncGenerator[Delta]:
        given["begun"] += 1
        async with aclosing(generate(generation)) as deltas:
            async for delta in deltas:
                given["tokens"] += len(delta.token_ids)
                given["ended"] += delta.finish_reason is not None
                yield delta

    engine.generate = counted  # type: ignore[method-assign]
    return given


async def ask(host: str, port: int, body: bytes, leave_after: float | None) -> dict[str, Any] | None:
    """A raw request: the usage that was told, or None if the client left before that."""
    reader, writer = await asyncio.open_connection(host, port)
    fields = ("host: x", "connection: close", "content-type: application/json", f"content-length: {len(body)}")
    head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *fields, "", ""])
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        raw = await asyncio.wait_for(reader.read(-1), leave_after)
    except TimeoutError:
        writer.transport.abort()
        return None
    finally:
        writer.close()
    assert b" 200 OK" in raw.split(b"\r\n", 1)[0], raw[:300]
    if b"text/event-stream" in raw:
        assert raw.count(b"data: [DONE]") == 1
        lines = [line for line in raw.split(b"\n") if line.startswith(b"data: {") and b'"usage":{' in line]
        return json.loads(lines[-1][6:])["usage"]  # type: ignore[no-any-return]
    return json.loads(raw[raw.index(b"\r\n\r\n") + 4 :])["usage"]  # type: ignore[no-any-return]


async def load(host: str, port: int, requests: int, seed: int) -> Counter[str]:
    """What the clients saw of so many requests; a third of them waits for a part of what the last answer took."""
    draw, seen, took = random.Random(seed), Counter[str](), 0.1
    left = iter(range(requests))

    async def client() -> None:
        nonlocal took
        for _ in left:
            stream, n = draw.random() < 0.7, draw.choice((1, 1, 1, 2, 3))
            body = {
                "messages": [{"role": "user", "content": "谷物 wheat " * draw.randint(1, 6)}],
                "n": n,
                "max_tokens": draw.randint(1, 40),
                "stream": stream,
                **({"stream_options": {"include_usage": True}} if stream else {}),
                **({"stop": [draw.choice(("eat w", "a"))]} if draw.random() < 0.2 else {}),
            }
            began = time.perf_counter()
            usage = await ask(host, port, json.dumps(body).encode(), draw.uniform(0.0, took) if draw.random() < 0.3 else None)
            took = time.perf_counter() - began if usage else took
            seen["left" if usage is None else "answered"] += 1
            seen["asked"] += n
            for name in ("prompt_tokens", "completion_tokens"):
                seen[name] += usage[name] if usage else 0

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return seen


@pytest.mark.parametrize("kind", ["echo", "torch"])
def test_ten_thousand_requests_with_random_disconnects_leave_nothing_behind(kind: str, tmp_path: Path) -> None:
    sums: Counter[tuple[str, str]] = Counter()

    def meter(metric: Metric, value: float, /, **labels: str) -> None:
        if metric.kind == "counter":
            sums[metric.name, labels.get("finish_reason") or labels.get("reason") or labels.get("status") or ""] += value

    def total(metric: Metric) -> float:
        return sum(value for (name, _), value in sums.items() if name == metric.name)

    async def life() -> None:
        engine = make_engine(kind, tmp_path)
        given = count(engine)
        gateway = Gateway(engine, "echo", Limits(), meter)
        await gateway.start()
        server = uvicorn.Server(uvicorn.Config(gateway, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        me = psutil.Process(os.getpid())

        async def settled() -> tuple[int, int, int]:
            deadline = time.monotonic() + 30
            while gateway.in_flight or any(engine.stats()[what] for what in (catalog.SERVE_RUNNING, catalog.SERVE_WAITING)):
                assert time.monotonic() < deadline, "an answer goes on for nobody"
                await asyncio.sleep(0.01)
            gc.collect()
            return len(asyncio.all_tasks()), me.num_fds(), me.memory_info().rss

        seen = await load(host, port, REQUESTS // 10, seed=1)
        tasks, files, memory = await settled()
        seen += await load(host, port, REQUESTS - REQUESTS // 10, seed=2)
        tasks_after, files_after, memory_after = await settled()
        assert tasks_after <= tasks + 2
        assert files_after <= files + 4
        assert memory_after < memory + 30e6

        assert seen["left"] + seen["answered"] == REQUESTS
        assert seen["left"] > REQUESTS / 20, "some have to leave"
        # The engine's own count, made on the other side of the protocol, and what the answered clients were told.
        assert total(catalog.SERVE_COMPLETION_TOKENS) == given["tokens"]
        assert total(catalog.SERVE_SEQUENCES) == given["begun"] <= seen["asked"]
        assert sums[catalog.SERVE_SEQUENCES.name, "cancelled"] == given["begun"] - given["ended"]
        assert sums[catalog.SERVE_SEQUENCES.name, "error"] == 0
        assert total(catalog.SERVE_COMPLETION_TOKENS) >= seen["completion_tokens"]
        assert total(catalog.SERVE_PROMPT_TOKENS) >= seen["prompt_tokens"]
        answered = sums[catalog.SERVE_REQUESTS.name, "200"]
        assert answered >= seen["answered"]
        assert answered + total(catalog.SERVE_REFUSALS) <= REQUESTS
        print(dict(seen), dict(given), dict(sums), f"{(memory_after - memory) / 1e6:.1f} MB")

        # With nobody leaving, both sides agree to the token.
        before = Counter(sums)
        settled_seen = Counter[str]()
        for _ in range(50):
            body = {"messages": [{"role": "user", "content": "wheat"}], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
            usage = await ask(host, port, json.dumps(body).encode(), None)
            assert usage is not None
            settled_seen += Counter({name: usage[name] for name in ("prompt_tokens", "completion_tokens")})
        await settled()
        for metric, name in ((catalog.SERVE_PROMPT_TOKENS, "prompt_tokens"), (catalog.SERVE_COMPLETION_TOKENS, "completion_tokens")):
            assert sums[metric.name, ""] - before[metric.name, ""] == settled_seen[name]
        await gateway.drain()
        server.should_exit = True
        await serving

    asyncio.run(life())
