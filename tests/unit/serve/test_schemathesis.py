"""Schemathesis on our own OpenAPI documents: whatever it makes of them is answered as they say, and the engine lives on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
from environments import python_of
from lm import write_adapter, write_family

from danlu.serve.engine import Engine
from danlu.serve.engines.echo import EchoEngine, EchoTextEngine
from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.gateway import Gateway
from danlu.serve.generation import TextEngine
from danlu.spec.serve import Echo, EchoText, Limits, Torch

pytestmark = pytest.mark.soak
PACKAGES = Path(__file__).parents[2] / "schemathesis.txt"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def language_model(folder: Path) -> TextEngine:
    model = write_family(folder / "model", "qwen3")
    adapter = write_adapter(model, folder / "adapter", 1)
    return TorchEngine(Torch(model_name_or_path=str(model), dtype="fp32", kv_cache_memory_gb=0.1, adapters={"NAME": str(adapter)}))


ENGINES: dict[str, Callable[[Path], Engine | TextEngine]] = {
    "a language model": language_model,
    "the fake of one": lambda folder: EchoTextEngine(EchoText()),
    "a classifier": lambda folder: EchoEngine(Echo(labels=["a", "b"])),
}


@pytest.mark.parametrize("name", ENGINES)
def test_no_request_that_it_makes_is_too_much(name: str, served: Callable[..., AbstractContextManager[str]], tmp_path: Path) -> None:
    gateway = Gateway(ENGINES[name](tmp_path), "echo", Limits(), lambda *_, **__: None, lora_updates=True)
    command = [python_of(PACKAGES), "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += ["run", "--checks", CHECKS, "--max-examples", "40"]
    command += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "20", "--continue-on-failure", "--seed", "1"]
    with served(gateway) as url:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        asked = [*command, f"{url}/openapi.json", "--url", url]
        done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=400)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert int(done.stdout.rpartition(" generated")[0].rpartition(" ")[2]) > 100, done.stdout[-2000:]
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert gateway.in_flight == 0
