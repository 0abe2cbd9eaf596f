"""A language model on a real Ray Serve: streams arrive as they are made, keys are asked for, a client that leaves is noticed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from danlu.errors import StorageError
from danlu.metrics import catalog
from danlu.serve import app
from danlu.serve.keys import create_key
from danlu.spec.serve import Service

pytestmark = pytest.mark.usefixtures("ray_local")


def service(keys_file: Path) -> Service:
    return Service.model_validate(
        {
            "name": "echo-text",
            "engine": {"kind": "echo_text", "time_to_first_token_ms": 20, "time_per_output_token_ms": 20},
            "auth": {"keys_file": str(keys_file)},
            "http": {"port": 0},
        }
    )


@pytest.fixture(scope="module")
def client(ray_local: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    keys_file = tmp_path_factory.mktemp("keys") / "keys.json"
    with pytest.raises(StorageError, match="danlu keys create"):
        app.run(service(keys_file))
    secret = create_key(keys_file, "ada")
    app.stop()
    endpoint = app.run(service(keys_file))
    assert endpoint.where_to_look()["endpoint"] == f"{endpoint.url}/v1/chat/completions"
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=secret, max_retries=0, timeout=60) as found:
        yield found
    app.stop()


def say(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_a_stream_arrives_token_by_token_ends_with_its_client_and_is_metered(
    client: openai.OpenAI, metrics_port: Any, wait_for: Callable[..., Any]
) -> None:
    left = client.chat.completions.create(model="echo-text", messages=say("a" * 1000), stream=True)
    next(iter(left))
    left.close()
    times, text = [], ""
    for chunk in client.chat.completions.create(model="echo-text", messages=say("token by token"), stream=True):
        times.append(time.perf_counter())
        text += chunk.choices[0].delta.content or ""
    assert text == "token by token"
    # 14 tokens at 20 ms: had they come together at the end, there would be no time between them.
    assert times[-1] - times[0] > 0.14
    again = client.chat.completions.create(model="echo-text", messages=say("token by token")).usage
    assert again is not None
    assert again.prompt_tokens_details is not None
    cached = again.prompt_tokens_details.cached_tokens or 0
    assert cached > 0
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=say("a"))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()

    def total(metric: catalog.Metric, **labels: str) -> float:
        return float(metrics_port.total(metric.exported, model="echo-text", **labels))

    wait_for("two answers and one that was left", lambda: total(catalog.SERVE_SEQUENCES) == 3)
    assert total(catalog.SERVE_SEQUENCES, finish_reason="cancelled") == 1
    wait_for("their tokens", lambda: 31 <= total(catalog.SERVE_COMPLETION_TOKENS) < 200)
    wait_for("those of the cache", lambda: cached <= total(catalog.SERVE_CACHED_TOKENS) <= cached + 2)
    wait_for("the refusal", lambda: total(catalog.SERVE_REFUSALS, reason="401") == 1)


def test_a_header_leads_to_the_replicas_line(
    client: openai.OpenAI, wait_for: Callable[..., Any], log_of_ray: Callable[..., list[dict[str, Any]]]
) -> None:
    answer = client.chat.completions.with_raw_response.create(model="echo-text", messages=say("xyzzy"))
    request_id = answer.headers["x-request-id"]
    (line,) = wait_for("the line", lambda: log_of_ray(request_id=request_id))
    assert (line["service"], line["key"], line["status"], line["answer_id"]) == ("echo-text", "ada", "200", answer.parse().id)
    assert line["replica"]
    assert line["completion_tokens"] == 6
    assert not [line for line in log_of_ray() if "xyzzy" in str(line)]
