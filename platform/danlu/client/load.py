"""`danlu bench serve`: a load on a service's chats, and what its clients saw. Times count from when a request was due."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from danlu.errors import RequestError, ResourceError

if TYPE_CHECKING:
    import aiohttp

PROMPT_WORDS = (8, 8, 8, 32, 32, 128, 128, 512)
ANSWER_TOKENS = (16, 64, 64, 128)
"""The mix: most questions are short, a few are long. Every request takes the next of each, so that two runs ask the same."""
WORDS = [
    "the",
    "market",
    "price",
    "rose",
    "on",
    "new",
    "report",
    "of",
    "wheat",
    "and",
    "corn",
    "from",
    "port",
    "to",
    "port",
    "as",
    "trade",
    "said",
    "a",
    "tanker",
    "strike",
    "may",
    "end",
    "this",
    "year",
]
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Load:
    """What is asked. `rate` requests a second arrive at random (Poisson); without it `concurrency` clients wait for each answer."""

    url: str
    model: str
    num_requests: int = 200
    concurrency: int = 8
    rate: float | None = None
    warm_up: int = 8
    max_tokens: int | None = None
    """For all; the mix's if left out."""
    seed: int = 0
    headers: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Seen:
    """One request, in seconds from when it was due; `gaps` are those between the answer's pieces."""

    first: float
    whole: float
    gaps: list[float]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Report:
    """What the clients saw."""

    load: dict[str, Any]
    seconds: float
    num_answered: int
    refused: dict[str, int]
    """Why -> how many."""
    prompt_tokens: int
    completion_tokens: int
    requests_per_second: float
    tokens_per_second: float
    time_to_first_token_ms: dict[str, float]
    inter_token_ms: dict[str, float]
    e2e_ms: dict[str, float]

    def text(self) -> str:
        """A table for a terminal."""
        names = [f"p{p}" for p in PERCENTILES] + ["mean", "max"]
        lines = [
            f"  {self.num_answered} answered in {self.seconds:.1f} s: {self.requests_per_second:.1f} requests/s, "
            f"{self.tokens_per_second:,.0f} tokens/s",
            *(f"  {number} not: {why}" for why, number in self.refused.items()),
            f"  {'ms':<20}" + "".join(f"{name:>9}" for name in names),
        ]
        for title, found in self.tables().items():
            lines.append(f"  {title:<20}" + "".join(f"{found[name]:>9.1f}" for name in names))
        return "\n".join(lines)

    def tables(self) -> dict[str, dict[str, float]]:
        return {"time to first token": self.time_to_first_token_ms, "between tokens": self.inter_token_ms, "end to end": self.e2e_ms}


def measure(load: Load) -> tuple[Report, list[Seen]]:
    """Warm up, ask, report. ResourceError if nothing at all is answered."""
    return asyncio.run(_measure(load))


def bodies(load: Load, number: int) -> list[dict[str, Any]]:
    """The first so many requests. Each begins with its own number: a prefix cache finds nothing that a user's would not."""
    draw = random.Random(load.seed)
    found = []
    for i in range(number):
        text = " ".join([f"{load.seed}.{i}", *draw.choices(WORDS, k=PROMPT_WORDS[i % len(PROMPT_WORDS)])])
        found.append(
            {
                "model": load.model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": load.max_tokens or ANSWER_TOKENS[i % len(ANSWER_TOKENS)],
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
    return found


async def _measure(load: Load) -> tuple[Report, list[Seen]]:
    import aiohttp

    asked = bodies(load, load.warm_up + load.num_requests)
    warm_up, asked = asked[: load.warm_up], asked[load.warm_up :]
    seen: list[Seen] = []
    refused: Counter[str] = Counter()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(load.url, headers=load.headers, timeout=timeout, connector=connector) as session:
        await _closed(session, warm_up, min(load.concurrency, len(warm_up)), [], Counter())
        began = time.perf_counter()
        if load.rate is None:
            await _closed(session, asked, load.concurrency, seen, refused)
        else:
            await _poisson(session, asked, load.rate, random.Random(load.seed), seen, refused)
        seconds = time.perf_counter() - began
    if not seen:
        raise ResourceError(
            f"nothing was answered: {next(iter(refused), 'no request')}", where=load.url, fix="danlu chat tries one by hand"
        )
    return _report(load, seconds, seen, refused), seen


async def _closed(
    session: aiohttp.ClientSession, asked: Sequence[dict[str, Any]], clients: int, seen: list[Seen], refused: Counter[str]
) -> None:
    left = iter(asked)

    async def client() -> None:
        for body in left:
            await _ask(session, body, time.perf_counter(), seen, refused)

    await asyncio.gather(*(client() for _ in range(clients)))


async def _poisson(
    session: aiohttp.ClientSession,
    asked: Sequence[dict[str, Any]],
    rate: float,
    draw: random.Random,
    seen: list[Seen],
    refused: Counter[str],
) -> None:
    due, tasks = time.perf_counter(), []
    for body in asked:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(_ask(session, body, due, seen, refused)))
    await asyncio.gather(*tasks)


async def _ask(session: aiohttp.ClientSession, body: dict[str, Any], due: float, seen: list[Seen], refused: Counter[str]) -> None:
    import aiohttp

    times: list[float] = []
    usage: dict[str, int] = {}
    try:
        async with session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise RequestError(f"{response.status} {_told(await response.text())}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RequestError(str(chunk["error"]["message"]))
                usage = chunk.get("usage") or usage
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    times.append(time.perf_counter())
            if not times:
                raise RequestError("an answer without a text")
    except (aiohttp.ClientError, RequestError, OSError) as error:
        problem = error.problem if isinstance(error, RequestError) else type(error).__name__
        # The same reason with other numbers in it is told once, in the words of the first.
        refused[next((known for known in refused if _wording(known) == _wording(problem)), problem)] += 1
        return
    gaps = [after - before for before, after in pairwise(times)]
    tokens = usage.get("completion_tokens", len(times))
    seen.append(Seen(times[0] - due, time.perf_counter() - due, gaps, usage.get("prompt_tokens", 0), tokens))


def _told(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:100]


def _wording(problem: str) -> str:
    return re.sub(r"\d+", "0", problem)


def _report(load: Load, seconds: float, seen: Sequence[Seen], refused: Counter[str]) -> Report:
    tokens = sum(one.completion_tokens for one in seen)
    # A piece can have several tokens, where the engine is faster than the wire: then the mean of an answer is what can be told.
    is_one_a_piece = all(len(one.gaps) + 2 >= one.completion_tokens for one in seen)
    means = [sum(one.gaps) / max(1, one.completion_tokens - 1) for one in seen]
    gaps = [gap for one in seen for gap in one.gaps] if is_one_a_piece else means
    given = asdict(load)
    del given["headers"]  # a key may stand there
    return Report(
        load=given,
        seconds=seconds,
        num_answered=len(seen),
        refused=dict(refused),
        prompt_tokens=sum(one.prompt_tokens for one in seen),
        completion_tokens=tokens,
        requests_per_second=len(seen) / seconds,
        tokens_per_second=tokens / seconds,
        time_to_first_token_ms=_summary([one.first for one in seen]),
        inter_token_ms=_summary(gaps),
        e2e_ms=_summary([one.whole for one in seen]),
    )


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles (nearest rank), mean and largest, in milliseconds."""
    found = sorted(value * 1000 for value in seconds) or [0.0]
    ranks = {f"p{p}": found[max(0, -(-len(found) * p // 100) - 1)] for p in PERCENTILES}
    return {**ranks, "mean": sum(found) / len(found), "max": found[-1]}
