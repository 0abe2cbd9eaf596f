"""What every engine for language models keeps: one line in ENGINES makes it prove that. Nothing here knows what a model says."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from lm import write_family

from danlu.errors import ModelError, RequestError
from danlu.metrics import catalog
from danlu.serve.engines.echo import EchoTextEngine
from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.engines.vllm.engine import VllmEngine
from danlu.serve.gateway import Gateway
from danlu.serve.generation import Chat, Delta, Generation, Guide, Prompt, Sampling, TextEngine
from danlu.serve.openai.tools import CLOSE, OPEN, CallDelta, ToolCallParser
from danlu.spec.serve import EchoText, Limits, Torch
from danlu.spec.vllm import Vllm

VLLM = Path(__file__).parents[3] / ".cache/bench/vllm/bin/python"
"""An environment of vLLM's CPU build, where somebody has made one."""


def make_vllm(decoder: Path) -> TextEngine:
    small: dict[str, Any] = {"gpu_memory_utilization": 0.05, "max_num_seqs": 16, "args": ["--enforce-eager"]}
    return VllmEngine(Vllm(model_name_or_path=str(decoder), python=str(VLLM), device="cpu", dtype="fp32", **small))


ENGINES: dict[str, Callable[[Path], TextEngine]] = {
    "echo": lambda _: EchoTextEngine(EchoText(max_model_len=512)),
    "torch": lambda decoder: TorchEngine(Torch(model_name_or_path=str(decoder), dtype="fp32", kv_cache_memory_gb=0.1)),
    "vllm": make_vllm,
}
"""Name -> an engine that has not been started, with room for 128 tokens or more; from the folder of a tiny decoder."""

NAMES = [
    pytest.param(
        name, marks=[pytest.mark.soak, pytest.mark.skipif(not VLLM.exists(), reason=f"there is no vLLM for a CPU: {VLLM} is not there")]
    )
    if name == "vllm"
    else name
    for name in ENGINES
]

PROMPT = "the market price rose on the new report"
GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "grade": {"enum": ["a", "b"]}},
    "required": ["name", "grade"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("decoder"), "qwen3", head_dim=64)  # vLLM's kernels have no smaller heads


class Kept:
    """Makes engines, of which `with_engine` asks one again and again: it takes most of a minute to start."""

    def __init__(self, make: Callable[[], TextEngine]) -> None:
        self.make, self.engine, self.loop = make, make(), asyncio.new_event_loop()
        self.started = False

    def __call__(self) -> TextEngine:
        return self.make()

    def run(self, body: Callable[[TextEngine], Coroutine[Any, Any, Any]]) -> Any:
        if not self.started:
            self.loop.run_until_complete(self.engine.start())
            self.started = True
        return self.loop.run_until_complete(body(self.engine))

    def close(self) -> None:
        if self.started:
            self.loop.run_until_complete(self.engine.stop())
        self.loop.close()


@pytest.fixture(scope="module")
def kept(decoder: Path) -> Iterator[Kept]:
    found = Kept(lambda: make_vllm(decoder))
    yield found
    found.close()


@pytest.fixture(params=NAMES)
def make_engine(request: pytest.FixtureRequest, decoder: Path) -> Callable[[], TextEngine]:
    if request.param == "vllm":
        found: Kept = request.getfixturevalue("kept")
        return found
    return lambda: ENGINES[request.param](decoder)


def with_engine(make: Callable[[], TextEngine], body: Callable[[TextEngine], Coroutine[Any, Any, Any]]) -> Any:
    if isinstance(make, Kept):
        return make.run(body)

    async def life() -> Any:
        engine = make()
        await engine.start()
        try:
            return await body(engine)
        finally:
            await engine.stop()

    return asyncio.run(life())


