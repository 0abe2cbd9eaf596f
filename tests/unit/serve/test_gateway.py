"""The gateway: every bad request gets its own clear refusal, every good one its answer, and all are counted."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from danlu.metrics import catalog
from danlu.serve.engines.echo import EchoEngine
from danlu.serve.gateway import Gateway
from danlu.spec.serve import Echo, Limits


class Meter:
    def __init__(self) -> None:
        self.counts: Counter[tuple[str, tuple[str, ...]]] = Counter()

    def __call__(self, metric: catalog.Metric, value: float, /, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        self.counts[metric.name, tuple(labels[name] for name in metric.labels)] += value


def gateway(limits: Limits | None = None, latency_ms: float = 0.0) -> tuple[Gateway, Meter]:
    meter = Meter()
    return Gateway(EchoEngine(Echo(labels=["even", "odd"], latency_ms=latency_ms)), "parity", limits or Limits(), meter), meter


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


async def ask(app: Gateway, method: str = "POST", path: str = "/v1/classify", **request: Any) -> httpx.Response:
    if not app.ready:
        await app.start()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request(method, path, **request)


def test_a_text_a_list_and_a_pair_are_answered_in_order() -> None:
    app, meter = gateway()
    body = run(ask(app, json={"model": "parity", "input": ["ab", "a", {"text": "a", "text_pair": "b"}]})).json()
    assert [answer["label"] for answer in body["data"]] == ["even", "odd", "even"]
    assert [answer["index"] for answer in body["data"]] == [0, 1, 2]
    assert (body["object"], body["model"], body["usage"]["prompt_tokens"], body["labels"]) == ("list", "parity", 3, ["even", "odd"])
    assert run(ask(app, json={"input": "ab"})).json()["data"][0]["probs"] == [1.0, 0.0]
    assert meter.counts["danlu_serve_inputs", ("parity",)] == 4
    assert meter.counts["danlu_serve_requests", ("parity", "/v1/classify", "200")] == 2


BAD = {
    "no input": ({"json": {}}, 400, "input", "there is no `input`"),
    "an empty list": ({"json": {"input": []}}, 400, "input", "empty list"),
    "an empty text": ({"json": {"input": ["a", "  "]}}, 400, "input[1]", "is empty"),
    "a number": ({"json": {"input": [3]}}, 400, "input[0]", "int, not a text"),
    "a pair without text": ({"json": {"input": [{"text_pair": "a"}]}}, 400, "input[0]", "has no `text`"),
    "a pair with another field": ({"json": {"input": {"text": "a", "txt": "b"}}}, 400, "input", "unknown field 'txt'"),
    "a list as the body": ({"json": ["a"]}, 400, None, "an object is needed, not list"),
    "half a document": ({"content": b'{"input": "a', "headers": {"content-type": "application/json"}}, 400, None, "not JSON"),
    "bytes that are no text": ({"content": b'{"input": "\xff"}', "headers": {"content-type": "application/json"}}, 400, None, "not UTF-8"),
    "a form": ({"data": {"input": "a"}}, 415, "content-type", "x-www-form-urlencoded"),
    "no content type": ({"content": b"{}"}, 415, "content-type", "not given"),
    "10,000 texts": ({"json": {"input": ["a"] * 10_000}}, 413, "input", "10000 texts in one request; the limit is 256"),
    "a megabyte of text": ({"json": {"input": "a" * 1_000_001}}, 413, None, "larger than 1,000,000 bytes"),
    "another model": ({"json": {"model": "gpt", "input": "a"}}, 404, "model", "'parity'"),
    "a model that is no name": ({"json": {"model": 3, "input": "a"}}, 400, "model", "text, not int"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_in_openais_shape(name: str) -> None:
    request, status, param, told = BAD[name]
    app, meter = gateway()
    response = run(ask(app, **request))
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert told in error["message"]
    assert "Try: " in error["message"]
    assert sum(value for (metric, _), value in meter.counts.items() if metric == "danlu_serve_refusals") == 1


def test_a_body_without_a_length_is_cut_off_at_the_limit() -> None:
    read = 0

    async def chunks() -> Any:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b"a" * 100_000

    app, _ = gateway()
    response = run(ask(app, content=chunks(), headers={"content-type": "application/json"}))
    assert response.status_code == 413


def test_unknown_paths_and_wrong_methods_say_what_there_is() -> None:
    app, _ = gateway()
    missing = run(ask(app, "GET", "/v1/nothing"))
    assert missing.status_code == 404
    assert "/v1/classify" in missing.json()["error"]["message"]
    wrong = run(ask(app, "GET", "/v1/classify"))
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_too_many_requests_get_503_and_retry_after_and_the_others_their_answers() -> None:
    app, meter = gateway(Limits(max_ongoing_requests=2, max_queued_requests=1), latency_ms=50)

    async def crowd() -> list[httpx.Response]:
        await app.start()
        return await asyncio.gather(*(ask(app, json={"input": "ab"}) for _ in range(8)))

    responses = run(crowd())
    statuses = Counter(response.status_code for response in responses)
    assert statuses == {200: 3, 503: 5}
    refused = next(response for response in responses if response.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert meter.counts["danlu_serve_refusals", ("parity", "503")] == 5
    assert app.in_flight == 0


def test_an_answer_that_takes_too_long_is_a_504() -> None:
    app, _ = gateway(Limits(request_timeout_s=0.02), latency_ms=2000)
    response = run(ask(app, json={"input": "a"}))
    assert response.status_code == 504
    assert "0.02 s" in response.json()["error"]["message"]
    assert app.in_flight == 0


def test_an_engine_that_breaks_is_a_500_without_its_insides() -> None:
    app, _ = gateway()

    async def broken(inputs: object) -> Any:
        raise RuntimeError("secret path /x/y")

    app.engine.predict = broken  # type: ignore[method-assign,assignment]
    response = run(ask(app, json={"input": "a"}))
    assert response.status_code == 500
    assert "secret" not in response.text


def test_ready_only_between_start_and_drain() -> None:
    app, _ = gateway()

    async def life() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            found = [(await client.get("/readyz")).status_code]
            await app.start()
            found.append((await client.get("/readyz")).status_code)
            found.append((await client.get("/healthz")).status_code)
            await app.drain()
            found.append((await client.get("/readyz")).status_code)
            found.append((await client.get("/healthz")).status_code)
        return found

    assert run(life()) == [503, 200, 200, 503, 503]


def test_a_drain_waits_for_what_has_begun() -> None:
    app, _ = gateway(latency_ms=100)

    async def life() -> httpx.Response:
        await app.start()
        begun = asyncio.create_task(ask(app, json={"input": "ab"}))
        while not app.in_flight:
            await asyncio.sleep(0)
        await app.drain()
        return await begun

    assert run(life()).status_code == 200


def test_models_openapi_and_docs() -> None:
    app, _ = gateway()
    models = run(ask(app, "GET", "/v1/models")).json()
    assert (models["object"], models["data"][0]["id"], models["data"][0]["object"]) == ("list", "parity", "model")
    document = run(ask(app, "GET", "/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {"/v1/classify", "/v1/models", "/v1/models/{model}", "/healthz", "/readyz"}
    assert run(ask(app, "GET", "/v1/models/parity")).json() == models["data"][0]
    missing = run(ask(app, "GET", "/v1/models/gpt"))
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    page = run(ask(app, "GET", "/docs"))
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text.replace("http://test", "")
    assert "https://" not in page.text


def test_the_request_id_comes_back() -> None:
    app, _ = gateway()
    assert run(ask(app, json={"input": "a"}, headers={"x-request-id": "mine"})).headers["x-request-id"] == "mine"
    assert len(run(ask(app, json={"input": "a"})).headers["x-request-id"]) == 32


def test_a_websocket_is_refused_and_not_an_error_of_the_server(served: Callable[..., AbstractContextManager[str]]) -> None:
    handshake = {
        "upgrade": "websocket",
        "connection": "upgrade",
        "sec-websocket-version": "13",
        "sec-websocket-key": "MDEyMzQ1Njc4OWFiY2RlZg==",
    }
    with served(gateway()[0]) as url:
        assert httpx.get(f"{url}/v1/classify", headers=handshake).status_code == 403


def test_text_outside_ascii_is_answered_as_it_came() -> None:
    app, _ = gateway()
    raw = json.dumps({"input": "小麦出口"}, ensure_ascii=False).encode()
    assert run(ask(app, content=raw, headers={"content-type": "application/json; charset=utf-8"})).status_code == 200
