"""What a Helm release of charts/danlu is: specs of jobs and services, verbatim, and what they need around them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from danlu.spec.base import PositiveInt, Spec
from danlu.spec.cluster import Bytes, KubeName, Namespace
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob


class Access(Spec):
    """The pods' service account, and a Role for people and pipelines that submit jobs."""

    service_account: KubeName | None = None
    """A ServiceAccount to make; name it in `cluster.service_account` of a spec."""
    annotations: dict[str, str] = {}
    """Of the ServiceAccount: eks.amazonaws.com/role-arn, iam.gke.io/gcp-service-account."""
    groups: list[str] = []
    """Groups of people who may submit, see and delete jobs and services in this namespace, and nothing else."""


class Storage(Spec):
    """A PersistentVolumeClaim. For runs and bundles, where there is no object store. It outlives the release."""

    claim: KubeName
    size: Bytes = "100Gi"
    storage_class: KubeName | None = None
    access_modes: list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]] = ["ReadWriteMany"]


class ApiKeys(Spec):
    """A Secret with API keys, for services that name it in `cluster.secret_volumes` and its file in `auth.keys_file`."""

    secret: KubeName
    keys: Annotated[str, Field(min_length=1)]
    """The text of what `danlu keys create --file keys.json` writes: hashes, never keys. --set-file 'api_keys[0].keys=keys.json'"""


class Queue(Spec):
    """A Kueue LocalQueue, and the ClusterQueue's name that holds its quota."""

    name: KubeName
    cluster_queue: KubeName


class PriorityClass(Spec):
    """A PriorityClass, for `cluster.priority_class` of specs: which pods make room for which, and who waits behind whom in a queue."""

    name: KubeName
    value: Annotated[int, Field(ge=-1_000_000_000, le=1_000_000_000)]
    """The higher one goes first."""
    preempts: bool = True
    """Whether its pods may push out those of a lower one; without it they only stand before them."""


class ClusterQueue(Spec):
    """A Kueue ClusterQueue with its ResourceFlavor: a quota, in which jobs of higher priority suspend those of lower."""

    name: KubeName
    cpus: PositiveInt
    memory: Bytes
    gpus: PositiveInt | None = None
    node_labels: dict[str, str] = {}
    """Of the nodes that the quota counts: nvidia.com/gpu.product."""
    cohort: KubeName | None = None
    """ClusterQueues of one cohort lend each other what they do not use, and take it back from lower priorities."""


class _Gateway(Spec):
    service: KubeName
    """The name of one of `services`."""
    host: Annotated[str, Field(min_length=1)]
    annotations: dict[str, str] = {}


class Ingress(_Gateway):
    """An Ingress. Long answers want a long timeout of its class: nginx.ingress.kubernetes.io/proxy-read-timeout."""

    kind: Literal["ingress"] = "ingress"
    class_name: KubeName | None = None
    tls_secret: KubeName | None = None
    """The certificate of `host`."""


class HttpRoute(_Gateway):
    """A route of a Gateway that is there, whose listener has the certificate."""

    kind: Literal["http_route"] = "http_route"
    gateway: KubeName
    gateway_namespace: Namespace | None = None
    """Unset: that of the service. Another one's listener has to allow routes from here."""


Gateway = Annotated[Ingress | HttpRoute, Field(discriminator="kind")]


class Network(Spec):
    """NetworkPolicies: nothing comes in but among the pods of a job or service, from the ingress and from Prometheus."""

    enabled: bool = True
    ingress_namespace: Namespace | None = None
    """The namespace that requests to services come from; unset: every namespace, to the serving port."""
    monitoring_namespace: Namespace = "monitoring"
    operator_namespace: Namespace = "kuberay-operator"
    """KubeRay's operator asks the head for its state."""


class Quota(Spec):
    """A ResourceQuota of the namespace."""

    gpus: PositiveInt | None = None
    cpus: PositiveInt | None = None
    memory: Bytes | None = None


class Monitoring(Spec):
    """Objects for the Prometheus operator and for Grafana's sidecar. The rules and dashboards are those in the chart's files/. A PodMonitor
    and no ServiceMonitor: workers have no Service, and the one of a head would leave out what they count."""

    pod_monitor: bool = False
    rules: bool = False
    dashboards: bool = False
    labels: dict[str, str] = {}
    """What the Prometheus or Grafana selects by: release: kube-prometheus-stack."""


class Install(Spec):
    """The values of charts/danlu."""

    jobs: list[TrainJob] = []
    """TrainJob specs, each as in its own file, with `cluster:`."""
    services: list[Service] = []
    """Service specs, each as in its own file, with `cluster:`."""
    access: Access = Access()
    api_keys: list[ApiKeys] = []
    """Secrets made from values. One that is there already is named in `cluster.secret_volumes` alone."""
    storage: Storage | None = None
    model_cache: Storage | None = None
    """Another, for models of a hub: mount it with `cluster.volumes` and name its folder in `cluster.env`, {HF_HOME: /models}."""
    priority_classes: list[PriorityClass] = []
    """Of the whole cluster, as are the next ones: whoever installs them may make such objects."""
    cluster_queues: list[ClusterQueue] = []
    queues: list[Queue] = []
    gateways: list[Gateway] = []
    """How services are reached from outside. One with `cluster.upgrade.kind: incremental` has a Gateway of KubeRay's, and none here."""
    network: Network = Network()
    quota: Quota | None = None
    disruption_budget: bool = True
    """PodDisruptionBudgets: of a service, as many pods as its least replicas stay up; of a job, all."""
    monitoring: Monitoring = Monitoring()
    test_image: Annotated[str, Field(min_length=1)] = "curlimages/curl:8.11.1"
    """Of the pod with which `helm test` asks each service for its health."""
