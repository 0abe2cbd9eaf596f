"""Specs as Kubernetes objects: taken by the CRDs and by Kubernetes' own schemas, strictly, and saying what the spec says."""

from __future__ import annotations

import ast
import copy
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import check, core_errors, crd_errors, tool

from danlu.errors import SpecError
from danlu.k8s import pods
from danlu.k8s.manifests import render, text
from danlu.k8s.rayservice import serve_config, upgrade
from danlu.spec.files import load, parse, read, which
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

ROOT = Path(__file__).parents[3]

EXAMPLES = [path for path in sorted((ROOT / "k8s" / "examples").glob("*.yaml")) if "\ncluster:" in path.read_text()]

JOB: dict[str, Any] = {
    "name": "topics",
    "model": {"model_name_or_path": "m"},
    "data": {"train": "s3://b/t.csv"},
    "storage": "s3://b/runs",
    "cluster": {"image": "registry/danlu:1"},
}
GPU_JOB = JOB | {"workers": {"num_workers": 8, "cpus_per_worker": 6, "gpus_per_worker": 1}, "max_failures": 1, "micro_batch_size": 4}
SERVICE: dict[str, Any] = {"name": "topics", "bundle": "topics@v1", "storage": "s3://b/runs", "cluster": {"image": "registry/danlu:1"}}

JOB_CLUSTERS: dict[str, dict[str, Any]] = {
    "pull secrets and identity": {"image_pull_policy": "Always", "image_pull_secrets": ["r"], "service_account": "s", "namespace": "n"},
    "nodes": {
        "gpu_type": "NVIDIA-A10G",
        "node_selector": {"pool": "a"},
        "tolerations": [{"key": "team"}, {"key": "team", "value": "a", "effect": "NoSchedule"}],
    },
    "head": {"head": {"cpus": 3, "memory": "5Gi", "node_selector": {"pool": "cpu"}}},
    "shared memory": {"memory": "64Gi", "shared_memory": "7Gi"},
    "env": {"env": {"A": "1", "RAY_worker_niceness": "5"}, "secret_env": [{"name": "T", "secret": "hub", "key": "token"}]},
    "volumes": {"volumes": [{"claim": "c", "mount_path": "/data"}, {"claim": "d", "mount_path": "/x/y", "read_only": True}]},
    "secrets as files": {
        "volumes": [{"claim": "c", "mount_path": "/data"}],
        "secret_volumes": [{"secret": "danlu-keys", "mount_path": "/etc/danlu-keys"}, {"secret": "gcp", "mount_path": "/gcp"}],
    },
    "certificates": {"tls": {"ca_secret": "ray-ca"}, "image_pull_policy": "Always", "shared_memory": "1Gi"},
    "kueue": {"scheduler": {"kind": "kueue", "queue": "q"}, "priority_class": "p"},
    "volcano": {"scheduler": {"kind": "volcano", "queue": "q"}, "priority_class": "p"},
    "volcano without a queue": {"scheduler": {"kind": "volcano"}},
    "yunikorn": {"scheduler": {"kind": "yunikorn", "queue": "root.research"}},
    "kai": {"scheduler": {"kind": "kai", "queue": "q"}},
    "deadlines and retries": {"active_deadline_s": 9, "pre_running_deadline_s": 8, "backoff_limit": 7},
    "rules": {"cleanup": {"kind": "rules", "after_success_s": 1, "workers_after_failure_s": 2, "head_after_failure_s": 3}},
    "nothing is kept": {"cleanup": {"kind": "ttl", "ttl_seconds_after_finished": 0}},
    "nothing is kept by rules": {"cleanup": {"kind": "rules", "head_after_failure_s": 0}},
    "topology": {"same_topology": "topology.kubernetes.io/zone", "workers_per_pod": 4},
    **{f"spot on {provider}": {"spot": provider} for provider in pods.SPOT},
}
SERVICE_CLUSTERS: dict[str, dict[str, Any]] = {
    "in place": {"upgrade": {"kind": "in_place"}},
    "incremental": {"upgrade": {"kind": "incremental", "gateway_class": "istio", "step_size_percent": 10, "max_surge_percent": 50}},
    "spread": {"spread_over": "kubernetes.io/hostname", "replicas_per_pod": 2},
    "redis": {"redis": {"address": "redis:6379", "password_secret": "redis"}},
    "redis without a password": {"redis": {"address": "redis:6379"}},
}
JOBS_OWN = {"active_deadline_s", "cleanup", "same_topology", "spot", "gpu_type"}
OF_A_SERVICE = {name: fields for name, fields in JOB_CLUSTERS.items() if not set(fields) & JOBS_OWN and name != "kueue"} | SERVICE_CLUSTERS
"""A service in Kueue's queue has a fixed number of pods: test_odd.py."""


