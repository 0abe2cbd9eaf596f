"""A language-model engine in process: output tokens per second of 1, 16 and 64 streams that begin together, fresh prompts in every round.

A Qwen3-shaped model of 95M random parameters in bf16 (fp32 where the CPU does not multiply bf16), prompts of 32 tokens, greedy.
Against `model.generate` on one padded batch of the same prompts, and at one stream against the memory: a token reads every weight once,
so the bound is the measured read bandwidth over the weights' bytes. Each contestant is a process of its own that takes all cores.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import compare, cores, finish, interleave, options, say

VOCABULARY = 25_600
PROMPT_TOKENS = 32
STREAMS = {1: 128, 16: 96, 64: 64}
"""Streams -> tokens of each."""
QUICK = {1: 8, 4: 4}


def write_model(folder: Path, *, quick: bool) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w0", eos_token="w1").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_hidden_layers=2 if quick else 12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).to(dtype()).save_pretrained(folder)


def dtype() -> Any:
    import torch

    from danlu.tasks.device import has_native_bf16

    return torch.bfloat16 if has_native_bf16(torch.device("cpu")) else torch.float32


def prompts(number: int, seed: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(seed).integers(2, VOCABULARY, size=(number, PROMPT_TOKENS)).tolist()


def danlu(folder: Path, streams: dict[int, int], seed: int) -> dict[str, float]:
    """Streams -> output tokens per second."""
    import torch

    from danlu.serve.engines.torch.engine import TorchEngine
    from danlu.serve.generation import Generation, Sampling
    from danlu.spec.serve import Torch

    torch.set_num_threads(1)  # this thread owns no team of its own: the engine's does the work
    spec = Torch(
        model_name_or_path=str(folder),
        dtype="bf16" if dtype() == torch.bfloat16 else "fp32",
        max_model_len=256,
        num_threads=cores(),
        enable_prefix_caching=False,
    )

    async def one(engine: TorchEngine, prompt: list[int], number: int) -> int:
        sampling = Sampling(max_tokens=number, temperature=0.0, ignore_eos=True)
        return sum([len(delta.token_ids) async for delta in engine.generate(Generation("a", tuple(prompt), sampling))])

    async def life() -> dict[str, float]:
        engine, found = TorchEngine(spec), {}
        await engine.start()
        await asyncio.gather(*(one(engine, prompt, 4) for prompt in prompts(max(streams), seed + 1000)))
        for number, length in streams.items():
            began = time.perf_counter()
            made = await asyncio.gather(*(one(engine, prompt, length) for prompt in prompts(number, seed + number)))
            found[str(number)] = sum(made) / (time.perf_counter() - began)
        await engine.stop()
        return found

    return asyncio.run(life())


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
    "danlu": danlu,
    "model.generate": hugging_face,
    "the memory's bound": memory_bound,
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
    rows = []
    for number in streams:
        ours = [one[str(number)] for one in found["danlu"]]
        for other in ("model.generate", "the memory's bound"):
            theirs = [one[str(number)] for one in found[other] if str(number) in one]
            if theirs:
                rows.append(compare(f"{number} streams", "tokens/s", ours, theirs, other))
    bound = statistics.median(one["1"] for one in found["the memory's bound"])
    finish("engine", given, rows, [f"the memory gives one stream at most {bound:.0f} tokens/s"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        contestant(*sys.argv[2:6])
    else:
        main()
