"""A Ray of two nodes with the certificates that `cluster.tls` gives to pods: it works, and who has none does not get in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from danlu.k8s.pods import CERTIFICATE, TLS_ENV

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: apt-get install openssl"),
]

TWO_NODES = """if True:
    import os, subprocess, sys
    from pathlib import Path
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42

    def asks(environment):
        command = [str(Path(sys.executable).with_name("ray")), "health-check", f"--address={cluster.address}"]
        return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode == 0

    print(asks(dict(os.environ)), asks({name: value for name, value in os.environ.items() if "TLS" not in name}))
    ray.shutdown()
    cluster.shutdown()
"""


def test_nodes_with_a_certificate_of_the_ca_work_together_and_nobody_without_one_is_heard(tmp_path: Path) -> None:
    from ray.util import get_node_ip_address

    for folder in ("ray-ca", "ray-tls", "tmp"):
        (tmp_path / folder).mkdir()
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ca", "-days", "1"]
    subprocess.run([*made, "-keyout", "ray-ca/tls.key", "-out", "ray-ca/tls.crt"], cwd=tmp_path, check=True, capture_output=True)
    script = CERTIFICATE.replace("/etc/", f"{tmp_path}/").replace("/tmp/tls.", f"{tmp_path}/tmp/tls.")
    pod = {"POD_IP": get_node_ip_address(), "POD_NAMESPACE": "team"}
    subprocess.run(["sh", "-c", script], check=True, capture_output=True, env=os.environ | pod)
    tls = {name: value.replace("/etc/", f"{tmp_path}/") for name, value in TLS_ENV.items()}
    done = subprocess.run([sys.executable, "-c", TWO_NODES], capture_output=True, text=True, timeout=400, env=os.environ | tls)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "True False"
