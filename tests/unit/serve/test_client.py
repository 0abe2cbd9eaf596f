"""`danlu chat`, `danlu bench serve` and `danlu keys` against a service that runs."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from danlu.cli import app
from danlu.client.load import Load, bodies, measure
from danlu.errors import RequestError, ResourceError, SpecError, StorageError
from danlu.metrics import catalog
from danlu.serve.engines.echo import EchoTextEngine
from danlu.serve.gateway import Gateway
from danlu.serve.generation import Chat
from danlu.serve.keys import Authenticated, KeyRing
from danlu.spec.serve import EchoText, Limits
from danlu.terminal import console

Served = Callable[..., AbstractContextManager[str]]


def invoke(*arguments: str, stdin: str = "", **environment: str) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin, env={"COLUMNS": "200", **environment})


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    gateway = Gateway(EchoTextEngine(EchoText()), "parrot", Limits(), lambda *_, **__: None)
    with served(gateway) as found:
        yield found


class Listening(EchoTextEngine):
    """Keeps the conversations it is given."""

    def __init__(self) -> None:
        super().__init__(EchoText())
        self.heard: list[list[tuple[str, str]]] = []

    def tokenize(self, prompt: Any) -> list[int]:
        if isinstance(prompt, Chat):
            self.heard.append([(message["role"], message["content"]) for message in prompt.messages])
        return super().tokenize(prompt)


def test_a_chat_remembers_what_was_said_until_it_is_cleared(served: Served) -> None:
    engine = Listening()
    with served(Gateway(engine, "parrot", Limits(), lambda *_, **__: None)) as url:
        lines = ["hello", "你好 [bold]", "/nosuch", "", "/system be kind", "again", "/clear", "new", "/exit", "never"]
        result = invoke("chat", url, stdin="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if not line.startswith("there is no /nosuch")] == [
        "hello",
        "你好 [bold]",
        "again",
        "new",
    ]
    said = [("user", "hello"), ("assistant", "hello")]
    assert engine.heard == [
        said[:1],
        [*said, ("user", "你好 [bold]")],
        [("system", "be kind"), *said, ("user", "你好 [bold]"), ("assistant", "你好 [bold]"), ("user", "again")],
        [("system", "be kind"), ("user", "new")],
    ]


def test_a_chat_with_nobody_says_where_it_looked() -> None:
    result = invoke("chat", "http://127.0.0.1:9/v1", stdin="hello\n")
    assert isinstance(result.exception, ResourceError)
    assert "nobody answers at http://127.0.0.1:9" in str(result.exception)


@pytest.mark.parametrize("command", [["chat"], ["bench", "serve"]])
def test_what_is_no_url_is_said_to_be_none(command: list[str]) -> None:
    for text in ("localhost:8000", "http://", "ftp://127.0.0.1:8000/x"):
        result = invoke(*command, *(["--url"] if command == ["chat"] else []), text, stdin="hello\n")
        assert isinstance(result.exception, SpecError), (text, result.exception)
        assert f"{text!r} is no URL of a service" in str(result.exception)


def test_a_service_that_goes_away_in_an_answer_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for text in (b'{"data": [{"id": "a"}]}', b"data: half"):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
                    connection.sendall(head % (len(text) + (0 if text.startswith(b"{") else 100)) + text)

        thread = threading.Thread(target=answer)
        thread.start()
        result = invoke("chat", f"http://127.0.0.1:{server.getsockname()[1]}", stdin="hello\n")
        thread.join()
    assert isinstance(result.exception, ResourceError), result.exception
    assert "broke" in str(result.exception)


def test_a_model_does_not_command_the_terminal(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "red \x1b[31m, a title \x1b]0;x\x07, \x9b1m and \x7f"
    assert line.replace("\x07", "") in invoke("chat", url, stdin=line).stdout, "a file has it as it is (rich leaves bells out)"
    monkeypatch.setattr(console, "_force_terminal", True)
    shown = invoke("chat", url, stdin=line).stdout
    assert "red ␛[31m, a title ␛]0;x␇, \ufffd1m and \ufffd" in shown
    assert not set("\x1b\x07\x9b\x7f") & set(shown)


def test_bytes_that_are_no_text_are_said_and_the_next_question_is_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["half a \udcff", "hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    result = invoke("chat", url)
    assert result.exit_code == 0, result.exception
    assert result.stdout == "error: these bytes are no text in this terminal's encoding\nhello\n"
    assert isinstance(invoke("chat", url, "--system", "\udcff", stdin="hello\n").exception, SpecError)


@pytest.mark.parametrize("command", [["chat"], ["bench", "serve"]])
def test_a_key_that_cannot_be_sent_is_said_without_its_text(command: list[str], url: str) -> None:
    for key in ("dk-密钥", "dk-a\nb"):
        result = invoke(*command, url, stdin="hello\n", DANLU_API_KEY=key)
        assert isinstance(result.exception, SpecError), result.exception
        assert result.exception.where == "DANLU_API_KEY"
        assert key not in str(result.exception)
    assert "hello\n" in invoke("chat", url, stdin="hello\n", DANLU_API_KEY="dk-a\n").stdout


def test_an_unknown_model_is_said_with_those_that_there_are(url: str) -> None:
    result = invoke("chat", "gpt", "--url", url, stdin="hello\n")
    assert isinstance(result.exception, RequestError)
    assert "'parrot'" in str(result.exception)


def test_keys_are_made_listed_revoked_and_taken_from_the_environment(tmp_path: Path, served: Served) -> None:
    file = str(tmp_path / "keys.json")
    result = invoke("keys", "create", "ada", "--file", file, "--expires", "30d", "--model", "parrot", "--max-ongoing", "3")
    assert result.exit_code == 0, result.output
    secret = result.stdout.strip()
    assert secret.startswith("dk-")
    assert "cannot be shown again" in result.stderr
    listed = invoke("keys", "list", "--file", file).stdout
    assert "ada" in listed
    assert secret[:10] in listed
    assert secret[10:] not in listed
    gateway = Gateway(EchoTextEngine(EchoText()), "parrot", Limits(), lambda *_, **__: None)
    with served(gateway, Authenticated(gateway, KeyRing(Path(file)), gateway.count)) as url:
        assert "hello\n" in invoke("chat", url, stdin="hello\n", DANLU_API_KEY=secret).stdout
        without = invoke("chat", url, stdin="hello\n", DANLU_API_KEY="", OPENAI_API_KEY="")
        assert "a key in DANLU_API_KEY or OPENAI_API_KEY" in str(without.exception)
    assert invoke("keys", "revoke", "ada", "--file", file).stdout == "revoked ada\n"
    assert "revoked" in invoke("keys", "list", "--file", file).stdout
    assert isinstance(invoke("keys", "create", "bob", "--file", file, "--expires", "soon").exception, SpecError)


def test_a_load_is_what_was_asked_for_and_its_times_are_the_engines(meter: Any, served: Served) -> None:
    gateway = Gateway(EchoTextEngine(EchoText(time_to_first_token_ms=50, time_per_output_token_ms=10)), "parrot", Limits(), meter)
    with served(gateway) as url:
        report, seen = measure(Load(url, "parrot", num_requests=24, concurrency=12, warm_up=4, max_tokens=10))
    assert (report.num_answered, report.refused, len(seen)) == (24, {}, 24)
    assert report.completion_tokens == 240
    assert meter.sums[catalog.SERVE_COMPLETION_TOKENS.name] == 280
    # 50 ms to the first token and 10 ms to each of nine more; what is above is this machine's.
    for found, least in ((report.time_to_first_token_ms, 50), (report.inter_token_ms, 9), (report.e2e_ms, 140)):
        assert least <= found["p50"] <= found["p90"] <= found["p99"] <= found["max"]
        assert found["p50"] < least + 500
    # Two rounds of twelve clients.
    assert 0.28 <= report.seconds < 3.0, "one after the other they would take 3.4 s"


def test_random_arrivals_do_not_wait_for_answers(meter: Any, served: Served) -> None:
    gateway = Gateway(EchoTextEngine(EchoText(time_to_first_token_ms=300)), "parrot", Limits(), meter)
    with served(gateway) as url:
        report, _ = measure(Load(url, "parrot", num_requests=40, concurrency=1, rate=100.0, warm_up=0, max_tokens=1, seed=3))
    draw = random.Random(3)
    arrivals = sum(draw.expovariate(100.0) for _ in range(40))
    assert arrivals + 0.3 <= report.seconds < arrivals + 6, "one after the other they would take 12 s"


def test_what_is_refused_is_counted_by_its_reason(served: Served) -> None:
    limits = Limits(max_ongoing_requests=1, max_queued_requests=1)
    gateway = Gateway(EchoTextEngine(EchoText(time_to_first_token_ms=100)), "parrot", limits, lambda *_, **__: None)
    with served(gateway) as url:
        report, _ = measure(Load(url, "parrot", num_requests=8, concurrency=8, warm_up=0, max_tokens=1))
        with pytest.raises(ResourceError, match="there is no model 'gpt'"):
            measure(Load(url, "gpt", num_requests=2, warm_up=0))
    assert report.num_answered == 2
    assert sum(report.refused.values()) == 6
    assert all(why.startswith("503 ") for why in report.refused)


def test_a_reason_with_other_numbers_is_the_same_reason(served: Served) -> None:
    gateway = Gateway(EchoTextEngine(EchoText(max_model_len=1000)), "parrot", Limits(), lambda *_, **__: None)
    with served(gateway) as url:
        report, seen = measure(Load(url, "parrot", num_requests=30, concurrency=4, warm_up=0, max_tokens=1))
    (reason,) = report.refused
    assert reason.startswith("400 the prompt has ")
    assert report.refused[reason] + len(seen) == 30


def test_two_loads_ask_the_same_and_no_two_requests_do() -> None:
    asked = bodies(Load("u", "m"), 50)
    assert asked == bodies(Load("u", "m"), 50)
    assert len({body["messages"][0]["content"] for body in asked}) == 50


def test_bench_writes_its_report_as_json_and_as_a_page(url: str, tmp_path: Path) -> None:
    result = invoke("bench", "serve", f"{url}/v1", "--output", "/proc/nosuch/load.json")
    assert isinstance(result.exception, StorageError)  # before anything is measured
    sets = ["--requests", "5", "--concurrency", "2", "--max-tokens", "4", "--output", str(tmp_path / "out" / "load.json")]
    result = invoke("bench", "serve", f"{url}/v1", *sets, OPENAI_API_KEY="dk-secret")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "5 answered" in result.output
    document = json.loads((tmp_path / "out" / "load.json").read_text())
    assert document["completion_tokens"] == 20
    page = (tmp_path / "out" / "load.html").read_text()
    assert "time to first token" in page
    assert "https://" not in page
    assert "dk-secret" not in page + json.dumps(document)
    assert httpx.get(f"{url}/healthz").status_code == 200
