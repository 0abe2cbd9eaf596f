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


def test_a_stream_arrives_token_by_token_and_is_metered(client: openai.OpenAI, metrics_port: Any, wait_for: Callable[..., Any]) -> None:
    times, text = [], ""
    for chunk in client.chat.completions.create(model="echo-text", messages=say("token by token"), stream=True):
        times.append(time.perf_counter())
        text += chunk.choices[0].delta.content or ""
    assert text == "token by token"
    # 14 tokens at 20 ms: had they come together at the end, there would be no time between them.
    assert times[-1] - times[0] > 0.14
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=say("a"))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
    name = catalog.SERVE_COMPLETION_TOKENS.exported
    wait_for("15 tokens", lambda: metrics_port.total(name, model="echo-text") == 15)
    wait_for("the refusal", lambda: metrics_port.total(catalog.SERVE_REFUSALS.exported, model="echo-text", reason="401") == 1)


def test_a_client_that_leaves_a_stream_stops_it(client: openai.OpenAI, metrics_port: Any, wait_for: Callable[..., Any]) -> None:
    stream = client.chat.completions.create(model="echo-text", messages=say("a" * 1000), stream=True)
    for _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    gone = {"model": "echo-text", "finish_reason": "cancelled"}
    wait_for("the end of it", lambda: metrics_port.total(catalog.SERVE_SEQUENCES.exported, **gone) == 1, seconds=15)