async def ask(engine: TextEngine, prompt: Prompt = PROMPT, sampling: Sampling = GREEDY, **more: Any) -> list[Delta]:
    """Every delta; the last one, and no other, is terminal."""
    deltas = [delta async for delta in engine.generate(Generation("a", prompt, sampling, **more))]
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert [delta.usage is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_an_answer_has_as_many_tokens_as_it_says_and_asked_for(make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        deltas = await ask(engine)
        usage = deltas[-1].usage
        assert usage is not None
        assert (len(ids_of(deltas)), usage.completion_tokens, deltas[-1].finish_reason) == (24, 24, "length")
        assert usage.prompt_tokens == len(engine.tokenize(PROMPT))
        assert 0 <= usage.cached_tokens <= usage.prompt_tokens
        assert text_of(deltas)

    with_engine(make_engine, body)


def test_a_chat_a_text_and_its_ids_are_read_as_tokenize_says(make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        chat = Chat([{"role": "user", "content": PROMPT}])
        for prompt in (chat, PROMPT):
            ids = tuple(engine.tokenize(prompt))
            assert text_of(await ask(engine, prompt)) == text_of(await ask(engine, ids))
        assert engine.detokenize(engine.tokenize(PROMPT)).strip() == PROMPT
        assert engine.tokenize(chat) != engine.tokenize(Chat([{"role": "user", "content": "wheat"}]))
        with pytest.raises(RequestError):
            engine.detokenize([10**8])

    with_engine(make_engine, body)


def test_the_same_seed_gives_the_same_answer_alone_and_in_company(make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        how = replace(GREEDY, temperature=1.0, seed=7)
        alone = ids_of(await ask(engine, sampling=how))
        others = [ask(engine, f"{PROMPT} {'and ' * i}", replace(how, seed=i, max_tokens=5 + i)) for i in range(8)]
        *_, again = await asyncio.gather(*others, ask(engine, sampling=how))
        assert ids_of(again) == alone

    with_engine(make_engine, body)


def test_a_stop_text_ends_the_answer_before_it(make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        whole = text_of(await ask(engine))
        stop = whole[len(whole) // 2 :][:5]
        deltas = await ask(engine, sampling=replace(GREEDY, stop=("nosuchtext", stop)))
        assert text_of(deltas) == whole[: whole.index(stop)]
        assert deltas[-1].finish_reason == "stop"
        nearly = whole[-3:] + "nosuchtext"  # held back, and given at the end
        assert text_of(await ask(engine, sampling=replace(GREEDY, stop=(nearly,)))) == whole

    with_engine(make_engine, body)


def test_a_stop_token_ends_the_answer(make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        ids = ids_of(await ask(engine))
        deltas = await ask(engine, sampling=replace(GREEDY, stop_token_ids=(ids[10],)))
        assert ids_of(deltas) == ids[: ids.index(ids[10]) + 1]
        assert deltas[-1].finish_reason == "stop"

    with_engine(make_engine, body)


def test_log_probabilities_are_there_for_every_token_the_most_probable_first(make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        deltas = await ask(engine, sampling=replace(GREEDY, logprobs=3))
        found = [one for delta in deltas for one in delta.logprobs]
        assert [one.token_id for one in found] == ids_of(deltas)
        for one in found:
            assert len(one.top) == 3
            values = [value for _, _, value in one.top]
            assert values == sorted(values, reverse=True)
            assert one.top[0][0] == one.token_id, "greedy"
            assert one.logprob == pytest.approx(values[0])
            assert sum(math.exp(value) for value in values) <= 1 + 1e-5
        none = await ask(engine, sampling=replace(GREEDY, logprobs=0))
        assert [one.top for delta in none for one in delta.logprobs] == [()] * 24

    with_engine(make_engine, body)


def test_a_prompt_can_be_scored_without_an_answer(make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        ids = tuple(engine.tokenize(PROMPT))
        first, *_ = await ask(engine, ids, replace(GREEDY, max_tokens=2, logprobs=1, prompt_logprobs=True))
        assert [one.token_id for one in first.prompt_logprobs] == list(ids)
        assert first.prompt_logprobs[0].logprob is None
        assert all(one.logprob is not None and one.logprob <= 0 and one.top for one in first.prompt_logprobs[1:])
        (only,) = await ask(engine, ids, replace(GREEDY, max_tokens=0, logprobs=1, prompt_logprobs=True))
        assert (only.text, only.token_ids, only.finish_reason) == ("", (), "length")
        assert [one.logprob for one in only.prompt_logprobs] == pytest.approx([one.logprob for one in first.prompt_logprobs])

    with_engine(make_engine, body)


@pytest.mark.parametrize(
    "guide", [Guide("choice", '["wheat", "corn"]'), Guide("json_object"), Guide("json_schema", json.dumps(SCHEMA))], ids=lambda g: g.kind
)
def test_an_answer_follows_its_guide(guide: Guide, make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        # Two strings of a random model can take many tokens before they close.
        deltas = await ask(engine, sampling=Sampling(max_tokens=96, temperature=0.0), guide=guide)
        if guide.kind == "json_object" and deltas[-1].finish_reason == "length":
            return
        text = text_of(deltas)
        match guide.kind:
            case "choice":
                assert text in ("wheat", "corn")
            case "json_object":
                assert isinstance(json.loads(text), dict)
            case "json_schema":
                jsonschema.validate(json.loads(text), SCHEMA)
        assert deltas[-1].finish_reason == "stop"

    with_engine(make_engine, body)


def test_calls_follow_their_schemas_and_what_is_no_call_the_answers(make_engine: Callable[[], TextEngine]) -> None:
    """Whatever the model says: a random one is pushed to open a call in every other answer."""

    async def body(engine: TextEngine) -> None:
        guide = Guide("tool_calls", json.dumps({"tools": {"grade": SCHEMA}, "answer": SCHEMA}), "tools")
        called = 0
        for i in range(6):
            # Spaces would take the room of what has to come.
            bias = {engine.tokenize(f"{OPEN}x")[0]: 100.0 * (i % 2), engine.tokenize(" ")[0]: -100.0, engine.tokenize("\n")[0]: -100.0}
            sampling = Sampling(max_tokens=None, temperature=1.0, seed=i, logit_bias=bias, stop=(CLOSE,))  # one call is enough
            deltas = await ask(engine, "the market", sampling, guide=guide)
            text, parser = text_of(deltas), ToolCallParser(["grade"], bare=False)
            pieces = parser.feed(text) + parser.end()
            if deltas[-1].finish_reason == "length":
                continue
            called += parser.num_calls
            if not parser.num_calls:
                jsonschema.validate(json.loads(text), SCHEMA)
            for number in range(parser.num_calls):
                arguments = "".join(one.arguments for one in pieces if isinstance(one, CallDelta) and one.index == number)
                jsonschema.validate(json.loads(arguments), SCHEMA)
        assert called or isinstance(engine, EchoTextEngine)

    with_engine(make_engine, body)


def test_what_can_never_be_answered_is_refused(make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        for more in (
            {"prompt": "wheat " * 10 * engine.max_model_len},
            {"prompt": (10**8,)},
            {"adapter": "nosuch"},
            {"guide": Guide("json_schema", '{"type": "nosuch"')},
        ):
            with pytest.raises(RequestError):
                await ask(engine, **({"prompt": PROMPT} | more))
        with pytest.raises(ModelError):
            await engine.load_adapter("a", "/nosuch/folder")
        with pytest.raises(ModelError):
            await engine.unload_adapter("nosuch")
        assert ids_of(await ask(engine)), "the others are answered"

    with_engine(make_engine, body)


def test_closing_an_answer_frees_what_it_held(make_engine: Callable[[], TextEngine]) -> None:
    async def body(engine: TextEngine) -> None:
        before = dict(engine.stats())
        answers: list[AsyncGenerator[Delta]] = [
            engine.generate(Generation(str(i), f"{PROMPT} {i}", replace(GREEDY, max_tokens=64))) for i in range(5)
        ]
        for answer in answers:
            await anext(answer)
        assert engine.stats()[catalog.SERVE_RUNNING] > 0
        for answer in answers:
            await answer.aclose()
        for _ in range(500):
            if engine.stats()[catalog.SERVE_RUNNING] == 0:
                break
            await asyncio.sleep(0.01)
        after = engine.stats()
        assert after.keys() <= set(catalog.ALL)
        for metric in (catalog.SERVE_RUNNING, catalog.SERVE_WAITING):
            assert after[metric] == before[metric] == 0

    with_engine(make_engine, body)


def test_health_follows_the_engines_life(make_engine: Callable[[], TextEngine]) -> None:
    async def life() -> None:
        engine = make_engine()
        await engine.start()
        engine.check_health()
        begun = asyncio.create_task(ask(engine))
        await asyncio.sleep(0)
        await engine.stop()
        assert len(ids_of(await begun)) == 24, "what has begun is finished"
        with pytest.raises(Exception, match=r".+"):
            engine.check_health()

    asyncio.run(life())


# Over HTTP, with OpenAI's client.


@pytest.fixture(scope="module", params=NAMES)
def url(request: pytest.FixtureRequest, decoder: Path, served: Callable[..., AbstractContextManager[str]]) -> Iterator[str]:
    gateway = Gateway(ENGINES[request.param](decoder), "model", Limits(), lambda *_, **__: None)
    with served(gateway) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


MESSAGES: Any = [{"role": "system", "content": "short answers"}, {"role": "user", "content": PROMPT}]
KNOWN: Any = {"model": "model", "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_a_streamed_chat_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, max_tokens=12, **KNOWN)
    stream = client.chat.completions.create(messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}, **KNOWN)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_completion_is_the_whole_one_for_each_of_n(client: openai.OpenAI) -> None:
    asked: Any = KNOWN | {"prompt": [PROMPT, "wheat"], "n": 2, "max_tokens": 6, "logprobs": 1, "echo": True}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    tokens: list[list[str]] = [[], [], [], []]
    for chunk in client.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += (choice.logprobs.tokens or []) if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices if choice.logprobs]
    assert whole.choices[0].text.startswith(PROMPT)
    assert whole.choices[2].text.startswith("wheat")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24


def test_an_evaluation_harness_reads_the_likelihood_of_a_continuation(client: openai.OpenAI, url: str) -> None:
    """As lm-evaluation-harness' local-completions does: token ids in, the continuation's part of the log probabilities out."""
    ids = httpx.post(f"{url}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    begin = len(ids) - 3
    answer = client.completions.create(model="model", prompt=[ids, ids], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)
    for choice in answer.choices:
        assert choice.logprobs is not None
        values, top = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert values is not None
        assert top is not None
        assert len(values) == len(top) == len(ids) + 1
        assert values[0] is None
        assert math.isfinite(sum(values[begin:-1]))
        assert all(value <= max(found.values()) + 1e-6 for value, found in zip(values[begin:-1], top[begin:-1], strict=True))
    assert httpx.post(f"{url}/detokenize", json={"tokens": ids}).json()["prompt"].strip() == PROMPT


def test_as_many_choices_as_asked_for_are_counted_together(client: openai.OpenAI, url: str) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, n=3, max_tokens=5, logprobs=True, top_logprobs=2, seed=3, **KNOWN)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 15
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.content or []) == 5
        assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content or [])