def job(**cluster: Any) -> TrainJob:
    return TrainJob.model_validate(GPU_JOB | {"cluster": GPU_JOB["cluster"] | cluster})


def service(autoscaling: dict[str, Any] | None = None, **cluster: Any) -> Service:
    return Service.model_validate(
        SERVICE | {"cluster": SERVICE["cluster"] | cluster, "autoscaling": autoscaling or {"min_replicas": 1, "max_replicas": 4}}
    )


def ray_job(one: TrainJob) -> dict[str, Any]:
    spec: dict[str, Any] = render(one)[1]["spec"]
    return spec


def containers(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"], "worker": cluster["workerGroupSpecs"][0]}
    return {role: group["template"]["spec"] for role, group in groups.items()}


@pytest.mark.parametrize("name", JOB_CLUSTERS)
def test_a_job_on_any_cluster_is_taken_by_the_crd(name: str) -> None:
    rendered = render(job(**JOB_CLUSTERS[name]))
    assert {"RayJob", "ConfigMap"} <= {one["kind"] for one in rendered}
    for one in rendered:
        check(one)


@pytest.mark.parametrize("name", OF_A_SERVICE)
def test_a_service_on_any_cluster_is_taken_by_the_crd(name: str) -> None:
    rendered = render(service(**OF_A_SERVICE[name]))
    assert rendered[0]["kind"] == "RayService"
    for one in rendered:
        check(one)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_what_is_rendered_of_it(path: Path) -> None:
    spec = load(which((TrainJob, Service), read(path)), path)
    assert isinstance(spec, TrainJob | Service)
    for one in render(spec):
        check(one)
    assert list(yaml.safe_load_all((ROOT / "k8s" / "rendered" / path.name).read_text())) == render(spec)
    assert list(yaml.safe_load_all(text(render(spec)))) == render(spec)


def test_a_name_that_yaml_could_take_for_something_else_stays_a_name() -> None:
    """Kubernetes reads `n` as false and `1e3` as a number."""
    for name in ("n", "y", "on", "1e3", "0o7"):
        assert f"namespace: {name}\n" not in text(render(job(namespace=name)))
        assert yaml.safe_load(text(render(job(namespace=name))[:1]))["metadata"]["namespace"] == name


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backoffLimt", 1),
        ("spec.backoffLimit", "1"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.serviceAcountName", "s"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 1),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits", ["8Gi"]),
        ("spec.entrypointNumGpus", "one"),
    ],
)
def test_the_check_itself_refuses_a_misspelt_or_wrong_field(path: str, value: object) -> None:
    bad = copy.deepcopy(render(job())[1])
    assert crd_errors(bad) == []
    place: Any = bad
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part) if part.isdecimal() else part]
    place[last] = value
    assert crd_errors(bad)
    assert core_errors({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "dat": {}})


def test_the_spec_that_crosses_to_the_cluster_is_the_jobs() -> None:
    one = job(**JOB_CLUSTERS["volumes"])
    config = render(one)[0]
    assert parse(TrainJob, config["data"]["job.yaml"]) == one
    mounted = {volume["name"]: volume for volume in containers(ray_job(one))["head"]["volumes"]}
    assert mounted["spec"]["configMap"]["name"] == config["metadata"]["name"]
    assert ray_job(one)["entrypoint"] == "python -m danlu.train /etc/danlu/job.yaml"


