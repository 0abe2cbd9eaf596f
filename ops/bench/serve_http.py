"""`/v1/classify` over HTTP: requests per second and latency at 1, 16 and 64 clients, one text a request.

Danlu's service with Serve's HAProxy and with its Python proxy, against FastAPI on uvicorn with one Hugging Face forward a request (same
weights, dtype and threads), and against the ceiling: the same texts through the Predictor in this process, without HTTP, in batches of
as many texts as there are clients. Client, proxy and engine share the machine's cores; every server has its own process, all are up
while they take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from bundles import Bundles, some_texts, train_bundles
from harness import SPEC, Row, compare, cores, finish, interleave, options, say, stop

from danlu.artifact.bundle import Bundle
from danlu.compress.load import load_predictor
from danlu.tasks.predictor import Predictor

BENCH = Path(__file__).parent
CLIENTS = (1, 16, 64)
MAX_LENGTH = 40
"""The example spec's."""


@dataclass(frozen=True)
class Load:
    """What one turn of a contestant gave."""

    rate: float
    p50_ms: float
    p99_ms: float


Turn = Callable[[], dict[int, Load]]


class Client:
    """load.py, in a process of its own."""

    def __init__(self, seconds: float, texts: Sequence[str]) -> None:
        self.seconds, self.bodies = seconds, [json.dumps({"input": text}) for text in texts]
        self.process = subprocess.Popen([sys.executable, str(BENCH / "load.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, url: str, clients: int, seconds: float) -> Load:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"url": url, "bodies": self.bodies, "clients": clients, "seconds": seconds}), file=self.process.stdin, flush=True)
        found = json.loads(self.process.stdout.readline())
        assert found["failed"] == 0, f"{url}: {found['failed']} requests were not answered with 200"
        return _load(found["latencies"], len(found["latencies"]) / found["seconds"])

    def turn(self, url: str) -> Turn:
        def measure() -> dict[int, Load]:
            self.ask(url, CLIENTS[-1], self.seconds / 8)  # connections and caches of the one that has been waiting
            return {clients: self.ask(url, clients, self.seconds) for clients in CLIENTS}

        return measure

    def close(self) -> None:
        stop(self.process)


def ceiling(predictor: Predictor, texts: Sequence[str], seconds: float) -> Turn:
    """The batched forward alone: no HTTP, nobody else on the machine, always a full batch."""

    def one(batch: int) -> Load:
        latencies: list[float] = []
        began = time.perf_counter()
        for start in _forever(len(texts), batch):
            before = time.perf_counter()
            if before - began > seconds:
                break
            predictor.predict(texts[start : start + batch])
            latencies += [time.perf_counter() - before] * batch
        return _load(latencies, len(latencies) / (time.perf_counter() - began))

    return lambda: {clients: one(clients) for clients in CLIENTS}


def _forever(length: int, batch: int) -> Iterator[int]:
    while True:
        yield from range(0, length - batch + 1, batch)


def _load(latencies: list[float], rate: float) -> Load:
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return Load(rate, float(p50), float(p99))


@contextmanager
def server(kind: str, arguments: dict[str, Any], log: Path) -> Iterator[str]:
    """The URL of a server that is up while the block runs."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(BENCH / "servers.py"), kind, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith('{"url"')), None)
        if line is None:
            raise RuntimeError(f"{kind} did not start:\n{log.read_text()[-3000:]}")
        yield json.loads(line)["url"]
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            say(f"{kind} does not end by itself")
        stop(process)


def danlu_server(bundle: Bundle, folder: Path, *, haproxy: bool) -> dict[str, Any]:
    return {
        "name": "bench",
        "bundle": str(bundle.path),
        "storage": str(folder / "storage"),
        "engine": {"kind": "encoder", "num_threads": cores()},
        "http": {"port": 0, "haproxy": haproxy},
    }


def check_answers(name: str, url: str, predictor: Predictor, texts: Sequence[str], tolerance: float) -> str:
    """The server's answers beside the Predictor's. AssertionError if a probability is further off than `tolerance`."""
    largest = 0.0
    with httpx.Client(timeout=60) as client:
        for text, expected in zip(texts, predictor.predict(texts), strict=True):
            response = client.post(url, json={"input": text})
            response.raise_for_status()
            answer = response.json()["data"][0]
            largest = max(largest, float(np.abs(np.subtract(answer["probs"], expected.probabilities)).max()))
    assert largest <= tolerance, f"{name}: a probability is {largest:.1e} from the Predictor's"
    return f"{name} {largest:.0e}"


def main() -> None:
    given = options(__doc__, rounds=3)
    os.chdir(SPEC.parents[2])
    torch.set_num_threads(cores())
    seconds = 0.5 if given.quick else 1.5
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        bundles = train_bundles(folder, max_length=MAX_LENGTH, steps=4 if given.quick else 16)
        texts = some_texts(256)
        client = Client(seconds, texts)
        try:
            with server("fastapi", _fastapi(bundles), folder / "fastapi.log") as fastapi:
                full, checked = _phase(bundles.original, fastapi, ["HAProxy", "Python proxy"], client, texts, folder, given.rounds)
                small, checked_int8 = _phase(bundles.int8, fastapi, ["HAProxy"], client, texts, folder, given.rounds)
        finally:
            client.close()
    notes = [
        f"{bundles.original.meta.precision}; {cores()} threads for each engine; {MAX_LENGTH} tokens at most; a turn is {seconds:g} s",
        f"largest difference of a probability from the Predictor's: {', '.join([*checked, *checked_int8])}",
        "the ceiling is the Predictor alone in this process, in batches of as many texts as there are clients",
    ]
    finish("serve_http", given, [*_rows("Danlu", full), *_rows("Danlu int8", small)], notes)


def _fastapi(bundles: Bundles) -> dict[str, Any]:
    dtype = "bfloat16" if bundles.original.meta.precision == "bf16" else "float32"
    return {"folder": str(bundles.original.path / "model"), "max_length": MAX_LENGTH, "dtype": dtype, "threads": cores()}


def _phase(
    bundle: Bundle, fastapi: str, proxies: Sequence[str], client: Client, texts: Sequence[str], folder: Path, rounds: int
) -> tuple[dict[str, list[dict[int, Load]]], list[str]]:
    """Danlu's servers of one bundle, FastAPI and the ceiling in turns; and how near the answers are."""
    predictor = load_predictor(bundle)
    turns: dict[str, Turn] = {}
    checked = []
    with ExitStack() as stack:
        for proxy in proxies:
            began = time.perf_counter()
            arguments = danlu_server(bundle, folder, haproxy=proxy == "HAProxy")
            url = stack.enter_context(server("danlu", arguments, folder / f"{proxy}.log"))
            say(f"Danlu with {proxy} is up after {time.perf_counter() - began:.0f} s")
            turns[proxy] = client.turn(url)
            checked.append(check_answers(f"Danlu ({proxy})", url, predictor, texts[:16], 2e-2))
        checked.append(check_answers("FastAPI", fastapi, predictor, texts[:16], 5e-2 if bundle.meta.quantization is None else 2e-1))
        turns |= {"FastAPI": client.turn(fastapi), "ceiling": ceiling(predictor, texts, client.seconds)}
        return interleave(turns, rounds), checked


def _rows(who: str, found: dict[str, list[dict[int, Load]]]) -> list[Row]:
    rows = []
    names = {"FastAPI": "FastAPI, a forward a request", "ceiling": "batched forward alone", "Python proxy": f"{who}, Python proxy"}
    pairs = [("HAProxy", "FastAPI"), ("HAProxy", "Python proxy"), ("Python proxy", "FastAPI"), ("HAProxy", "ceiling")]
    pairs = [pair for pair in pairs if set(pair) <= set(found)]
    for clients in CLIENTS:
        at = {name: [turn[clients] for turn in turns] for name, turns in found.items()}
        told = f"{clients} client{'s' if clients > 1 else ''}"
        for ours, theirs in pairs:
            rates = [[load.rate for load in at[name]] for name in (ours, theirs)]
            rows.append(compare(f"{who}, {ours}, {told}", "requests/s", *rates, names[theirs]))
        for field in ("p50_ms", "p99_ms"):
            times = [[float(getattr(load, field)) for load in at[name]] for name in ("HAProxy", "FastAPI")]
            metric = f"{who}, HAProxy, {told}, {field.removesuffix('_ms')}"
            rows.append(compare(metric, "ms", *times, names["FastAPI"], less_is_better=True))
    return rows


if __name__ == "__main__":
    main()
