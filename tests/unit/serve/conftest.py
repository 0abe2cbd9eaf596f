"""A gateway on a real socket, in a thread of this process, and what it metered."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from danlu.metrics.catalog import Metric
from danlu.serve.gateway import Gateway


@dataclass
class Meter:
    """Sums by metric name; histograms by how often and how much."""

    sums: Counter[str] = field(default_factory=Counter)
    observed: Counter[str] = field(default_factory=Counter)
    by_label: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __call__(self, metric: Metric, value: float, /, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        if metric.kind == "gauge":
            self.sums[metric.name] = value
            return
        self.sums[metric.name] += value
        self.observed[metric.name] += 1
        for name, label in labels.items():
            if name != "model":
                self.by_label[metric.name, label] += value


@contextmanager
def serve(gateway: Gateway, app: Any = None) -> Iterator[str]:
    """The URL of a gateway that runs while the block does; `app` is what stands before it."""
    server = uvicorn.Server(uvicorn.Config(app or gateway, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    loop, stopping = asyncio.new_event_loop(), asyncio.Event()
    started: Future[None] = Future()

    async def life() -> None:
        await gateway.start()
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.001)
        started.set_result(None)
        await stopping.wait()
        await gateway.drain()  # as in a replica, while the server still carries answers
        server.should_exit = True
        await serving

    def run() -> None:
        try:
            loop.run_until_complete(life())
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.result(300)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served() -> Callable[..., AbstractContextManager[str]]:
    return serve


@pytest.fixture
def meter() -> Meter:
    return Meter()
