"""A language-model engine: output tokens per second of 1, 4, 16 and 64 streams that begin together, fresh prompts in every round.

A Qwen3-shaped model of 95M random parameters in bf16 (fp32 where the CPU does not multiply bf16), prompts of 32 tokens, greedy: the
engine with its compiled kernels and without, in process and over HTTP (the gateway on uvicorn, one process; every answer streamed to a
client in another). Against `model.generate` on one padded batch of the same prompts, and at one stream against the memory: a token reads
every weight once, so the bound is the measured read bandwidth over the weights' bytes. Weights of 8 and 4 bits against those, Danlu's and
bitsandbytes', and what they cost a model that has learned something (`perplexity.py`). Then what LoRA adapters cost (four and the base,
in a batch of 16), what guessing ahead saves or costs, by prompt lookup and by a draft model (of a pair made for it: 246M parameters in 36
layers, the draft is the first two, and the others change its answers seldom or often), and what a cached prefix saves. Each contestant is
a process of its own that takes all cores.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import DATA, Row, compare, cores, finish, interleave, options, say
from perplexity import perplexities
from shape import write_bitsandbytes_bundle, write_pair, write_qwen3

from danlu.metrics.catalog import SERVE_DRAFTED, SERVE_DRAFTED_RIGHT

VOCABULARY = 25_600
PROMPT_TOKENS = 32
PREFIX_TOKENS = 400
STREAMS = {1: 128, 4: 96, 16: 96, 64: 64}
"""Streams -> tokens of each."""
QUICK = {1: 8, 4: 4}
LORA = {"q, v": ("q_proj", "v_proj"), "all linears": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
ADAPTERS = 4
BITSANDBYTES = {"bnb_int8": "int8", "bnb_nf4": "int4"}
"""bitsandbytes' kinds -> Danlu's of as many bits."""
UPPER = (0.02, 0.05)
"""Of the pairs of model and draft: how much the layers that the draft lacks add."""


def write_model(folder: Path, *, quick: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w0", eos_token="w1")
    fast.save_pretrained(folder)
    for upper in UPPER:
        pair = folder / f"pair {upper}"
        write_pair(pair, vocab_size=VOCABULARY, eos_token_id=1, dtype=dtype(), upper=upper, quick=quick)
        for one in (pair, pair / "draft"):
            fast.save_pretrained(one)
    model = write_qwen3(folder, vocab_size=VOCABULARY, eos_token_id=1, dtype=dtype(), quick=quick)
    for name, modules in LORA.items():
        for number in range(ADAPTERS):
            write_adapter(model, folder / name / str(number), modules)
    for kind in BITSANDBYTES:
        fast.save_pretrained(folder / kind / "model")
        write_bitsandbytes_bundle(folder / kind, model, kind)


def write_adapter(model: Any, folder: Path, modules: Sequence[str]) -> None:
    """As PEFT writes one; r = 16, and B not zero."""
    import peft
    import torch
    from torch import nn

    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(modules)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder)
    adapted.unload()


def dtype() -> Any:
    import torch

    from danlu.tasks.device import has_native_bf16

    return torch.bfloat16 if has_native_bf16(torch.device("cpu")) else torch.float32


def prompts(number: int, seed: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(seed).integers(2, VOCABULARY, size=(number, length)).tolist()


def make_engine(folder: Path, **more: Any) -> Any:
    import torch

    from danlu.artifact.bundle import FILE, read_bundle
    from danlu.serve.engines.torch.engine import TorchEngine
    from danlu.spec.serve import Torch

    torch.set_num_threads(1)  # this thread owns no team of its own: the engine's does the work
    given = {"dtype": "bf16" if dtype() == torch.bfloat16 else "fp32", "max_model_len": 256, "enable_prefix_caching": False}
    given["num_speculative_tokens"] = 0  # random weights repeat themselves, and would flatter every other number
    spec: dict[str, Any] = {"num_threads": cores()} | given | more
    if (folder / FILE).exists():
        return TorchEngine(Torch(**spec), read_bundle(folder))
    return TorchEngine(Torch(model_name_or_path=str(folder), **spec))


async def ask(engine: Any, prompt: list[int], number: int, adapter: str | None = None, **how: Any) -> int:
    """Tokens that came."""
    from danlu.serve.generation import Generation, Sampling

    sampling = Sampling(**{"max_tokens": number, "temperature": 0.0, "ignore_eos": True} | how)
    return sum([len(delta.token_ids) async for delta in engine.generate(Generation("a", tuple(prompt), sampling, adapter=adapter))])


def in_process(folder: Path, streams: dict[int, int], seed: int, **more: Any) -> dict[str, float]:
    """Streams -> output tokens per second."""

    async def life() -> dict[str, float]:
        engine, found = make_engine(folder, **more), {}
        await engine.start()
        await asyncio.gather(*(ask(engine, prompt, 4) for prompt in prompts(max(streams), seed + 1000)))
        for number, length in streams.items():
            began = time.perf_counter()
            made = await asyncio.gather(*(ask(engine, prompt, length) for prompt in prompts(number, seed + number)))
            found[str(number)] = sum(made) / (time.perf_counter() - began)
        await engine.stop()
        return found

    return asyncio.run(life())


def over_http(folder: Path, streams: dict[int, int], seed: int) -> dict[str, float]:
    """The same, every answer streamed to a client of another process."""
    import socket

    import uvicorn

    from danlu.serve.gateway import Gateway
    from danlu.spec.serve import Limits

    gateway = Gateway(make_engine(folder), "bench", Limits(max_ongoing_requests=max(streams)), lambda *_, **__: None)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
    server = uvicorn.Server(uvicorn.Config(gateway, log_level="warning", access_log=False))
    command = [sys.executable, str(Path(__file__).with_name("load.py"))]

    def body(prompt: list[int], length: int) -> str:
        asked = {"prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True, "stream": True}
        return json.dumps({"model": "bench", **asked})

    async def life() -> dict[str, float]:
        found = {}
        await gateway.start()
        serving = asyncio.create_task(server.serve([listening]))
        client = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert client.stdin is not None
        assert client.stdout is not None
        while not server.started:
            await asyncio.sleep(0.05)
        for number, length in [(max(streams), 4), *streams.items()]:
            work = {"url": url, "bodies": [body(prompt, length) for prompt in prompts(number, seed + number + length)]}
            client.stdin.write(json.dumps(work | {"clients": number, "seconds": 0}).encode() + b"\n")
            told = json.loads(await client.stdout.readline())
            assert len(told["latencies"]) == number, f"{told['failed']} requests were not answered with 200"
            found[str(number)] = number * length / told["seconds"]
        client.stdin.close()
        await client.wait()
        server.should_exit = True
        await serving
        await gateway.drain()
        return found

    return asyncio.run(life())


def by_bitsandbytes(kind: str) -> Callable[[Path, dict[int, int], int], dict[str, float]]:
    """One stream and 16: on a CPU no more of it is worth the time."""
    return lambda folder, streams, seed: in_process(folder / kind, {one: streams[one] for one in (1, 16) if one in streams}, seed)


def with_adapters(folder: Path, streams: dict[int, int], seed: int) -> dict[str, float]:
    """Tokens per second of one batch: of the base alone, and of the base and four adapters in turn, both with the adapters loaded."""
    number = 16 if 16 in streams else max(streams)

    async def life() -> dict[str, float]:
        engine, found = make_engine(folder), {}
        await engine.start()
        for name in LORA:
            for i in range(ADAPTERS):
                await engine.load_adapter(str(i), str(folder / name / str(i)))
            owners = [None if not i % (ADAPTERS + 1) else str(i % (ADAPTERS + 1) - 1) for i in range(number)]
            for what, asked in (("warm", owners), ("base", [None] * number), ("mixed", owners)):
                began = time.perf_counter()
                each = zip(prompts(number, seed + number), asked, strict=True)
                made = await asyncio.gather(*(ask(engine, prompt, streams[number], owner) for prompt, owner in each))
                found[f"{name}: {what}"] = sum(made) / (time.perf_counter() - began)
            for i in range(ADAPTERS):
                await engine.unload_adapter(str(i))
        await engine.stop()
        return found

    return asyncio.run(life())


def with_prefix(folder: Path, streams: dict[int, int], seed: int) -> dict[str, float]:
    """Milliseconds to the first token of a prompt whose first 400 tokens are new, and of one that has them from the cache; medians of 5."""

    async def life() -> dict[str, float]:
        engine = make_engine(folder, max_model_len=512, enable_prefix_caching=True, max_num_seqs=16)
        await engine.start()
        await ask(engine, prompts(1, seed + 1000)[0], 4)
        times: dict[str, list[float]] = {"fresh": [], "cached": []}
        for turn, prefix in enumerate(prompts(5, seed, PREFIX_TOKENS)):
            for what, tail in zip(times, prompts(2, seed + turn + 1), strict=True):
                began = time.perf_counter()
                await ask(engine, prefix + tail, 1)
                times[what].append(1000 * (time.perf_counter() - began))
        await engine.stop()
        return {what: statistics.median(some) for what, some in times.items()}

    return asyncio.run(life())


def with_guesses(folder: Path, streams: dict[int, int], seed: int) -> dict[str, float]:
    """Tokens per second of one stream, guessing ahead or not: of a text that is one token again and again, and of one drawn at random."""
    texts: dict[str, dict[str, Any]] = {"repeating": {"logit_bias": {7: 1e4}}, "random": {"temperature": 1.0, "seed": seed}}
    prompt, number, found = prompts(1, seed)[0], 2 * streams[1], {}

    async def life(guesses: int) -> None:
        engine = make_engine(folder, max_model_len=512, num_speculative_tokens=guesses)
        await engine.start()
        for name, how in texts.items():
            await ask(engine, prompt, 4, **how)
            began = time.perf_counter()
            found[f"{name}: {guesses}"] = await ask(engine, prompt, number, **how) / (time.perf_counter() - began)
        await engine.stop()

    for guesses in (0, 4) if seed % 2 else (4, 0):
        asyncio.run(life(guesses))
    return found


def with_drafts(folder: Path, streams: dict[int, int], seed: int) -> dict[str, float]:
    """Tokens per second of 1 and 4 streams, with a draft model or without guesses, and how many of its guesses were right."""
    found: dict[str, float] = {}

    async def life(pair: Path, guesses: int) -> None:
        more = {"draft_model": str(pair / "draft")} if guesses else {}
        engine = make_engine(pair, num_speculative_tokens=guesses, **more)
        await engine.start()
        await asyncio.gather(*(ask(engine, prompt, 8) for prompt in prompts(4, seed + 1000)))
        for number in (1, 4):
            before, began = dict(engine.stats()), time.perf_counter()
            made = await asyncio.gather(*(ask(engine, prompt, streams[number]) for prompt in prompts(number, seed + number)))
            found[f"{pair.name}, {number}: {guesses}"] = sum(made) / (time.perf_counter() - began)
            if guesses:
                right, all_ = (engine.stats()[one] - before[one] for one in (SERVE_DRAFTED_RIGHT, SERVE_DRAFTED))
                found[f"{pair.name}, {number}: right"] = right / max(1, all_)
        await engine.stop()

    for upper in UPPER:
        for guesses in (0, 4) if seed % 2 else (4, 0):
            asyncio.run(life(folder / f"pair {upper}", guesses))
    return found


def hugging_face(folder: Path, streams: dict[int, int], seed: int) -> dict[str, float]:
    """model.generate, one batch: prompts of one length, so no padding either."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(cores())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype()).eval()

    def run(batch: list[list[int]], length: int) -> int:
        made = model.generate(torch.tensor(batch), max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)
        return made[:, PROMPT_TOKENS:].numel()

    found = {}
    run(prompts(2, seed + 1000), 4)
    for number, length in streams.items():
        began = time.perf_counter()
        found[str(number)] = run(prompts(number, seed + number), length) / (time.perf_counter() - began)
    return found


