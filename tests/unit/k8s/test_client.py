"""The client against an API server over HTTP: what is asked again, what is not, and what a person is told."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from k8s_jobs import JOB

from danlu.errors import ClusterError
from danlu.k8s import client
from danlu.k8s.client import Refused
from danlu.k8s.kubeconfig import Kube, connect
from danlu.k8s.rayjob import ray_job
from danlu.remote import jobs
from danlu.spec.train import TrainJob

RAYJOBS = "/apis/ray.io/v1/namespaces/default/rayjobs"


@pytest.fixture
def kube(api: Any) -> Kube:
    return connect()


def test_an_object_is_made_changed_found_and_deleted(api: Any, kube: Kube) -> None:
    made = client.create(kube, ray_job(JOB))
    assert made["metadata"]["uid"]
    assert client.get(kube, "RayJob", "topics") == made
    changed = client.patch(kube, "RayJob", "topics", {"spec": {"backoffLimit": 3}})
    assert changed["spec"]["backoffLimit"] == 3
    assert changed["spec"]["entrypoint"] == made["spec"]["entrypoint"]
    assert client.find(kube, "RayJob", {"danlu.ai/kind": "train"}) == [changed]
    assert client.find(kube, "RayJob", {"danlu.ai/kind": "serve"}) == []
    assert client.delete(kube, "RayJob", "topics")
    assert not client.delete(kube, "RayJob", "topics")
    assert client.get(kube, "RayJob", "topics") is None


def test_a_name_that_is_taken_is_refused_and_changes_nothing(api: Any, kube: Kube) -> None:
    before = client.create(kube, ray_job(JOB))
    with pytest.raises(Refused) as refused:
        client.create(kube, ray_job(JOB))
    assert (refused.value.status, refused.value.reason) == (409, "AlreadyExists")
    assert client.get(kube, "RayJob", "topics") == before


def test_an_unknown_field_is_refused_by_the_server_and_said(api: Any, kube: Kube) -> None:
    one = ray_job(JOB)
    one["spec"]["backofLimit"] = 1
    with pytest.raises(Refused, match="'backofLimit' was unexpected"):
        client.create(kube, one)


def test_what_may_not_be_done_is_said_with_the_right_that_is_missing(api: Any, kube: Kube) -> None:
    status = {"kind": "Status", "reason": "Forbidden", "message": 'rayjobs.ray.io is forbidden: User "li" cannot create resource'}
    api.answer(f"post {RAYJOBS}", 403, status)
    with pytest.raises(Refused) as refused:
        client.create(kube, ray_job(JOB))
    assert 'User "li" cannot create' in refused.value.problem
    assert "the right to create rayjobs in namespace default" in refused.value.fix
    assert refused.value.exit_code == 3


def test_expired_credentials_are_said_and_not_tried_again(api: Any, kube: Kube) -> None:
    api.answer(f"get {RAYJOBS}", 401, {"kind": "Status", "reason": "Unauthorized", "message": "Unauthorized"})
    with pytest.raises(Refused) as refused:
        client.find(kube, "RayJob")
    assert "log in again" in refused.value.fix
    assert len(api.requests()) == 1


def test_a_cluster_without_kuberay_is_told_from_one_without_the_job(api: Any, kube: Kube) -> None:
    api.do(lambda handler: handler.kinds.pop("rayjobs"))
    for ask in (lambda: client.find(kube, "RayJob"), lambda: client.create(kube, ray_job(JOB)), lambda: client.get(kube, "RayJob", "a")):
        with pytest.raises(Refused) as refused:
            ask()
        assert "helm install kuberay-operator" in refused.value.fix
    api.do(lambda handler: handler.kinds.pop("workloads"))
    assert client.find(kube, "Workload") == [], "Kueue is nobody's duty"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_too_busy_is_asked_again(status: int, api: Any, kube: Kube) -> None:
    api.answer("get", status, {"message": "busy"}, times=2)
    assert client.find(kube, "Pod") == []
    assert len(api.requests("GET")) == 3
    api.answer("get", status, {"message": "busy"})
    with pytest.raises(Refused, match="busy"):
        client.find(kube, "Pod")
    assert len(api.requests("GET")) == 3 + client.RETRIES


def test_a_server_says_when_to_ask_again(api: Any, kube: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(client, "_pause", waits.append)
    api.answer("get", 429, {"message": "slow down"}, {"Retry-After": "7"}, times=1)
    client.find(kube, "Pod")
    assert waits == [7.0]


def test_a_server_that_does_not_answer_is_said_with_its_address(tmp_path: Path, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kube = connect()
    api.__exit__()
    monkeypatch.setattr(client, "RETRIES", 2)
    with pytest.raises(ClusterError) as refused:
        client.find(kube, "Pod")
    assert api.url in refused.value.problem
    assert "cluster-info" in refused.value.fix
    with pytest.raises(ClusterError, match="no answer"):
        client.create(kube, ray_job(JOB))


def test_a_server_that_is_silent_is_not_asked_for_minutes(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kube, waits = connect(), []
    api.__exit__()
    monkeypatch.setattr(client, "_pause", waits.append)
    with pytest.raises(ClusterError, match="no answer"):
        client.find(kube, "Pod")
    assert len(waits) == client.RETRIES - 1, "one that refuses at once may come back in a moment"
    monkeypatch.setattr(client, "TIMEOUT_S", 0.0)
    with pytest.raises(ClusterError, match="no answer"):
        client.find(kube, "Pod")
    assert len(waits) == client.RETRIES - 1


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"[]"])
def test_what_is_no_kubernetes_api_is_told_from_one(body: bytes, api: Any, kube: Kube) -> None:
    """A proxy's login page, or a server of something else."""
    api.answer(f"get {RAYJOBS}", 200, body)
    with pytest.raises(ClusterError, match=r"answers with HTTP 200 and [^,]*, and not as a Kubernetes API does"):
        client.find(kube, "RayJob")


