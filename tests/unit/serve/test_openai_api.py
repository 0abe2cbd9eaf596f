"""OpenAI's API as OpenAI's own client meets it, in front of an engine that repeats what it is told."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from transformers import PreTrainedTokenizerBase

from danlu.errors import RequestError
from danlu.metrics import catalog
from danlu.serve.asgi import Route, Stream
from danlu.serve.engines.echo import EchoTextEngine
from danlu.serve.gateway import Gateway
from danlu.serve.generation import Delta, Generation, TokenLogprob, Usage
from danlu.serve.openai.chat import ChatRequest, UserMessage, chat_response
from danlu.serve.openai.sampling import generations, sampling
from danlu.spec.serve import EchoText, Limits

Served = Callable[..., AbstractContextManager[str]]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


class FailingEngine(EchoTextEngine):
    """Breaks at the text `break`, and refuses at `refuse`."""

    async def generate(self, generation: Generation) -> Any:
        text = self.detokenize(generation.prompt)  # type: ignore[arg-type]
        if "refuse" in text:
            raise RequestError("not this one", param="messages", fix="another")
        async for delta in super().generate(generation):
            yield delta
            if "break" in text:
                await asyncio.sleep(0.01)
                raise RuntimeError("secret path /x/y")


def make_gateway(meter: Any, limits: Limits | None = None, engine: type[EchoTextEngine] = EchoTextEngine, **spec: Any) -> Gateway:
    return Gateway(engine(EchoText(**spec)), "echo", limits or Limits(), meter, lora_updates=True)


@pytest.fixture(scope="module")
def url(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("adapter")
    gateway = make_gateway(lambda *_, **__: None, engine=FailingEngine, adapters={"formal": str(folder)})
    with served(gateway) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with client_of(url) as found:
        yield found


def client_of(url: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_a_chat_is_answered_and_counted(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=[{"role": "system", "content": "be kind"}, *say("你好 world")])
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "你好 world", "stop")
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert abs(answer.created - time.time()) < 60
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("你好 world".encode()) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = client.chat.completions.create(model="echo", messages=[*say("a"), choice.message.model_dump(), *say("b")])  # type: ignore[list-item]
    assert again.choices[0].message.content == "b"


def test_a_stream_gives_whole_characters_one_role_and_one_end(client: OpenAI, url: str) -> None:
    chunks = list(client.chat.completions.create(model="echo", messages=say("你好"), stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "你好"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={"messages": say("a"), "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.read().count(b"[DONE]") == 1


def test_content_parts_are_read_and_pictures_refused(client: OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert client.chat.completions.create(model="echo", messages=say(parts)).choices[0].message.content == "a b"
    picture: Any = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[0\].*Try: a text: pictures are not read here"):
        client.chat.completions.create(model="echo", messages=say(picture))


def test_stop_and_max_tokens_end_an_answer_as_openai_says(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=say("one two three"), stop=[" th"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one two", "stop")
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model="echo", messages=say("one two three"), **{name: 3})  # type: ignore[call-overload]
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one", "length")
    assert client.completions.create(model="echo", prompt="a" * 50).usage.completion_tokens == 16  # type: ignore[union-attr]


def test_a_tool_is_called_streamed_or_not(client: OpenAI) -> None:
    asked: Any = {"model": "echo", "messages": say(f"Let me see. {CALL}"), "tools": [WEATHER]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    assert choice.message.content == "Let me see."
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert (final.message.tool_calls[0].function.name, final.message.tool_calls[0].function.arguments) == ("weather", '{"city": "Rome"}')
    answered = [*asked["messages"], choice.message, {"role": "tool", "tool_call_id": call.id, "content": "warm"}]
    assert client.chat.completions.create(model="echo", messages=answered, tools=[WEATHER]).choices[0].message.content == "warm"


def test_tool_choice_none_leaves_the_text_alone_and_required_forces_a_call(client: OpenAI) -> None:
    asked: Any = {"model": "echo", "messages": say(CALL), "tools": [WEATHER]}
    assert client.chat.completions.create(**asked, tool_choice="none").choices[0].message.content == CALL
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        found = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        assert found.message.tool_calls is not None
        (call,) = found.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "echo"})  # type: ignore[union-attr]


def test_a_response_format_or_a_guide_shapes_the_answer(client: OpenAI) -> None:
    def content(**more: Any) -> str:
        return client.chat.completions.create(model="echo", messages=say("a"), **more).choices[0].message.content or ""

    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    assert json.loads(content(response_format={"type": "json_object"})) == {"echo": True}
    formatted = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": True}}
    assert json.loads(content(response_format=formatted)) == {"city": "echo"}
    assert json.loads(content(extra_body={"guided_json": schema})) == {"city": "echo"}
    assert content(extra_body={"guided_choice": ["yes", "no"]}) == "yes"
    with pytest.raises(openai.BadRequestError, match="cannot both hold"):
        content(response_format=formatted, extra_body={"guided_choice": ["yes"]})


def test_a_template_takes_variables_and_no_arguments_of_its_rendering(client: OpenAI) -> None:
    def ask(**arguments: Any) -> str | None:
        return (
            client.chat.completions.create(model="echo", messages=say("a"), extra_body={"chat_template_kwargs": arguments})
            .choices[0]
            .message.content
        )

    assert ask(enable_thinking=False, documents=[]) == "a"
    for name in set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "documents", "kwargs"}:
        with pytest.raises(openai.BadRequestError, match=f"chat_template_kwargs.{name}. is not a variable"):
            ask(**{name: "{{ 1 }}"})


def test_any_64_bit_seed_is_taken_as_openai_takes_it(client: OpenAI) -> None:
    for seed in (-5, 0, 2**63 - 1, -(2**63)):
        assert len(client.chat.completions.create(model="echo", messages=say("a"), seed=seed, n=2).choices) == 2
        how = generations(
            [(1,)],
            3,
            "a",
            sampling(ChatRequest(messages=[UserMessage(role="user", content="a")], seed=seed), max_tokens=1, logprobs=None),
            None,
            None,
        )
        seeds = [one.sampling.seed for one in how]
        assert all(made is not None and 0 <= made < 2**63 for made in seeds)
        assert len(set(seeds)) == 3


def test_logprobs_are_in_openais_two_forms(client: OpenAI) -> None:
    chat = client.chat.completions.create(model="echo", messages=say("ab"), logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None
    tokens = chat.choices[0].logprobs.content or []
    assert [token.token for token in tokens] == ["a", "b", "<|end|>"]
    assert [token.bytes for token in tokens][:2] == [[97], [98]]
    assert [one.token for one in tokens[0].top_logprobs] == ["a", "b"]
    stream = client.chat.completions.create(model="echo", messages=say("ab"), logprobs=True, stream=True)
    streamed = [one.token for chunk in stream if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content or []]
    assert streamed == ["a", "b", "<|end|>"]
    older = client.completions.create(model="echo", prompt="ab", logprobs=2, echo=True, max_tokens=1).choices[0]
    assert older.text == "aba"
    assert older.logprobs is not None
    assert (older.logprobs.tokens, older.logprobs.text_offset) == (["a", "b", "a"], [0, 1, 2])
    assert older.logprobs.top_logprobs is not None
    assert older.logprobs.top_logprobs[2].keys() == {"a", "b"}


def test_a_piece_of_a_character_has_no_bytes_that_it_is_not() -> None:
    """OpenAI's clients put answers together again of tokens' bytes; null is OpenAI's word for having none."""
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], "logprobs": True})
    tokens = (TokenLogprob(1, "\N{REPLACEMENT CHARACTER}", -1.0), TokenLogprob(2, "小", -2.0, ((2, "小", -2.0),)))
    answer = Delta("小", (1, 2), tokens, finish_reason="stop")
    (choice,) = chat_response(request, {}, [answer], Usage(1, 0, 2))["choices"]
    piece, whole = choice["logprobs"]["content"]
    assert piece["bytes"] is None
    assert whole["bytes"] == whole["top_logprobs"][0]["bytes"] == [229, 176, 143]