def memory_bound(folder: Path, streams: dict[int, int], seed: int) -> dict[str, float]:
    """One stream's bound: bytes read per second by a sum over 1 GiB, over the bytes of all weights."""
    import torch

    torch.set_num_threads(cores())
    large = torch.ones(2**27, dtype=torch.int64)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        large.sum()
        best = max(best, large.nbytes / (time.perf_counter() - began))
    return {"1": best / (folder / "model.safetensors").stat().st_size}


CONTESTANTS: dict[str, Callable[[Path, dict[int, int], int], dict[str, float]]] = {
    "Danlu": in_process,
    "Danlu in int8": lambda folder, streams, seed: in_process(folder, streams, seed, quantization="int8"),
    "Danlu in int4": lambda folder, streams, seed: in_process(folder, streams, seed, quantization="int4"),
    **{f"Danlu in {kind}": by_bitsandbytes(kind) for kind in BITSANDBYTES},
    "Danlu, PyTorch only": lambda folder, streams, seed: in_process(folder, streams, seed, kernels="off"),
    "Danlu over HTTP": over_http,
    "model.generate": hugging_face,
    "the memory's bound": memory_bound,
    "adapters": with_adapters,
    "prefix": with_prefix,
    "guesses": with_guesses,
    "drafts": with_drafts,
}