def test_pods_get_the_cores_and_gpus_of_their_workers() -> None:
    spec = ray_job(job(workers_per_pod=4, memory="200Gi", gpu_type="NVIDIA-H100"))
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    worker = containers(spec)["worker"]
    assert worker["containers"][0]["resources"]["limits"] == {"cpu": "24", "memory": "200Gi", "nvidia.com/gpu": "4"}
    assert worker["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker["tolerations"]
    head = containers(spec)["head"]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert "tolerations" not in head
    assert "entrypointNumGpus" not in spec


def test_one_worker_trains_in_the_driver_which_asks_for_the_workers_pod() -> None:
    spec = ray_job(TrainJob.model_validate(GPU_JOB | {"workers": {"cpus_per_worker": 6, "gpus_per_worker": 1}}))
    assert (spec["entrypointNumCpus"], spec["entrypointNumGpus"]) == (6, 1)


def test_a_queued_job_waits_suspended_and_any_other_does_not() -> None:
    kueue, volcano = (render(job(scheduler={"kind": kind, "queue": "q"}))[1] for kind in ("kueue", "volcano"))
    assert kueue["spec"]["suspend"] is True
    assert kueue["spec"]["shutdownAfterJobFinishes"] is True, "KubeRay suspends no other job"
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert "suspend" not in volcano["spec"]
    assert volcano["metadata"]["labels"]["volcano.sh/queue-name"] == "q"


def test_rules_and_a_time_to_live_never_stand_together() -> None:
    rules = ray_job(job(**JOB_CLUSTERS["rules"]))
    assert not rules["shutdownAfterJobFinishes"]
    # A job that took too long has failed as a RayJob; Ray, which was not asked, still calls it running.
    conditions = [rule["condition"] for rule in rules["deletionStrategy"]["deletionRules"]]
    assert [one.get("jobStatus") or one.get("jobDeploymentStatus") for one in conditions] == ["SUCCEEDED", "Failed", "Failed"]
    assert "ttlSecondsAfterFinished" not in rules
    assert ray_job(job(cleanup={"kind": "ttl", "ttl_seconds_after_finished": 5}))["ttlSecondsAfterFinished"] == 5


def test_only_workers_stand_on_spot_nodes() -> None:
    found = containers(ray_job(job(spot="gke")))
    assert found["worker"]["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    (term,) = found["head"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "cloud.google.com/gke-spot", "operator": "NotIn", "values": ["true"]}]


def test_every_container_fits_the_restricted_pod_security_standard() -> None:
    every = [*containers(ray_job(job())).values(), ray_job(job())["submitterPodTemplate"]["spec"]]
    for pod in [*every, *containers(render(service())[0]["spec"]).values()]:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
            assert container["securityContext"] == restricted
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            written = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
            assert {mounts["/tmp"], mounts["/home/danlu"]} <= written, "Ray writes to one, the libraries' caches to the other"


def test_a_services_keys_are_a_secret_that_its_pods_have() -> None:
    keys = {"auth": {"keys_file": "/etc/danlu-keys/keys.json"}}
    cluster = SERVICE["cluster"] | {"secret_volumes": [{"secret": "danlu-keys", "mount_path": "/etc/danlu-keys"}]}
    (one,) = render(Service.model_validate(SERVICE | keys | {"cluster": cluster}))
    check(one)
    worker = containers(one["spec"])["worker"]
    assert {"name": "secret-0", "secret": {"secretName": "danlu-keys"}} in worker["volumes"]
    assert {"name": "secret-0", "mountPath": "/etc/danlu-keys", "readOnly": True} in worker["containers"][0]["volumeMounts"]
    with pytest.raises(SpecError, match="none of the pods' volumes") as refused:
        render(Service.model_validate(SERVICE | keys))
    assert refused.value.where == "auth.keys_file"
    assert "secret_volumes" in refused.value.fix


def test_a_services_pod_hands_its_replicas_over_before_it_is_ended_and_a_jobs_does_not() -> None:
    (one,) = render(Service.model_validate(SERVICE | {"limits": {"drain_timeout_s": 40.5}}))
    found = containers(one["spec"])
    (container,) = found["worker"]["containers"]
    *command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["python", "-m", "danlu.serve.leave"]
    assert importlib.util.find_spec("danlu.serve.leave") is not None
    assert int(seconds) > 41 + 60, "replicas elsewhere have time to start, and those here to finish"
    assert found["worker"]["terminationGracePeriodSeconds"] > int(seconds)
    for other in (found["head"], *containers(ray_job(job())).values()):
        assert "lifecycle" not in other["containers"][0]


def test_a_pod_makes_itself_a_certificate_of_the_ca_for_its_own_address_and_ray_asks_for_it(tmp_path: Path) -> None:
    """The script as the pod runs it, judged by openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: apt-get install openssl")

    def openssl(*arguments: str) -> str:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, cwd=tmp_path)
        return done.stdout + done.stderr

    for folder in ("ray-ca", "ray-tls", "tmp"):
        (tmp_path / folder).mkdir()
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=ca", "-days", "1",
            "-keyout", "ray-ca/tls.key", "-out", "ray-ca/tls.crt")  # fmt: skip
    one = service({"min_replicas": 1, "max_replicas": 2}, tls={"ca_secret": "ray-ca"})
    cluster = render(one)[0]["spec"]["rayClusterConfig"]
    for role, pod in containers(render(one)[0]["spec"]).items():
        (init,), (ray,) = pod["initContainers"], pod["containers"]
        assert {"/etc/ray-ca", "/etc/ray-tls"} <= {mount["mountPath"] for mount in init["volumeMounts"]}
        assert "/etc/ray-ca" not in {mount["mountPath"] for mount in ray["volumeMounts"]}, "Ray does not see the CA's key"
        env = {entry["name"]: entry.get("value") for entry in ray["env"]}
        assert env["RAY_USE_TLS"] == "1"
        script = init["command"][-1].replace("/etc/", f"{tmp_path}/").replace("/tmp/tls.", f"{tmp_path}/tmp/tls.")
        made = {**os.environ, "POD_IP": "10.1.2.3", "POD_NAMESPACE": "team"}
        subprocess.run(["sh", "-c", script], check=True, capture_output=True, env=made)
        certificate, key, ca = (
            env[f"RAY_TLS_{name}"].replace("/etc/", f"{tmp_path}/") for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")
        )
        for wanted in (["-verify_ip", "10.1.2.3"], ["-verify_ip", "127.0.0.1"], ["-verify_hostname", "a-head-svc.team.svc.cluster.local"]):
            assert f"{certificate}: OK" in openssl("verify", "-CAfile", ca, *wanted, certificate), role
        for other in (["-verify_ip", "10.1.2.4"], ["-verify_hostname", "a-head-svc.others.svc.cluster.local"]):
            assert "mismatch" in openssl("verify", "-CAfile", ca, *other, certificate)
        assert openssl("pkey", "-in", key, "-pubout") == openssl("x509", "-in", certificate, "-noout", "-pubkey")
        assert Path(key).stat().st_mode & 0o077 == 0
    assert {"RAY_USE_TLS"} <= {entry["name"] for entry in cluster["autoscalerOptions"]["env"]}, "it talks to the head, too"
    for pod in containers(render(service())[0]["spec"]).values():
        assert "initContainers" not in pod


GPU_SERVICE = {**SERVICE, "engine": {"kind": "encoder", "num_gpus": 1}, "autoscaling": {"min_replicas": 3, "max_replicas": 8}}
INCREMENTAL = {"upgrade": {"kind": "incremental", "gateway_class": "istio", "step_size_percent": 10, "max_surge_percent": 50}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bundle": "topics@v2"}, "in place: "),
        ({"autoscaling": {"min_replicas": 1, "max_replicas": 9}}, "in place: .*; 1 to 9 pods instead of 3 to \\d, 9 GPUs at most"),
        ({"cluster": {"image": "registry/danlu:2"}}, "new cluster: .* 3 more pods than now and 3 more GPUs"),
        ({"cluster": {"image": "registry/danlu:1", "memory": "32Gi"}}, "new cluster: "),
        (
            {"cluster": {"image": "registry/danlu:2", **INCREMENTAL}},
            "incremental: .* 10 % of the requests at a time; up to 2 more pods than now and 2 more GPUs",
        ),
        ({"cluster": {"image": "registry/danlu:2", "upgrade": {"kind": "in_place"}}}, "in place: .* are left out"),
    ],
)
def test_an_upgrade_says_how_it_goes_and_what_it_needs(change: dict[str, Any], told: str) -> None:
    before, after = (render(Service.model_validate(one))[0] for one in (GPU_SERVICE, GPU_SERVICE | change))
    assert re.match(told, upgrade(before, after)), upgrade(before, after)


@pytest.mark.parametrize("path", ["/tmp", "/home/danlu", "/etc/danlu", "/data"])
def test_two_volumes_never_have_one_path(path: str) -> None:
    with pytest.raises(ValueError, match=f"mount_path={path} is taken"):
        job(volumes=[{"claim": "c", "mount_path": "/data"}], secret_volumes=[{"secret": "s", "mount_path": path}])


def test_ray_serve_takes_the_configuration_and_builds_the_service_from_it() -> None:
    from ray.serve.schema import ServeDeploySchema

    one = service(**JOB_CLUSTERS["volumes"])
    config = ServeDeploySchema.model_validate(yaml.safe_load(render(one)[0]["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "danlu.serve.app:build"
    assert Service.model_validate(application.args) == one.model_copy(update={"cluster": None})


def test_pods_follow_replicas_and_scale_with_them() -> None:
    def cluster(low: int, high: int, each: int = 1) -> dict[str, Any]:
        found: dict[str, Any] = render(service({"min_replicas": low, "max_replicas": high}, replicas_per_pod=each))[0]["spec"][
            "rayClusterConfig"
        ]
        return found

    fixed, scaled = cluster(2, 2), cluster(1, 5, 2)
    assert "enableInTreeAutoscaling" not in fixed
    assert scaled["enableInTreeAutoscaling"] is True
    assert [scaled["workerGroupSpecs"][0][name] for name in ("replicas", "minReplicas", "maxReplicas")] == [1, 1, 3]
    assert scaled["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"], "the autoscaler asks the API server for pods"
    assert not fixed["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"]


@pytest.mark.parametrize(
    ("change", "where", "problem", "fix"),
    [
        ({"cluster": None}, "cluster", "needs to be told what to run", "image:"),
        ({"storage": "runs"}, "storage", "storage=runs is a folder of one machine", "s3://bucket/runs"),
        (
            {"storage": "/tmp/runs", "cluster": {"image": "i", "volumes": [{"claim": "c", "mount_path": "/data"}]}},
            "storage",
            "storage=/tmp/runs",
            "storage: /data/runs",
        ),
        (
            {"storage": "/data/runs", "cluster": {"image": "i", "volumes": [{"claim": "c", "mount_path": "/data", "read_only": True}]}},
            "storage",
            "storage=/data/runs",
            "s3://",
        ),
    ],
)
def test_a_job_that_its_pods_could_not_run_is_refused_before(change: dict[str, Any], where: str, problem: str, fix: str) -> None:
    with pytest.raises(SpecError) as refused:
        render(TrainJob.model_validate(JOB | change))
    assert refused.value.where == where
    assert problem in refused.value.problem
    assert fix in refused.value.fix


def test_pods_run_ray_as_a_laptop_does_and_as_the_image_has_it() -> None:
    tree = ast.parse((ROOT / "platform" / "danlu" / "local_ray.py").read_text())
    (local,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENVIRONMENT"]
    assert ast.literal_eval(local) == pods.RAY_ENV
    assert f"\nray=={pods.RAY_VERSION}\n" in (ROOT / "constraints.txt").read_text()


def overlaid(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay, each of which an API server would take."""
    command = [tool("kubectl"), "kustomize", str(ROOT / "k8s" / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    for one in found:
        check(one)
    return found


def test_the_overlay_for_people_has_every_example_in_its_namespace() -> None:
    found = overlaid("prod")
    kinds = [one["kind"] for one in found]
    assert kinds.count("RayJob") == sum("\nkind: train" in f"\n{path.read_text()}" for path in EXAMPLES)
    assert kinds.count("RayJob") + kinds.count("RayService") == len(EXAMPLES)
    assert {one["metadata"]["namespace"] for one in found} == {"danlu"}
    assert {"NetworkPolicy", "Role", "ResourceQuota", "LocalQueue", "PersistentVolumeClaim", "PodMonitor", "PrometheusRule"} <= set(kinds)
    # What the examples name is there.
    accounts = {one["metadata"]["name"] for one in found if one["kind"] == "ServiceAccount"}
    (queue,) = [one["metadata"]["name"] for one in found if one["kind"] == "LocalQueue"]
    for one in found:
        if one["kind"] == "RayJob":
            assert containers(one["spec"])["head"].get("serviceAccountName") in {None, *accounts}
            assert one["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") in (None, queue)


def test_the_overlay_for_kind_runs_on_cpus_in_little_room_and_waits_for_nothing() -> None:
    found = overlaid("dev")
    assert {one["metadata"]["namespace"] for one in found} == {"danlu-dev"}
    assert pods.GPU not in yaml.safe_dump(found)
    assert sorted(one["kind"] for one in found) == ["ConfigMap", "PersistentVolumeClaim", "RayJob", "RayService"]
    of_kind = {one["kind"]: one for one in found}
    claim = of_kind["PersistentVolumeClaim"]["metadata"]["name"]
    for kind, config in (("RayJob", "rayClusterSpec"), ("RayService", "rayClusterConfig")):
        spec = of_kind[kind]["spec"]
        assert "suspend" not in spec
        assert "gcsFaultToleranceOptions" not in spec[config]
        groups = [spec[config]["headGroupSpec"], *spec[config]["workerGroupSpecs"]]
        asked = [group.get("replicas", 1) * int(_resources(group)["requests"]["memory"].removesuffix("Gi")) for group in groups]
        assert sum(asked) <= 6, "of a laptop's memory, in GiB"
        assert all(_resources(group)["requests"]["cpu"] == "500m" for group in groups)
        volumes = [volume for group in groups for volume in group["template"]["spec"]["volumes"]]
        assert {one["persistentVolumeClaim"]["claimName"] for one in volumes if "persistentVolumeClaim" in one} == {claim}


def _resources(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["template"]["spec"]["containers"][0]["resources"]
    return found


def test_a_request_finds_the_heads_proxy_where_no_worker_has_to_be() -> None:
    def excluded(low: int, **cluster: Any) -> bool:
        (made,) = render(service({"min_replicas": low, "max_replicas": 4}, **cluster))
        return bool(made["spec"]["excludeHeadPodFromServeSvc"])

    assert [excluded(0), excluded(1), excluded(1, replicas_per_pod=2)] == [False, True, True]


def test_a_long_answer_of_a_language_model_is_cut_by_nothing_but_its_gateway() -> None:
    def timeout_s(engine: dict[str, Any]) -> Any:
        one = {"name": "a", "engine": engine, "limits": {"request_timeout_s": 30}, "cluster": {"image": "i"}}
        return serve_config(Service.model_validate(one))["http_options"]["request_timeout_s"]

    assert timeout_s({"kind": "echo_text"}) is None
    assert timeout_s({"kind": "echo"}) == 35


def test_workers_stand_by_their_own_and_not_by_a_service_of_their_jobs_name() -> None:
    (term,) = containers(ray_job(job(same_topology="rack")))["worker"]["affinity"]["podAffinity"].popitem()[1]
    assert term["labelSelector"]["matchLabels"] == {"danlu.ai/kind": "train", "danlu.ai/name": "topics", "ray.io/node-type": "worker"}
    (made,) = render(service(spread_over="zone"))
    (spread,) = containers(made["spec"])["worker"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"]["danlu.ai/kind"] == "serve"