def test_models_are_the_base_and_its_adapters(client: OpenAI, url: str, tmp_path: Path) -> None:
    assert [model.id for model in client.models.list()] == ["echo", "formal"]
    assert client.models.retrieve("formal").parent == "echo"  # type: ignore[attr-defined]
    assert client.chat.completions.create(model="formal", messages=say("hi")).choices[0].message.content == "[formal] hi"
    new = {"lora_name": "org/new:1", "lora_path": str(tmp_path)}
    assert "added successfully" in httpx.post(f"{url}/v1/load_lora_adapter", json=new).text
    assert client.completions.create(model="org/new:1", prompt="x").model == "org/new:1"
    assert client.models.retrieve("org/new:1").id == "org/new:1"
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=new).status_code == 400
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=new | {"load_inplace": True}).status_code == 200
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=new | {"lora_path": "/nosuch", "load_inplace": True}).status_code == 400
    assert client.models.retrieve("org/new:1").id == "org/new:1", "a folder that is none takes nothing away"
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=new | {"lora_name": "b", "lora_path": "/nosuch"}).status_code == 400
    assert "removed successfully" in httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "org/new:1"}).text
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "org/new:1"}).status_code == 404
    with pytest.raises(openai.NotFoundError, match="org/new:1"):
        client.completions.create(model="org/new:1", prompt="x")


