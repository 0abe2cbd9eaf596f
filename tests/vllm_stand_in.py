"""What vLLM's server looks like from outside, for tests of the engine's child process: no model, the standard library.

It answers a completion with the prompt's own tokens, over and over. `--stand-in=WORD` in its arguments: `fails` ends at once, `deaf` never
listens and does not end when asked, `family` has a child of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socketserver
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

TOKEN_S = 0.002
LOADED: list[str] = []


def say(text: str) -> None:
    print(text, flush=True)


def argument(name: str, default: str = "") -> str:
    return next((arg.partition("=")[2] for arg in sys.argv if arg.startswith(f"--{name}=")), default)


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def address_string(self) -> str:
        return "unix"

    def reply(self, body: bytes, kind: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        match self.path:
            case "/v1/models":
                self.reply(json.dumps({"data": [{"id": argument("served-model-name"), "max_model_len": 128}]}).encode())
            case "/metrics":
                lines = ['vllm:num_requests_waiting{engine="0"} 0.0', 'vllm:kv_cache_usage_perc{engine="0"} 0.25']
                lines += [f'vllm:prefix_cache_queries_total{{engine="{i}"}} 10.0' for i in range(2)]
                self.reply("\n".join(lines).encode(), "text/plain")
            case _:
                self.reply(b"", "text/plain")

    def do_POST(self) -> None:
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["content-length"])))
        match self.path:
            case "/v1/load_lora_adapter":
                LOADED.append(asked["lora_name"])
                self.reply(b"Success", "text/plain")
            case "/v1/unload_lora_adapter":
                LOADED.remove(asked["lora_name"])
                self.reply(b"Success", "text/plain")
            case "/v1/completions":
                self.complete(asked)

    def complete(self, asked: dict[str, Any]) -> None:
        if asked["model"] not in [argument("served-model-name"), *LOADED]:
            error = {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}
            return self.reply(json.dumps({"error": error}).encode(), status=404)
        prompt, number = asked["prompt"], asked["max_tokens"]
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for i in range(number):
                time.sleep(TOKEN_S)
                end = "length" if i == number - 1 else None
                choice = {"index": 0, "text": ".", "token_ids": [prompt[i % len(prompt)]], "logprobs": None, "finish_reason": end}
                self.event({"choices": [choice]})
            usage = {"prompt_tokens": len(prompt), "completion_tokens": number, "prompt_tokens_details": {"cached_tokens": 3}}
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"E\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        except OSError:
            say(f"aborted behind {i} tokens")
            self.close_connection = True

    def event(self, document: object) -> None:
        data = f"data: {json.dumps(document)}\n\n".encode()
        self.wfile.write(f"{len(data):X}\r\n".encode() + data + b"\r\n")


def main() -> None:
    how = argument("stand-in")
    say(f"pid {os.getpid()}")
    if how == "fails":
        say("ValueError: the model is too large for the GPU")
        sys.exit(3)
    if how == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if how == "family":
        say(f"pid {subprocess.Popen(['sleep', '600']).pid}")
    Server(argument("uds"), Handler).serve_forever()


if __name__ == "__main__":
    main()


def write_interpreter(folder: Path) -> str:
    """A program that takes a Python's arguments and runs the stand-in: what `engine.python` names."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I {Path(__file__).resolve()} "$@"\n')
    path.chmod(0o755)
    return str(path)
