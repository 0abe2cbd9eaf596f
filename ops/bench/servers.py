"""The servers that are measured, each in a process of its own.

`python servers.py KIND JSON` prints a line with its URL once it answers, and is up until its standard input ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from typing import Any


def danlu(service: dict[str, Any]) -> None:
    """Danlu's own way: a Service on Ray Serve."""
    from danlu import sdk, terminal
    from danlu.spec.serve import Service

    with terminal.no_process_left(), sdk.serving(Service.model_validate(service)) as endpoint:
        _ready(f"{endpoint.url}/v1/classify")
        sys.stdin.read()
        # The measuring is over and nobody waits for an answer: no drain.
        terminal._shut_down()
        os._exit(0)


def fastapi(folder: str, max_length: int, dtype: str, threads: int) -> None:
    """What one writes in ten minutes: FastAPI on uvicorn, one Hugging Face forward a request, on FastAPI's thread pool."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    app = FastAPI()

    class Request(BaseModel):
        input: str

    def classify(request: Request) -> dict[str, Any]:
        with torch.inference_mode():
            batch = tokenizer(request.input, truncation=True, max_length=max_length, return_tensors="pt")
            probs = model(**batch).logits.float().softmax(-1)[0].tolist()
        best = max(range(len(probs)), key=probs.__getitem__)
        return {"data": [{"label": model.config.id2label[best], "probs": probs}]}

    # Annotations that are strings would be looked up in the module, where Request is not.
    classify.__annotations__["request"] = Request
    app.post("/v1/classify")(classify)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", access_log=False))

    def end_with_input() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end_with_input, daemon=True).start()
    app.router.on_startup.append(lambda: _ready(f"http://127.0.0.1:{port}/v1/classify"))
    server.run()


def _ready(url: str) -> None:
    print(json.dumps({"url": url}), flush=True)


if __name__ == "__main__":
    kind, arguments = sys.argv[1], json.loads(sys.argv[2])
    if kind == "danlu":
        danlu(arguments)
    else:
        fastapi(**arguments)