def test_adapters_cannot_be_loaded_unless_the_service_says_so(meter: Any, served: Served) -> None:
    gateway = Gateway(EchoTextEngine(EchoText()), "echo", Limits(), meter)
    with served(gateway) as url:
        assert httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/"}).status_code == 404
        assert "/v1/load_lora_adapter" not in httpx.get(f"{url}/openapi.json").text


def test_a_mistake_is_openais_error_class_with_the_field_and_what_would_work(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=say("a"))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model="echo", messages=say("a"), temperature=3)
    assert hot.value.param == "temperature"
    assert "less than or equal to 2" in str(hot.value)
    with pytest.raises(openai.BadRequestError, match="did you mean `temperature`") as typo:
        client.chat.completions.create(model="echo", messages=say("a"), extra_body={"temprature": 1})
    assert typo.value.code == "unknown_parameter"
    with pytest.raises(openai.BadRequestError, match="4096 positions") as long:
        client.chat.completions.create(model="echo", messages=say("a"), max_tokens=5000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.BadRequestError, match="max_completion_tokens: 4") as long:
        client.chat.completions.create(model="echo", messages=say("a"), max_completion_tokens=5000)
    assert long.value.param == "max_completion_tokens"
    with pytest.raises(openai.BadRequestError, match="Try: max_tokens"):
        client.completions.create(model="echo", prompt="a", extra_body={"max_completion_tokens": 3})
    with pytest.raises(openai.BadRequestError, match="`store` is true; it should be false"):
        client.chat.completions.create(model="echo", messages=say("a"), store=True)
    with pytest.raises(openai.BadRequestError, match="`max_tokens` is 2 and `max_completion_tokens`, its newer name, 3"):
        client.chat.completions.create(model="echo", messages=say("a"), max_tokens=2, max_completion_tokens=3)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="echo", messages=say("a"), extra_body={"functions": []})


def test_an_engines_refusal_before_the_first_token_is_a_status_also_of_a_stream(client: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="not this one"):
            client.chat.completions.create(model="echo", messages=say("refuse"), stream=stream)


def test_an_engine_that_breaks_ends_a_stream_with_an_error_and_one_done(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.InternalServerError, match="RuntimeError"):
        client.chat.completions.create(model="echo", messages=say("break"))
    stream = client.chat.completions.create(model="echo", messages=say("break"), stream=True)
    with pytest.raises(openai.APIError, match="the engine failed") as broken:
        list(stream)
    assert "secret" not in str(broken.value)
    raw = httpx.post(f"{url}/v1/chat/completions", json={"messages": say("break"), "stream": True}).text
    events = [line.removeprefix("data: ") for line in raw.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert events.count("[DONE]") == 1
    assert json.loads(events[-2])["error"]["type"] == "server_error"


@pytest.mark.parametrize("error", [ConnectionResetError("secret"), TimeoutError("secret")])
def test_an_engines_own_connection_that_breaks_is_an_error_event_and_no_client_that_left(
    error: Exception, meter: Any, served: Served
) -> None:
    class Breaking(EchoTextEngine):
        async def generate(self, generation: Generation) -> Any:
            yield Delta("x", (120,))
            await asyncio.sleep(0.01)
            raise error

    with served(make_gateway(meter, engine=Breaking)) as url, client_of(url) as client:
        with pytest.raises(openai.APIError, match=f"the engine failed: {type(error).__name__}"):
            list(client.chat.completions.create(model="echo", messages=say("a"), stream=True))
        with pytest.raises(openai.InternalServerError, match=f"the engine failed: {type(error).__name__}"):
            client.chat.completions.create(model="echo", messages=say("a"))
    assert not meter.by_label[catalog.SERVE_REFUSALS.name, "client_gone"]
    assert meter.by_label[catalog.SERVE_SEQUENCES.name, "error"] == 2


def test_a_stream_whose_events_break_ends_with_an_error_event_too(meter: Any, served: Served) -> None:
    async def events() -> Any:
        yield b"data: 1\n\n"
        raise OSError("secret")

    async def answer(call: Any) -> Stream:
        return Stream(events())

    gateway = make_gateway(meter)
    gateway.routes = {**gateway.routes, "/v1/chat/completions": Route("POST", answer)}
    with served(gateway) as url:
        *first, error, done = httpx.post(f"{url}/v1/chat/completions", json={"messages": say("a")}).text.split("\n\n")[:-1]
    assert (first, done) == (["data: 1"], "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the engine failed: OSError"


def test_who_comes_when_all_is_taken_hears_when_to_come_back(meter: Any, served: Served) -> None:
    gateway = make_gateway(meter, Limits(max_ongoing_requests=1, max_queued_requests=1), time_per_output_token_ms=20)
    with served(gateway) as url, client_of(url) as client:
        stream = client.chat.completions.create(model="echo", messages=say("a" * 100), n=2, stream=True)
        next(iter(stream))
        with pytest.raises(openai.InternalServerError) as busy:
            client.chat.completions.create(model="echo", messages=say("b"))
        assert busy.value.status_code == 503
        assert int(busy.value.response.headers["retry-after"]) >= 1
        stream.close()
        wait_for(lambda: gateway.in_flight == 0)
        assert client.chat.completions.create(model="echo", messages=say("b")).choices[0].message.content == "b"


def test_a_client_that_goes_away_stops_its_answer(meter: Any, served: Served) -> None:
    gateway = make_gateway(meter, time_per_output_token_ms=5)
    with served(gateway) as url, client_of(url) as client:
        stream = client.chat.completions.create(
            model="echo", messages=say("a"), max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in zip(range(3), stream, strict=False):
            pass
        stream.close()
        wait_for(lambda: gateway.in_flight == 0, seconds=5)
        with httpx.Client(timeout=0.2) as impatient, pytest.raises(httpx.TimeoutException):
            impatient.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3000, "ignore_eos": True})
        wait_for(lambda: gateway.in_flight == 0, seconds=5)
    assert meter.by_label[catalog.SERVE_REFUSALS.name, "client_gone"] == 2
    assert meter.by_label[catalog.SERVE_SEQUENCES.name, "cancelled"] == 2
    assert meter.sums[catalog.SERVE_COMPLETION_TOKENS.name] < 600


def test_an_engine_that_falls_silent_is_a_504_or_an_error_event(meter: Any, served: Served) -> None:
    class Silent(EchoTextEngine):
        async def generate(self, generation: Generation) -> Any:
            if b"x" in bytes(token for token in generation.prompt if token < 256):  # type: ignore[union-attr,operator]
                yield Delta("x", (120,))
            await asyncio.sleep(60)
            yield Delta()

    with served(make_gateway(meter, Limits(request_timeout_s=0.1), Silent)) as url, client_of(url) as client:
        with pytest.raises(openai.InternalServerError, match=r"no token within 0.1 s") as late:
            client.chat.completions.create(model="echo", messages=say("a"), stream=True)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"no token within 0.1 s"):
            list(client.chat.completions.create(model="echo", messages=say("x"), stream=True))


