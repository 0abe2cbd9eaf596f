"""Language models over HTTP: Danlu's service against vLLM, transformers serve and llama.cpp's server, at 1, 16 and 64 streams.

One model of 95M random parameters, Qwen3-shaped, bf16, all cores. The load is `danlu bench serve`'s: a mix of prompts and answers, every
prompt a fresh one, closed loop. A turn starts a server, warms it up, asks at each number of streams, and ends it: nobody's idle threads are
in the way of the next. transformers serve comes with Danlu; vLLM's CPU build and llama.cpp live in environments of their own, which
peers.py makes: `python peers.py vllm llama`.

There are two builds of llama.cpp, as neither is the faster everywhere: xllamacpp's stops at AVX2, the other's has AVX512-BF16 (a CPU
without it ends it). A peer that is not there, does not start or is not asked for (`--peers vllm`) is left out, and a note under the table
says why. A whole run takes more than ten minutes: each turn is told as it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import numpy as np
from harness import DATA, ROOT, Row, compare, cores, finish, interleave, options, say, stop
from peers import PEERS
from shape import write_qwen3

from danlu.client.load import Load, bodies

BENCH = Path(__file__).parent
LLAMA = PEERS / "llama/bin/python"
STREAMS = {1: 6, 16: 48, 64: 128}
"""Streams -> requests of a turn; an answer has 68 tokens on average."""
QUICK = {1: 1, 4: 4}
START_S = 240.0
WAIT_S = 300.0
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Seen:
    """What the clients of one number of streams saw. A piece of an answer is a token, or what the server sends together."""

    rate: float
    first_p50_ms: float
    gap_p95_ms: float


@dataclass(frozen=True)
class Peer:
    """How it is started, what it calls the model, the fields of a request that it does not take, and what else it is told."""

    command: Callable[[Path, int], list[str]]
    model: Callable[[Path], str] = lambda _: "bench"
    without: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def vllm(folder: Path, port: int) -> list[str]:
    flags = ["--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "64", "--gpu-memory-utilization", "0.2"]
    program = [str(PEERS / "vllm/bin/python"), "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    return [*program, *flags, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "bench"]


def transformers(folder: Path, port: int) -> list[str]:
    code = "from transformers.cli.transformers import main; main()"
    cache = ["--cb-block-size", "32", "--cb-num-blocks", "2048"]  # 64 sequences of 1,024 tokens
    flags = ["--continuous-batching", *cache, "--device", "cpu", "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-c", code, "serve", str(folder), *flags]


def llama_server(folder: Path, port: int) -> list[str]:
    """Its weights in bf16, as everybody's; without its parser of reasoning and tool calls."""
    slots = ["-np", "64", "-c", str(64 * 1024), "-t", str(cores())]
    flags = ["-m", _gguf(folder), *slots, "--skip-chat-parsing", "--host", "127.0.0.1", "--port", str(port), "--alias", "bench"]
    return [str(PEERS / "llama/bin/llama-server-vulkan"), *flags]


def xllamacpp(folder: Path, port: int) -> list[str]:
    """The same settings."""
    code = f"""import signal, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = {_gguf(folder)!r}, ["127.0.0.1"], {port}
params.n_parallel, params.n_ctx, params.force_pure_content_parser = 64, 64 * 1024, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = {cores()}
server = xllamacpp.Server(params)
signal.pause()"""
    return [str(LLAMA), "-c", code]


def _gguf(folder: Path) -> str:
    path = folder / "model.gguf"
    if LLAMA.exists() and not path.exists():
        subprocess.run([str(LLAMA), str(BENCH / "gguf_model.py"), str(folder)], check=True)
    return str(path)


OPENMP = (("OMP_NUM_THREADS", str(cores())),)
PEER: dict[str, Peer] = {
    "vLLM": Peer(vllm, environment=(*OPENMP, ("VLLM_CPU_OMP_THREADS_BIND", "nobind"))),
    "llama.cpp": Peer(llama_server, environment=OPENMP),
    "llama.cpp, AVX2": Peer(xllamacpp, environment=OPENMP),
    "transformers serve": Peer(transformers, str, ("ignore_eos", "stream_options"), OPENMP),
}
SHORT = {peer.command.__name__: name for name, peer in PEER.items()}
"""How a peer is asked for."""


