"""A service's pod that is told to end: its replica moves to another node, and what it had begun is answered to its end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.soak

TWO_NODES = """if True:
    import json, threading, time
    import httpx, ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve.config import HTTPOptions
    from danlu.serve import app
    from danlu.serve.leave import _num_replicas, leave
    from danlu.spec.serve import Service

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ends = cluster.add_node(num_cpus=1).node_id
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=app._free_port("127.0.0.1", 0), location="HeadOnly"))
    slow = {"kind": "echo_text", "time_per_output_token_ms": 20}
    app._deploy(Service.model_validate({"name": "parrot", "engine": slow, "limits": {"drain_timeout_s": 60}}))
    options = serve.context._get_global_client().http_config
    url = f"http://{options.host}:{options.port}/v1/completions"
    before = _num_replicas(ends)
    stays = cluster.add_node(num_cpus=1).node_id
    text, begun = [], threading.Event()

    def follow():
        body = {"model": "parrot", "prompt": "x" * 600, "max_tokens": 600, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text.append(json.loads(line[6:])["choices"][0]["text"])
                    begun.set()

    following = threading.Thread(target=follow)
    following.start()
    assert begun.wait(60)
    left = leave(120, ends)
    following.join(60)
    after = httpx.post(url, json={"model": "parrot", "prompt": "hello", "max_tokens": 5}, timeout=60).status_code
    told = {"before": before, "left": left, "answered": len("".join(text)), "after": after, "moved": _num_replicas(stays)}
    print("told:", json.dumps(told))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
"""


def test_a_replica_moves_before_its_node_ends_and_a_stream_that_it_had_begun_is_whole() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_NODES], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("told:")]
    told = json.loads(line.removeprefix("told:"))
    assert told == {"before": 1, "left": True, "answered": 600, "after": 200, "moved": 1}
