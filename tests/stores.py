"""Object stores on this machine, which keep objects in memory: moto's server of Amazon's S3 API, and an emulator of Google's."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import python_of

PACKAGES = Path(__file__).with_name("stores.txt")
BUCKET = "danlu-tests"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def amazon() -> Iterator[str]:
    """The endpoint of a server with one bucket, while the block runs."""
    with _server("-m", "moto.server", "-H", "127.0.0.1", "-p") as port:
        _call(f"http://127.0.0.1:{port}/{BUCKET}", "PUT")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def google() -> Iterator[str]:
    """The same with Google's API."""
    program = "import sys; from gcp_storage_emulator.__main__ import main; main(sys.argv[1:])"
    with _server("-c", program, "start", "--host=127.0.0.1", "--in-memory", f"--default-bucket={BUCKET}", "--port") as port:
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _server(*command: str) -> Iterator[int]:
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([python_of(PACKAGES), *command, str(port)], stdout=log, stderr=log)
        try:
            _wait_for(port, process)
            yield port
        finally:
            process.terminate()
            process.wait()


def ask_who(endpoint: str, strict: bool) -> None:
    """Whether the server refuses a key that it does not know, as Amazon's does. It knows none."""
    _call(f"{endpoint}/moto-api/reset-auth", "POST", b"0" if strict else b"inf")


def _call(url: str, method: str, body: bytes = b"") -> None:
    request = urllib.request.Request(url, data=body, method=method, headers={"Content-Type": "text/plain"})
    urllib.request.urlopen(request, timeout=10).close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    pytest.fail("the server ended at once")