def write_model(folder: Path, *, quick: bool) -> None:
    """Random weights, a byte-level BPE tokenizer and a chat template; no token ends a text, so that everybody makes as many."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    size = 25_600
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    # Bytes of ASCII only: random answers of others are no UTF-8, which llama.cpp's chats end with an error.
    alphabet = [one for one in pre_tokenizers.ByteLevel.alphabet() if one <= "~" or "\u0100" <= one <= "\u0120"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    texts = (
        (DATA / "reuters-r8-train.tab").read_text(encoding="utf-8").splitlines()
        if DATA.is_dir()
        else [json.dumps(bodies(Load("", "m"), 64))]
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([f"<{i}>" for i in range(size - tokenizer.get_vocab_size())])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    fast.save_pretrained(folder)
    write_qwen3(folder, vocab_size=size, eos_token_id=None, dtype=torch.bfloat16, quick=quick)


@contextmanager
def peer_running(peer: Peer, folder: Path, log: Path) -> Iterator[str]:
    """The URL of a peer that answers while the block runs; RuntimeError says why there is none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = peer.command(folder, port)
    if not Path(command[0]).exists():
        raise RuntimeError(f"{command[0].removeprefix(f'{ROOT}/')} is not there")
    with log.open("w") as out:
        environment = os.environ | ENVIRONMENT | dict(peer.environment)
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=folder, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"it did not start: {log.read_text(errors='replace').strip()[-300:]}")
            time.sleep(0.2)
        yield url
    finally:
        stop(process, timeout_s=15)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and did not end


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2).status_code == 200
    return False


@contextmanager
def danlu_running(folder: Path, log: Path) -> Iterator[str]:
    """Danlu's service on Ray Serve, behind HAProxy, as `danlu serve` runs it."""
    engine: dict[str, Any] = {
        "kind": "torch",
        "model_name_or_path": str(folder),
        "dtype": "bf16",
        "max_model_len": 1024,
        "max_num_seqs": 64,
    }
    engine["num_speculative_tokens"] = 0  # random weights repeat themselves, and would flatter
    service = {
        "name": "bench",
        "storage": str(folder / "storage"),
        "engine": engine | {"num_threads": cores()},
        "limits": {"request_timeout_s": WAIT_S},
        "http": {"port": 0, "haproxy": True},
    }
    command = [sys.executable, str(BENCH / "servers.py"), "danlu", json.dumps(service)]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith('{"url"')), None)
        if line is None:
            raise RuntimeError(f"Danlu did not start: {log.read_text()[-3000:]}")
        parts = urlsplit(json.loads(line)["url"])
        yield f"{parts.scheme}://{parts.netloc}"
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        stop(process)


async def ask(url: str, asked: Sequence[dict[str, Any]], streams: int) -> Seen:
    """So many clients, each of which waits for its answer's end. RuntimeError if a request fails."""
    left = iter(asked)
    firsts: list[float] = []
    gaps: list[float] = []
    timeout = aiohttp.ClientTimeout(total=None, sock_read=WAIT_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # llama.cpp's ends one after an answer without saying so before
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:

        async def client() -> None:
            for body in left:
                began, times, ended = time.perf_counter(), [], None
                async with session.post("/v1/chat/completions", json=body) as response:
                    if response.status != 200:
                        raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            choices = json.loads(line[6:]).get("choices")
                            if choices and choices[0]["delta"].get("content"):
                                times.append(time.perf_counter())
                            ended = (choices and choices[0].get("finish_reason")) or ended
                # A piece can be less than a character, and then waits for the next one: pieces are fewer than tokens.
                if not times or ("ignore_eos" in body and ended != "length"):
                    raise RuntimeError(f"{len(times)} pieces came, and the answer ended by {ended}")
                firsts.append(times[0] - began)
                gaps.extend(after - before for before, after in pairwise(times))

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(streams)))
        seconds = time.perf_counter() - began
    tokens = sum(int(body["max_tokens"]) for body in asked)
    return Seen(tokens / seconds, 1000 * float(np.median(firsts)), 1000 * float(np.percentile(gaps, 95)))


