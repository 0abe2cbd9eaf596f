"""A closed-loop HTTP client in a process of its own: N connections, each sends its next request when the last one is answered.

Plain asyncio streams and requests made beforehand: on a small machine the client shares the cores with the server, and every
microsecond it spends is one that the server does not have. Reads {url, bodies, clients, seconds} as a JSON line from standard input,
answers with a JSON line of latencies; lives until its input ends.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from urllib.parse import urlsplit


async def run(url: str, bodies: list[str], clients: int, seconds: float) -> dict[str, object]:
    """Latencies (s) of all requests answered with 200, how many failed, and the wall time. For 0 seconds each client sends one request."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\ncontent-length: "
    requests = itertools.cycle([f"{head}{len(body.encode())}\r\n\r\n{body}".encode() for body in bodies])
    latencies: list[float] = []
    failed = 0

    async def client() -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        is_first = not seconds
        try:
            while (began := time.perf_counter()) < deadline or is_first:
                is_first = False
                writer.write(next(requests))
                if await _status(reader) == 200:
                    latencies.append(time.perf_counter() - began)
                else:
                    failed += 1
        finally:
            writer.close()

    started = time.perf_counter()
    deadline = started + seconds
    await asyncio.gather(*(client() for _ in range(clients)))
    return {"latencies": latencies, "failed": failed, "seconds": time.perf_counter() - started}


async def _status(reader: asyncio.StreamReader) -> int:
    """Read one response to its end."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
    if "content-length" in fields:
        await reader.readexactly(int(fields["content-length"]))
    else:
        assert fields.get("transfer-encoding") == "chunked", head
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
        await reader.readuntil(b"\r\n")
    return int(head.split(" ", 2)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run(**json.loads(line)))), flush=True)