def test_a_connection_that_is_not_secure_is_said_at_once(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the server speaks no TLS; of a certificate that has run out or is another's the client says it in the same way."""
    file = api.kubeconfig()
    file.write_text(file.read_text().replace("http://", "https://"))
    monkeypatch.setattr(client, "_pause", pytest.fail)
    with pytest.raises(ClusterError, match="no secure connection to https://") as refused:
        client.find(connect(), "RayJob")
    assert "certificate-authority" in refused.value.fix


def test_without_a_kubeconfig_it_is_said_where_one_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nowhere"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterError) as refused:
        connect()
    assert refused.value.problem == f"there is no kubeconfig: no file {tmp_path / 'nowhere'}"
    assert "KUBECONFIG=" in refused.value.fix


def test_a_context_is_chosen_by_name_and_brings_its_namespace(api: Any) -> None:
    api.kubeconfig(here="default", there="research")
    assert connect().namespace == "default"
    there = connect("there")
    assert (there.context, there.namespace) == ("there", "research")
    client.create(there, ray_job(JOB))
    assert api.get("rayjobs", "topics", "research")
    assert connect("there", "other").namespace == "other"
    with pytest.raises(ClusterError) as refused:
        connect("elsewhere")
    assert refused.value.fix == "one of: here, there"
    with pytest.raises(ClusterError) as refused:
        connect("thre")
    assert refused.value.fix == "did you mean there? There is: here, there"


def test_a_watch_that_breaks_is_begun_again_where_it_was(api: Any, kube: Kube) -> None:
    client.create(kube, ray_job(JOB))
    api.put("rayjobs", "topics", status={"jobStatus": "PENDING"})
    # The first watch ends in the middle of an event, the second says that its version is too old.
    watch = f"get {RAYJOBS}?watch=true"
    api.answer(watch, ({"type": "ERROR", "object": {"code": 410}},), times=2)
    api.answer(watch, (b'{"type": "MODIF',), times=1)
    seen = []
    for one in client.watch(kube, "RayJob", "topics"):
        assert one is not None
        seen.append(one["status"]["jobStatus"])
        if len(seen) == 3:
            threading.Thread(target=api.put, args=("rayjobs", "topics"), kwargs={"status": {"jobStatus": "RUNNING"}}).start()
        if seen[-1] == "RUNNING":
            break
    assert seen[0] == "PENDING"
    assert len([path for path in api.requests("GET") if path.endswith("/rayjobs")]) >= 3


def test_a_watch_ends_with_its_object_and_with_its_time(api: Any, kube: Kube) -> None:
    client.create(kube, ray_job(JOB))
    threading.Timer(0.2, lambda: client.delete(kube, "RayJob", "topics")).start()
    assert [one is None for one in client.watch(kube, "RayJob", "topics")][-1]
    client.create(kube, ray_job(JOB))
    api.answer(f"get {RAYJOBS}?watch=true", ({"type": "BOOKMARK", "object": {"metadata": {"name": "topics"}}},))
    began = time.monotonic()
    list(client.watch(kube, "RayJob", "topics", timeout_s=0.3))
    assert time.monotonic() - began < 5


def test_a_log_is_read_line_by_line(api: Any, kube: Kube) -> None:
    api.answer("get /api/v1/namespaces/default/pods/p/log", (b"step 1/2\nst", b"ep 2/2\n\xe4\xbd\xa0", b"\xe5\xa5\xbd"))
    assert list(client.pod_log(kube, "p", follow=True)) == ["step 1/2", "step 2/2", "你好"]


def test_a_create_that_is_lost_on_the_way_is_not_repeated(api: Any, kube: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    def broken(method: str, *_: object, **__: object) -> None:
        sent.append(method)
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(kube.api.rest_client, "request", broken)
    with pytest.raises(ClusterError, match="reset by peer"):
        client.create(kube, ray_job(JOB))
    assert sent == ["POST"]


def test_a_dry_run_asks_the_server_and_makes_nothing(api: Any, kube: Kube) -> None:
    assert jobs.dry_run(kube, JOB) == ["ConfigMap topics-spec", "RayJob topics"]
    assert api.get("rayjobs", "topics") is None
    assert api.get("configmaps", "topics-spec") is None
    assert len(api.requests("POST")) == 1
    api.answer(f"post {RAYJOBS}", 422, {"reason": "Invalid", "message": "quota exceeded"})
    with pytest.raises(Refused, match="quota exceeded"):
        jobs.dry_run(kube, TrainJob.model_validate(JOB.model_dump() | {"name": "other"}))
