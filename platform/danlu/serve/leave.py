"""`python -m danlu.serve.leave SECONDS`: the preStop hook of a service's pod. Ray Serve starts its replicas on other nodes and sends
nothing more here; returns once those here have finished what they had begun, or after so many seconds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import ray
from ray import serve

from danlu.local_ray import join_ray

POLL_S = 0.5


def leave(timeout_s: float, node_id: str | None = None) -> bool:
    """Drain a node of the Ray this process is connected to, its own unless told otherwise; whether no replica is left on it."""
    context = ray.get_runtime_context()
    node_id = node_id or context.get_node_id()
    deadline = time.monotonic() + timeout_s
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={context.gcs_address}", f"--node-id={node_id}"]
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=its pod ends"]
    subprocess.run([*command, *reason, f"--deadline-remaining-seconds={int(timeout_s)}"], check=True)
    while _num_replicas(node_id):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _num_replicas(node_id: str) -> int:
    client = serve.context._get_global_client(raise_if_no_controller_running=False)
    applications = client.get_serve_details()["applications"].values() if client is not None else []
    deployments = [one for application in applications for one in application["deployments"].values()]
    # One that is starting has no node yet.
    return sum(replica.get("node_id") == node_id for one in deployments for replica in one["replicas"])


if __name__ == "__main__":
    join_ray()
    sys.exit(0 if leave(float(sys.argv[1])) else 1)