def alone(name: str, folder: Path, streams: dict[int, int], seed: int) -> dict[str, float]:
    """A contestant in a process of its own."""
    command = [sys.executable, __file__, "--contestant", name, str(folder), json.dumps(streams), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def contestant(name: str, folder: str, streams: str, seed: str) -> None:
    sizes = {int(number): length for number, length in json.loads(streams).items()}
    print(json.dumps(CONTESTANTS[name](Path(folder), sizes, int(seed))))


def rows(found: dict[str, list[dict[str, float]]], streams: dict[int, int]) -> list[Row]:
    made = []
    for number in streams:
        at = {name: [one[str(number)] for one in turns if str(number) in one] for name, turns in found.items()}
        for ours in ("Danlu", "Danlu, PyTorch only", "Danlu over HTTP"):
            for other in ("Danlu", "model.generate", "the memory's bound"):
                if at[other] and ours != other:
                    made.append(compare(f"{ours}, {number} streams", "tokens/s", at[ours], at[other], other))
    for kind in ("int8", "int4"):
        for number in streams:
            ours, other = ([one[str(number)] for one in found[name]] for name in (f"Danlu in {kind}", "Danlu"))
            made.append(compare(f"Danlu in {kind}, {number} streams", "tokens/s", ours, other, "Danlu"))
    for kind, own in BITSANDBYTES.items():
        for number in (one for one in streams if str(one) in found[f"Danlu in {kind}"][0]):
            for other in ("Danlu", f"Danlu in {own}"):
                ours, theirs = ([one[str(number)] for one in found[name]] for name in (f"Danlu in {kind}", other))
                made.append(compare(f"Danlu in {kind}, {number} streams", "tokens/s", ours, theirs, other))
    for name in LORA:
        base, mixed = ([one[f"{name}: {what}"] for one in found["adapters"]] for what in ("base", "mixed"))
        made.append(compare(f"{ADAPTERS} LoRA adapters and the base, {name}", "tokens/s", mixed, base, "the base alone"))
    for text in ("repeating", "random"):
        without, guessing = ([one[f"{text}: {number}"] for one in found["guesses"]] for number in (0, 4))
        made.append(compare(f"guessing ahead, 1 stream, {text} text", "tokens/s", guessing, without, "no guesses"))
    for upper in UPPER:
        for number in (1, 4):
            at = {what: [one[f"pair {upper}, {number}: {what}"] for one in found["drafts"]] for what in ("0", "4", "right")}
            metric = f"a draft model, {statistics.median(at['right']):.0%} of its guesses right, {number} streams"
            made.append(compare(metric, "tokens/s", at["4"], at["0"], "no guesses"))
    cached, fresh = ([one[what] for one in found["prefix"]] for what in ("cached", "fresh"))
    made.append(compare(f"first token, {PREFIX_TOKENS} tokens cached", "ms", cached, fresh, "none cached", less_is_better=True))
    return made


def main() -> None:
    given = options(__doc__, rounds=3)
    streams = QUICK if given.quick else STREAMS
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        write_model(folder, quick=given.quick)
        say(f"{(folder / 'model.safetensors').stat().st_size / 1e6:.0f} MB of weights")
        turns: dict[str, int] = dict.fromkeys(CONTESTANTS, 0)

        def run(name: str) -> dict[str, float]:
            turns[name] += 1
            return alone(name, folder, streams, seed=turns[name])

        found = interleave({name: (lambda name=name: run(name)) for name in CONTESTANTS}, given.rounds)
    bound = statistics.median(one["1"] for one in found["the memory's bound"])
    notes = [f"the memory gives one stream at most {bound:.0f} tokens/s"]
    table = rows(found, streams)
    if DATA.is_dir():
        read = perplexities(steps=2 if given.quick else 300)
        for kind in [kind for kind in read if kind not in ("fp32", "bf16")]:
            table.append(compare(f"perplexity, {kind}", "per token", [read[kind]], [read["bf16"]], "bf16", less_is_better=True))
        notes.append(f"perplexity of the small model in fp32: {read['fp32']:.3f}")
    else:
        notes.append(f"no perplexity: {DATA} is not there")
    finish("engine", given, table, notes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        contestant(*sys.argv[2:6])
    else:
        main()