@pytest.mark.parametrize(("text", "drain_timeout_s", "is_cut"), [("a" * 40, 5.0, False), ("a" * 3000, 0.3, True)])
def test_a_drain_lets_streams_end_and_cuts_those_that_take_too_long(
    text: str, drain_timeout_s: float, is_cut: bool, meter: Any, served: Served
) -> None:
    lines: list[str] = []

    def read(url: str) -> None:
        body = {"messages": say(text), "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as response:
            for line in response.iter_lines():
                if line:
                    lines.append(line)

    with served(make_gateway(meter, Limits(drain_timeout_s=drain_timeout_s), time_per_output_token_ms=5)) as url:
        reader = threading.Thread(target=read, args=(url,))
        reader.start()
        wait_for(lambda: len(lines) > 3)
    reader.join(10)
    assert lines[-1] == "data: [DONE]"
    assert ("is stopping" in lines[-2]) == is_cut


def test_tokens_and_times_are_metered_once(meter: Any, served: Served) -> None:
    with served(make_gateway(meter, time_to_first_token_ms=30, time_per_output_token_ms=10)) as url, client_of(url) as client:
        answer = client.chat.completions.create(model="echo", messages=say("abcd"), n=2)
        assert answer.usage is not None
        list(client.chat.completions.create(model="echo", messages=say("abcd"), stream=True))
    assert meter.sums[catalog.SERVE_PROMPT_TOKENS.name] == 2 * answer.usage.prompt_tokens
    assert meter.sums[catalog.SERVE_COMPLETION_TOKENS.name] == 3 * 5
    assert meter.observed[catalog.SERVE_FIRST_TOKEN_SECONDS.name] == 3
    assert 0.09 <= meter.sums[catalog.SERVE_FIRST_TOKEN_SECONDS.name] < 0.5
    assert meter.observed[catalog.SERVE_INTER_TOKEN_SECONDS.name] == 3 * 4
    assert 0.11 <= meter.sums[catalog.SERVE_INTER_TOKEN_SECONDS.name] < 0.5
    assert meter.by_label[catalog.SERVE_SEQUENCES.name, "stop"] == 3
    assert meter.by_label[catalog.SERVE_REQUESTS.name, "200"] == 2


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