def turn(url: str, model: str, without: Sequence[str], streams: dict[int, int], seed: int) -> dict[int, Seen]:
    """Warmed up with as many streams as there will be."""
    found = {}
    for number, requests in {0: max(streams), **streams}.items():
        load = Load(url, model, seed=1000 * seed + number, max_tokens=None if number else 8)
        asked = [{key: value for key, value in body.items() if key not in without} for body in bodies(load, requests)]
        seen = asyncio.run(ask(url, asked, number or max(streams)))
        if number:
            found[number] = seen
            say(
                f"{number:3} streams: {seen.rate:7.1f} tokens/s, first token {seen.first_p50_ms:7.1f} ms (p50), "
                f"between tokens {seen.gap_p95_ms:6.1f} ms (p95)"
            )
    return found


def contestants(folder: Path, streams: dict[int, int], missing: dict[str, str]) -> dict[str, Callable[[], dict[int, Seen]]]:
    """Each starts its server, asks and ends it. A peer that cannot is tried once."""
    turns = dict.fromkeys(["Danlu", *PEER], 0)

    def danlu() -> dict[int, Seen]:
        turns["Danlu"] += 1
        with danlu_running(folder, folder / "danlu.log") as url:
            return turn(url, "bench", (), streams, turns["Danlu"])

    def against(name: str, peer: Peer) -> dict[int, Seen]:
        if name in missing:
            return {}
        turns[name] += 1
        try:
            with peer_running(peer, folder, folder / f"{name}.log") as url:
                return turn(url, peer.model(folder), peer.without, streams, turns[name])
        except (RuntimeError, subprocess.SubprocessError, aiohttp.ClientError, TimeoutError) as error:
            missing[name] = str(error)
            return {}

    return {"Danlu": danlu, **{name: (lambda name=name, peer=peer: against(name, peer)) for name, peer in PEER.items()}}


def rows(found: dict[str, list[dict[int, Seen]]], streams: dict[int, int]) -> list[Row]:
    made = []
    fields = (("rate", "tokens/s", False), ("first_p50_ms", "ms", True), ("gap_p95_ms", "ms", True))
    names = {"rate": "output", "first_p50_ms": "first token, p50", "gap_p95_ms": "between tokens, p95"}
    for number in streams:
        for field, unit, less in fields:
            ours = [float(getattr(one[number], field)) for one in found["Danlu"]]
            metric = f"{names[field]}, {number} stream{'s' if number > 1 else ''}"
            peers = {name: [float(getattr(one[number], field)) for one in found[name] if one] for name in PEER}
            there = {name: values for name, values in peers.items() if len(values) == len(ours)}
            made += [compare(metric, unit, ours, values, name, less_is_better=less) for name, values in there.items()]
            if not there:
                made.append(compare(metric, unit, ours))
    return made


def main() -> None:
    given = options(__doc__, rounds=3, peers=list(SHORT))
    streams = QUICK if given.quick else STREAMS
    missing = {name: "it was not asked for" for short, name in SHORT.items() if short not in given.peers}
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        write_model(folder, quick=given.quick)
        say(f"{(folder / 'model.safetensors').stat().st_size / 1e6:.0f} MB of weights")
        found = interleave(contestants(folder, streams, missing), given.rounds)
    notes = [f"{cores()} cores, shared with the clients; Danlu is its whole service: Ray Serve in HAProxy mode, gateway, engine"]
    finish("serving", given, rows(found, streams), notes + [f"without {name}: {why}" for name, why in missing.items()])


if __name__ == "__main__":
    main()
