"""Keys: who has none is kept out as soon as there is one, and nobody can read a key where it is kept."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from danlu.cli import app
from danlu.errors import SpecError, StorageError
from danlu.metrics import catalog
from danlu.serve import keys
from danlu.serve.engines.echo import EchoTextEngine
from danlu.serve.gateway import Gateway
from danlu.serve.keys import Authenticated, KeyRing, create_key, read_keys, revoke_key, set_budget
from danlu.spec.serve import EchoText, Limits

Served = Callable[..., AbstractContextManager[str]]
SAY: Any = [{"role": "user", "content": "a"}]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(keys, "LOOK_EVERY_S", 0.0)
    return tmp_path / "keys.json"


def chat(url: str, key: str, model: str = "echo") -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30) as client:
        return client.chat.completions.create(model=model, messages=SAY).choices[0].message.content or ""


def test_a_file_of_keys_has_hashes_and_is_its_owners(path: Path) -> None:
    secret = create_key(path, "ada", lifetime=timedelta(days=30), models=["echo", "team-*"])
    assert secret.startswith("dk-")
    assert len(secret) > 40
    text = path.read_text()
    assert secret not in text
    assert secret[12:] not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (key,) = read_keys(path).keys
    assert (key.name, key.prefix, key.models) == ("ada", secret[:10], ("echo", "team-*"))
    assert key.expires is not None
    assert (key.expires - key.created).days == 30
    assert key.may_ask("team-a")
    assert not key.may_ask("other")
    assert [one.name for one in path.parent.iterdir()] == [path.name], "no partial file is left"


def test_a_name_is_valid_once_and_free_again_when_revoked(path: Path) -> None:
    first = create_key(path, "ada")
    with pytest.raises(SpecError, match="there is a valid key named 'ada'"):
        create_key(path, "ada")
    revoke_key(path, first[:10])
    second = create_key(path, "ada")
    assert [key.state(datetime.now(UTC)) for key in read_keys(path).keys] == ["revoked", "valid"]
    ring = KeyRing(path)
    assert ring.find(first) is None
    assert ring.find(second) is not None
    with pytest.raises(SpecError, match="no key named 'bob'"):
        revoke_key(path, "bob")
    with pytest.raises(SpecError, match="name"):
        create_key(path, "a b")


def test_an_expired_key_is_nobodys(path: Path) -> None:
    secret = create_key(path, "old", lifetime=timedelta(hours=1), now=datetime.now(UTC) - timedelta(hours=2))
    assert KeyRing(path).find(secret) is None


def test_a_file_that_is_no_file_of_keys_is_said_without_showing_it(path: Path) -> None:
    for content in ("dk-secretsecret", '{"keys": [{"name": "dk-secretsecret"}]}', "[]"):
        path.write_text(content)
        with pytest.raises(StorageError) as raised:
            read_keys(path)
        assert "secretsecret" not in str(raised.value)
    with pytest.raises(StorageError, match="danlu keys create"):
        read_keys(path.with_name("nosuch"))


def test_the_door_closes_with_the_first_key_and_opens_to_its_holder(
    path: Path, meter: Any, served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text('{"keys": []}')
    (tmp_path / "formal").mkdir()
    gateway = Gateway(EchoTextEngine(EchoText(adapters={"formal": str(tmp_path / "formal")})), "echo", Limits(), meter)
    caplog.set_level(logging.DEBUG, "danlu.serve")
    with served(gateway, Authenticated(gateway, KeyRing(path), gateway.count)) as url:
        assert chat(url, "anything") == "a"
        ada, bob = create_key(path, "ada"), create_key(path, "bob", models=["formal"])
        for wrong in ("anything", ada[:-1], ada + "x", "dk-"):
            with pytest.raises(openai.AuthenticationError) as refused:
                chat(url, wrong)
            assert refused.value.code == "invalid_api_key"
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{url}/v1/nothing").status_code == 401
        for open_path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert httpx.get(url + open_path).status_code == 200
        assert chat(url, ada) == "a"
        assert chat(url, bob, "formal") == "[formal] a"
        with pytest.raises(openai.PermissionDeniedError, match="may not ask 'echo'"):
            chat(url, bob)
        seen = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {bob}"}).json()["data"]
        assert [model["id"] for model in seen] == ["formal"]

        path.write_text("{half a do")  # as while somebody writes it by hand
        assert chat(url, ada) == "a"
        path.unlink()
        with pytest.raises(openai.AuthenticationError):
            chat(url, "anything")
        carol = create_key(path, "carol")
        assert chat(url, carol) == "a"
        with pytest.raises(openai.AuthenticationError):
            chat(url, ada)
        revoke_key(path, "carol")
        with pytest.raises(openai.AuthenticationError):
            chat(url, carol)
    assert meter.by_label[catalog.SERVE_REFUSALS.name, "401"] == 9
    assert not [secret for secret in (ada, bob, carol) if secret in caplog.text]


def test_a_secret_that_kubernetes_swaps_is_read_again(path: Path) -> None:
    folder = path.parent / "mounted"
    for version in ("1", "2"):
        (folder / version).mkdir(parents=True)
    first, second = create_key(folder / "1" / "keys.json", "ada"), create_key(folder / "2" / "keys.json", "ada")
    (folder / "data").symlink_to("1")
    (folder / "keys.json").symlink_to("data/keys.json")
    ring = KeyRing(folder / "keys.json")
    assert ring.find(first) is not None
    (folder / "new").symlink_to("2")
    os.replace(folder / "new", folder / "data")
    assert ring.find(first) is None
    assert ring.find(second) is not None


def test_a_ring_tells_which_expiry_is_next_and_that_its_file_cannot_be_read(path: Path) -> None:
    create_key(path, "for-ever")
    ring = KeyRing(path)
    assert (ring.next_expiry(), ring.is_readable) == (0.0, True)
    now = datetime.now(UTC)
    create_key(path, "later", lifetime=timedelta(days=9), now=now)
    create_key(path, "sooner", lifetime=timedelta(days=2), now=now)
    create_key(path, "over", lifetime=timedelta(seconds=1), now=now - timedelta(days=1))
    assert ring.next_expiry() == pytest.approx((now + timedelta(days=2)).timestamp(), abs=1)
    revoke_key(path, "sooner")
    assert ring.next_expiry() == pytest.approx((now + timedelta(days=9)).timestamp(), abs=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    assert ring.next_expiry() == pytest.approx((now + timedelta(days=9)).timestamp(), abs=1), "those read before go on counting"
    assert not ring.is_readable
    with pytest.raises(StorageError, match=r"is no file of keys: EOF while parsing .* at line \d"):
        read_keys(path)
    path.write_bytes(whole)
    assert ring.next_expiry()
    assert ring.is_readable


def test_a_key_with_a_limit_hears_429_beyond_it_and_others_are_answered(path: Path, meter: Any, served: Served) -> None:
    limited, other = create_key(path, "limited", max_ongoing_requests=1), create_key(path, "other")
    gateway = Gateway(EchoTextEngine(EchoText(time_per_output_token_ms=20)), "echo", Limits(), meter)
    with served(gateway, Authenticated(gateway, KeyRing(path), gateway.count)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=limited, max_retries=0) as client:
            stream = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "a" * 300}], stream=True)
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as refused:
                chat(url, limited)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            assert chat(url, other) == "a"
            with pytest.raises(openai.BadRequestError, match="2 answers in one request; the key 'limited' may have 1 at once") as never:
                client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "a"}], n=2)
            assert never.value.param == "n", "what no waiting helps is no rate limit"
            stream.close()
        deadline = time.monotonic() + 10
        while gateway.in_flight and time.monotonic() < deadline:
            time.sleep(0.005)
        assert chat(url, limited) == "a"


def test_a_tenant_pays_for_all_of_its_keys_and_may_have_a_budget(path: Path) -> None:
    for name in ("ada", "bob"):
        create_key(path, name, tenant="research")
    create_key(path, "carol")
    ring = KeyRing(path)
    assert {key.name: key.payer for key in ring.valid()} == {"ada": "research", "bob": "research", "carol": "carol"}
    assert ring.tenants() == ()
    assert "tenants" not in json.loads(path.read_text()), "a release that knows none reads it, too"
    for usd in ("70", "90"):
        done = CliRunner().invoke(app, ["keys", "budget", "research", "--usd-per-week", usd, "--file", str(path)])
        assert done.exit_code == 0, done.output
    create_key(path, "dora")
    assert [(one.name, one.budget_usd_per_week) for one in ring.tenants()] == [("research", 90.0)]
    listed = CliRunner().invoke(app, ["keys", "list", "--file", str(path)]).output
    assert re.search(r"research +90 USD in seven days", listed)
    assert re.search(r"ada .* tenant research", listed)
    for tenant, usd_per_week, fix in (
        ("ada", 1.0, "carol, dora, research"),
        ("research", -1.0, "above 0"),
        ("research", math.nan, "above 0"),
    ):
        with pytest.raises(SpecError) as refused:
            set_budget(path, tenant, usd_per_week)
        assert fix in refused.value.fix
    set_budget(path, "research", None)
    assert read_keys(path).tenants == ()


def test_finding_a_key_costs_microseconds(path: Path) -> None:
    for i in range(3):
        create_key(path, f"key-{i}")
    secret = create_key(path, "last")
    ring = KeyRing(path)
    best = min(timed(ring, secret) for _ in range(5))
    assert best < 200e-6
    assert json.loads(path.read_text())["keys"][3]["name"] == "last"


def timed(ring: KeyRing, secret: str) -> float:
    began = time.perf_counter()
    for _ in range(100):
        ring.find(secret)
    return (time.perf_counter() - began) / 100


def test_of_keys_that_are_made_at_once_none_is_lost(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda i: create_key(tmp_path / "keys.json", f"key-{i}"), range(24)))
    ring = KeyRing(tmp_path / "keys.json")
    assert sorted(key.name for secret in secrets if (key := ring.find(secret))) == sorted(f"key-{i}" for i in range(24))
