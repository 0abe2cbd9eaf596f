"""What is told of a machine and a cluster, each thing that can be missing once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from danlu import doctor
from danlu.cli import app
from danlu.errors import SpecError

REVIEW = "post /apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
KUEUE = "get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/workloads.kueue.x-k8s.io"
PODMONITORS = "get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/podmonitors.monitoring.coreos.com"
GATEWAYS = "get /apis/gateway.networking.k8s.io"
CRD = "get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayjobs.ray.io"


def found(
    api: Any, *, allowed: bool = True, fields: tuple[str, ...] = doctor.NEW_FIELDS, kueue: str = "v1beta2", gateways: bool = True
) -> dict[str, doctor.Finding]:
    """Findings of the cluster by name."""
    api.answer(REVIEW, {"status": {"allowed": allowed}})
    schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": {name: {} for name in fields}}}}}
    api.answer(CRD, {"spec": {"versions": [{"name": "v1", "schema": schema}]}})
    api.answer(KUEUE, {"spec": {"versions": [{"name": kueue, "served": True}]}})
    api.answer(GATEWAYS, {"kind": "APIGroup"}) if gateways else None
    api.answer(PODMONITORS, {"metadata": {"annotations": {"operator.prometheus.io/version": "0.88.1"}}})
    return {one.what: one for one in doctor._kubernetes(None, None)}


def test_a_cluster_that_has_everything(api: Any) -> None:
    every = found(api)
    assert {one.verdict for one in every.values()} == {"ok"}
    assert "0.88.1" in every["Prometheus"].found


def test_a_cluster_without_the_gateway_api_is_told_what_would_need_it(api: Any) -> None:
    one = found(api, gateways=False)["Gateway API"]
    assert (one.verdict, one.found[:5]) == ("ok", "none,")
    assert "cluster.upgrade.kind=incremental" in one.found
    assert found(api)["Gateway API"].found == "there is one"


def test_a_right_that_is_missing_is_named_with_the_role_that_gives_it(api: Any) -> None:
    one = found(api, allowed=False)["Kubernetes"]
    assert one.verdict == "missing"
    assert "create rayjobs" in one.found
    assert "pods/log" in one.found
    assert "access.groups" in one.fix


def test_an_older_kuberay_is_told_by_the_fields_it_lacks(api: Any) -> None:
    one = found(api, fields=("activeDeadlineSeconds",))["KubeRay"]
    assert one.verdict == "warning"
    assert "no preRunningDeadlineSeconds" in one.found
    assert "--server-side" in one.fix


def test_an_older_kueue_is_told_by_the_version_it_serves(api: Any) -> None:
    one = found(api, kueue="v1beta1")["Kueue"]
    assert (one.verdict, one.found) == ("warning", "older than 0.15: it serves v1beta1")
    assert "Kueue 0.15" in one.fix


def test_a_cluster_without_kuberay(api: Any) -> None:
    api.answer(REVIEW, {"status": {"allowed": True}})
    api.answer(CRD, 404, {"reason": "NotFound", "message": "not found"})
    api.answer(PODMONITORS, 404, {"reason": "NotFound", "message": "not found"})
    api.answer(KUEUE, 404, {"reason": "NotFound", "message": "not found"})
    (_, kuberay, kueue, prometheus, _) = doctor._kubernetes(None, None)
    assert (kuberay.verdict, kuberay.what) == ("missing", "KubeRay")
    assert (kueue.verdict, kueue.found) == ("ok", "none, which cluster.scheduler.kind=kueue would need")
    assert (prometheus.verdict, "kube-prometheus-stack" in prometheus.fix) == ("warning", True)


def test_without_a_cluster_a_machine_is_well_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nowhere"))
    (one,) = doctor._kubernetes(None, None)
    assert one.verdict == "warning"
    (one,) = doctor._kubernetes("somewhere", None)
    assert one.verdict == "missing", "a context that was asked for"


def test_where_jobs_are_to_run_there_a_cluster_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nowhere"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    (one,) = doctor._kubernetes(None, None, needed=True)
    assert (one.what, one.verdict) == ("Kubernetes", "missing")
    result = CliRunner().invoke(app, ["doctor", "--on", "ray://host"])
    assert isinstance(result.exception, SpecError)
    assert result.exception.where == "--on"


def test_a_machine_without_a_compiler_is_told_what_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "nosuch-g++")
    (one,) = doctor._kernels()
    assert one.verdict == "warning"
    assert "nosuch-g++ is not on the PATH" in one.found
    monkeypatch.setenv("CXX", "sh")
    (one,) = doctor._kernels()
    assert (one.verdict, one.fix) == ("ok", "")


def test_the_table_says_what_to_do_and_the_exit_code_whether_something_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, ["doctor", "--storage", str(tmp_path / "runs")])
    assert result.exit_code == 0, result.output
    for line in (r"ok +Python +3\.", r"ok +torch +2\.", r"ok +Ray +2\.", r"ok +storage ", r"warning +model hub ", "try: .*HF_ENDPOINT"):
        assert re.search(line, result.output), line
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["doctor", "--storage", str(tmp_path / "file" / "runs")])
    assert result.exit_code == 3
    assert re.search(r"missing +storage ", result.output)
