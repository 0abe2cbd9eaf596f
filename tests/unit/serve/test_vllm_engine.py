"""The vLLM engine's child process, over a stand-in that is a real process and a real server. What vLLM itself says: test_conformance."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
from lm import ask, greedy, ids_of, reference, write_adapter, write_byte_tokenizer, write_family
from vllm_stand_in import write_interpreter

from danlu.artifact.bundle import Bundle, BundleMeta, Lineage, Probe, write_bundle
from danlu.errors import ModelError, QualityError, RequestError, ResourceError
from danlu.metrics import catalog
from danlu.serve.engines.vllm import child as child_module
from danlu.serve.engines.vllm import wire
from danlu.serve.engines.vllm.command import command, environment
from danlu.serve.engines.vllm.engine import VllmEngine
from danlu.serve.engines.vllm.model import find, make_reader
from danlu.serve.engines.vllm.probes import check_probes
from danlu.serve.generation import Delta, Generation, Sampling, TokenLogprob
from danlu.spec.task import Pretrain
from danlu.spec.tuning import Lora
from danlu.spec.vllm import Vllm

PROMPT = tuple(range(7, 27))
GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
WAIT_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("model") / "base", "qwen3")


@pytest.fixture
def spec(folder: Path, tmp_path: Path) -> Callable[..., Vllm]:
    python = write_interpreter(tmp_path)
    return lambda how="family", **more: Vllm(
        **{"model_name_or_path": str(folder), "python": python, "device": "cpu", "args": [f"--stand-in={how}"]} | more
    )


def pids(engine: VllmEngine) -> list[int]:
    """Of the server and of its own child, as they have said themselves."""
    assert engine.child is not None
    return [int(line.split()[1]) for line in engine.child.lines if line.startswith("pid ")]


def gone(some: list[int]) -> bool:
    """Whether they have ended; one that nobody has buried has."""

    def lives(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return not any(map(lives, some))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_starts_answers_and_leaves_nothing(spec: Callable[..., Vllm]) -> None:
    async def life() -> None:
        engine = VllmEngine(spec())
        with pytest.raises(ResourceError, match="not running"):
            engine.check_health()
        await engine.start()
        assert (engine.max_model_len, engine.child is not None and engine.child.folder.stat().st_mode & 0o777) == (128, 0o700)
        deltas = await ask(engine, PROMPT, GREEDY)  # type: ignore[arg-type]
        usage = deltas[-1].usage
        assert ids_of(deltas) == [PROMPT[i % 20] for i in range(24)]
        assert usage is not None
        assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (20, 3, 24)
        assert engine.told == {catalog.SERVE_WAITING: 0, catalog.SERVE_CACHE_USE: 0.25, catalog.SERVE_PREFIX_QUERIED: 20}
        family = pids(engine)
        assert len(family) == 2
        assert not gone(family)
        begun = asyncio.create_task(ask(engine, PROMPT, GREEDY))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await engine.stop()
        assert len(ids_of(await begun)) == 24, "what has begun is finished"
        assert gone(family)
        assert not engine.child.folder.exists()
        with pytest.raises(ResourceError, match="not running"):
            engine.check_health()

    asyncio.run(life())


def test_a_start_that_fails_is_told_in_vllms_own_words(spec: Callable[..., Vllm]) -> None:
    with pytest.raises(ResourceError, match=r"vLLM has ended with code 3.*ValueError: the model is too large for the GPU"):
        asyncio.run(VllmEngine(spec("fails")).start())


def test_a_start_that_takes_too_long_is_given_up_and_nothing_is_left(spec: Callable[..., Vllm], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module.Child.__init__, "__kwdefaults__", {"grace_s": 0.2})  # it does not end when asked
    engine = VllmEngine(spec("deaf", start_timeout_s=0.4))
    with pytest.raises(ResourceError, match=r"start_timeout_s: vLLM has not answered within start_timeout_s=0.4"):
        asyncio.run(engine.start())
    assert gone(pids(engine))


@pytest.mark.parametrize("victim", ["server", "keeper"])
def test_when_the_child_dies_every_client_gets_an_error_and_health_turns_red(victim: str, spec: Callable[..., Vllm]) -> None:
    async def life() -> None:
        engine = VllmEngine(spec())
        await engine.start()
        assert engine.child is not None
        long = replace(GREEDY, max_tokens=100)
        answers = [engine.generate(Generation(str(i), PROMPT, long)) for i in range(5)]
        for answer in answers:
            await anext(answer)
        family = pids(engine)
        os.kill(family[0] if victim == "server" else engine.child.process.pid, signal.SIGKILL)

        async def rest(answer: Any) -> list[Delta]:
            return [delta async for delta in answer]

        for error in await asyncio.gather(*map(rest, answers), return_exceptions=True):
            assert isinstance(error, ResourceError), error
            assert "was ended by signal 9" in str(error)
        with pytest.raises(ResourceError, match="signal 9"):
            engine.check_health()
        with pytest.raises(ResourceError, match="signal 9"):
            await anext(engine.generate(Generation("late", PROMPT, GREEDY)))
        await engine.stop()
        assert gone(family), "its own children too"

    asyncio.run(life())


def test_nothing_outlives_a_replica_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from danlu.serve.engines.vllm.child import Child\n"
        "async def life():\n"
        "    child = Child(lambda folder: [sys.argv[1], '--stand-in=family', f'--uds={folder}/s'], {}, lambda: None)\n"
        "    while len(child.lines) < 2:\n"
        "        await asyncio.sleep(0.01)\n"
        "    print(*[line.split()[1] for line in child.lines], child.process.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(life())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, write_interpreter(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    family = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(family) == 3
    assert not gone(family)
    parent.kill()
    parent.wait()
    wait_until(lambda: gone(family))


def test_closing_an_answer_is_told_to_vllm(spec: Callable[..., Vllm]) -> None:
    async def life() -> None:
        engine = VllmEngine(spec())
        await engine.start()
        assert engine.child is not None
        answer = engine.generate(Generation("a", PROMPT, replace(GREEDY, max_tokens=100)))
        await anext(answer)
        assert engine.stats()[catalog.SERVE_RUNNING] == 1
        await answer.aclose()
        assert engine.stats()[catalog.SERVE_RUNNING] == 0
        await asyncio.to_thread(wait_until, lambda: any(line.startswith("aborted") for line in engine.child.lines))
        await engine.stop()

    asyncio.run(life())


def test_adapters_come_and_go_and_one_in_use_stays_until_it_is_done(spec: Callable[..., Vllm], folder: Path, tmp_path: Path) -> None:
    small = write_adapter(folder, tmp_path / "small", 1, r=4, target_modules=["q_proj"])
    large = write_adapter(folder, tmp_path / "large", 1, r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 40})

    async def life() -> None:
        engine = VllmEngine(spec(adapters={"first": str(small)}, max_lora_rank=8))
        await engine.start()
        assert engine.adapters() == ["first"]
        with pytest.raises(ModelError, match="rank 40; max_lora_rank=8"):
            await engine.load_adapter("large", str(large))
        with pytest.raises(ModelError, match="loaded already"):
            await engine.load_adapter("first", str(small))
        answer = engine.generate(Generation("a", PROMPT, replace(GREEDY, max_tokens=100), adapter="first"))
        await anext(answer)
        going = asyncio.create_task(engine.unload_adapter("first"))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="no adapter 'first'"):
            await anext(engine.generate(Generation("b", PROMPT, GREEDY, adapter="first")))
        assert not going.done()
        assert [delta async for delta in answer][-1].finish_reason == "length"
        await going
        await engine.load_adapter("first", str(small))
        with pytest.raises(ModelError, match="rank 40; max_lora_rank=8"):
            await engine.load_adapter("first", str(large), in_place=True)
        assert engine.adapters() == ["first"], "what cannot be served takes nothing away"
        await engine.load_adapter("first", str(small), in_place=True)
        assert engine.adapters() == ["first"]
        await engine.stop()
        plain = VllmEngine(spec())
        await plain.start()
        with pytest.raises(ModelError, match="without LoRA"):
            await plain.load_adapter("first", str(small))
        await plain.stop()

    asyncio.run(life())


def test_a_spec_is_vllms_command_line_and_its_own_flags_come_last() -> None:
    spec = Vllm(
        model_name_or_path="m",
        tensor_parallel_size=4,
        quantization="fp8",
        max_model_len=8192,
        enable_prefix_caching=False,
        allow_runtime_lora_updating=True,
        max_lora_rank=64,
        args=["--kv-cache-dtype", "fp8", "--enforce-eager"],
    )
    made = command(spec, "/opt/vllm/bin/python", Path("/m"), Path("/s"), dtype="bf16")
    assert made[:8] == [
        "/opt/vllm/bin/python",
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        "/m",
        "--kv-cache-dtype",
        "fp8",
        "--enforce-eager",
    ]
    assert {
        "--uds=/s",
        "--dtype=bfloat16",
        "--tensor-parallel-size=4",
        "--quantization=fp8",
        "--max-model-len=8192",
        "--no-enable-prefix-caching",
        "--enable-lora",
        "--max-lora-rank=64",
    } <= set(made)
    found = environment(spec, "/opt/vllm/bin/python", {"PYTHONPATH": "here", "CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert "PYTHONPATH" not in found, "another interpreter's packages are not ours"
    assert (found["CUDA_VISIBLE_DEVICES"], found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]) == ("0,1,2,3", "True")
    assert spec.num_gpus == 4


def test_an_answer_is_read_however_its_bytes_are_cut() -> None:
    first = {"choices": [{"text": "né", "token_ids": [5, 6], "finish_reason": None, "logprobs": None}]}
    second = {"choices": [{"text": "e", "token_ids": [7], "finish_reason": "stop", "logprobs": None}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 3}}
    stream = "".join(f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in (first, second, usage)).encode() + b"data: [DONE]\n\n"

    async def read(size: int) -> list[Delta]:
        async def chunks() -> Any:
            for start in range(0, len(stream), size):
                yield stream[start : start + size]

        return [delta async for delta in wire.deltas(chunks(), Generation("a", (1, 2, 3)), 3, str)]

    whole = asyncio.run(read(10**6))
    assert [(delta.text, delta.token_ids, delta.finish_reason) for delta in whole] == [("né", (5, 6), None), ("e", (7,), "stop")]
    assert all(asyncio.run(read(size)) == whole for size in (1, 2, 7, 50))

    async def broken() -> Any:
        yield b'data: {"error": {"message": "CUDA error", "code": 500}}\n\n'

    async def fails() -> None:
        async for _ in wire.deltas(broken(), Generation("a", (1,)), 1, str):
            pass

    with pytest.raises(ResourceError, match="CUDA error"):
        asyncio.run(fails())


def bundle_of(folder: Path, path: Path, probes: list[Probe], **more: Any) -> Bundle:
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    meta = {"name": "b", "task": Pretrain(), "labels": [], "max_length": 64, "precision": "fp32", "probes": probes, "lineage": lineage}
    path.mkdir()
    (path / "model").symlink_to(folder)
    return write_bundle(path, BundleMeta(**meta | more))


def test_an_adapters_bundle_is_served_merged_as_peft_merges_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = write_adapter(folder, tmp_path / "adapter", 3, r=4, target_modules=["q_proj", "v_proj"])
    write_byte_tokenizer(adapter)
    tuned = {"weights": "adapter", "base_model": str(folder), "tuning": Lora()}
    files = find(Vllm(), bundle_of(adapter, tmp_path / "bundle", [], **tuned))
    assert files.dtype == "fp32"
    merged = peft.PeftModel.from_pretrained(reference(folder), adapter).merge_and_unload().state_dict()
    found = reference(files.folder).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in merged.items())
    assert make_reader(files.folder, 128).tokenize("wheat") == make_reader(folder, 128).tokenize("wheat")


def test_a_bundle_is_served_only_if_its_probes_come_out(folder: Path, tmp_path: Path) -> None:
    """The score is a plain forward of transformers, in vLLM's place."""
    model, reader = reference(folder), make_reader(folder, 128)
    text = "the market price rose"
    ids = reader.tokenize(text)

    async def score(ids: Any, shift: float = 0.0) -> list[TokenLogprob]:
        with torch.inference_mode():
            rows = model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
        found = [TokenLogprob(ids[0], "", None)]
        for token, row in zip(ids[1:], rows, strict=False):
            best = int(row.argmax())
            found.append(TokenLogprob(token, "", float(row[token]) - shift, ((best, "", float(row[best])),)))
        return found

    with torch.inference_mode():
        loss = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
        made = greedy(model, ids, 4)
    logprobs = [float(one.logprob or 0) for one in asyncio.run(score([*ids, *made]))[-4:]]
    probe = Probe(
        text=text, loss=loss, prompt_token_ids=ids, completion=reader.detokenize(made), completion_token_ids=made, logprobs=logprobs
    )
    bundle = bundle_of(folder, tmp_path / "bundle", [probe])
    asyncio.run(check_probes(score, reader, bundle, served_in_fp32=True))
    with pytest.raises(QualityError, match="vLLM finds a loss of"):
        asyncio.run(check_probes(lambda ids: score(ids, 0.5), reader, bundle, served_in_fp32=True))
    other = bundle_of(folder, tmp_path / "other", [probe.model_copy(update={"loss": None, "completion_token_ids": [9, *made[1:]]})])
    with pytest.raises(QualityError, match=r"gives .* a log probability of"):
        asyncio.run(check_probes(score, reader, other, served_in_fp32=True))
    with pytest.raises(QualityError, match="none of the bundle's 1 probes fits"):
        asyncio.run(check_probes(score, make_reader(folder, 4), bundle, served_in_fp32=True))
