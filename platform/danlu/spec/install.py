"""What a Helm release of charts/danlu is: specs of jobs and services, verbatim, and what they need around them."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from danlu.spec.base import PositiveInt, Spec
from danlu.spec.cluster import Bytes, KubeName, Namespace
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob


def _a_network(cidr: str) -> str:
    try:
        return str(ip_network(cidr))
    except ValueError as error:
        raise ValueError(f"{error}; 10.0.0.0/8 or fd00::/8 are such networks") from error


Cidr = Annotated[str, Field(pattern=r"^[0-9a-fA-F:.]+/[0-9]{1,3}$"), AfterValidator(_a_network)]


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
    """Its name, for `cluster.volumes` of a spec."""
    size: Bytes = "100Gi"
    storage_class: KubeName | None = None
    """Unset: the cluster's default."""
    access_modes: list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]] = ["ReadWriteMany"]
    """ReadWriteMany where pods on several nodes write; ReadWriteOnce is for one node."""


class ApiKeys(Spec):
    """A Secret with API keys, for services that name it in `cluster.secret_volumes` and its file in `auth.keys_file`."""

    secret: KubeName
    """Its name, for `cluster.secret_volumes` of a spec."""
    keys: Annotated[str, Field(min_length=1)]
    """The text of what `danlu keys create --file keys.json` writes: hashes, never keys. --set-file 'api_keys[0].keys=keys.json'"""


class Queue(Spec):
    """A Kueue LocalQueue, and the ClusterQueue's name that holds its quota."""

    name: KubeName
    """For `cluster.scheduler.queue` of a spec."""
    cluster_queue: KubeName
    """One of `cluster_queues`, or one that is there already."""


class PriorityClass(Spec):
    """A PriorityClass, for `cluster.priority_class` of specs: which pods make room for which, and who waits behind whom in a queue."""

    name: KubeName
    """For `cluster.priority_class` of a spec."""
    value: Annotated[int, Field(ge=-1_000_000_000, le=1_000_000_000)]
    """The higher one goes first."""
    preempts: bool = True
    """Whether its pods may push out those of a lower one; without it they only stand before them."""


class ClusterQueue(Spec):
    """A Kueue ClusterQueue with its ResourceFlavor: a quota, in which jobs of higher priority suspend those of lower."""

    name: KubeName
    """For `queues[].cluster_queue`; also the ResourceFlavor's."""
    cpus: PositiveInt
    """Cores that jobs may have at once."""
    memory: Bytes
    gpus: PositiveInt | None = None
    """nvidia.com/gpu that jobs may have at once; unset: they are not counted, and a job with GPUs is not let in."""
    node_labels: dict[str, str] = {}
    """Of the nodes that the quota counts: nvidia.com/gpu.product."""
    cohort: KubeName | None = None
    """ClusterQueues of one cohort lend each other what they do not use, and take it back from lower priorities."""


class _Gateway(Spec):
    service: KubeName
    """The name of one of `services`."""
    host: Annotated[str, Field(min_length=1)]
    """The name that clients ask for: api.example.com."""
    name: KubeName | None = None
    """Of the Ingress or the route. Unset: that of the service, which a second one of its kind cannot have."""
    annotations: dict[str, str] = {}
    """What its controller or an issuer of certificates reads: cert-manager.io/cluster-issuer."""


class Ingress(_Gateway):
    """An Ingress. Long answers want a long timeout of its class: nginx.ingress.kubernetes.io/proxy-read-timeout."""

    kind: Literal["ingress"] = "ingress"
    class_name: KubeName | None = None
    """The IngressClass; unset: the cluster's default."""
    tls_secret: KubeName | None = None
    """The certificate of `host`."""


class HttpRoute(_Gateway):
    """A route of a Gateway that is there, whose listener has the certificate."""

    kind: Literal["http_route"] = "http_route"
    gateway: KubeName
    """The Gateway's name."""
    gateway_namespace: Namespace | None = None
    """Unset: that of the service. Another one's listener has to allow routes from here."""


Gateway = Annotated[Ingress | HttpRoute, Field(discriminator="kind")]


class Egress(Spec):
    """TCP ports that pods may reach, of every address or of some."""

    ports: Annotated[list[Annotated[int, Field(ge=1, le=65_535)]], Field(min_length=1)]
    """After a Service's translation: a Service at 80 whose pods listen at 9000 is 9000."""
    cidrs: list[Cidr] = []
    """169.254.170.23/32, fd00:ec2::23/128. Unset: every address, in the cluster and outside."""


class Network(Spec):
    """NetworkPolicies. Nothing comes in but among the pods of a job or service, from the ingress and from Prometheus; nothing goes out but
    among those pods, to DNS, to what their specs name (`cluster.redis`, the URLs in `cluster.env`: their ports), and by `egress`."""

    enabled: bool = True
    """Without them every pod of the cluster reaches these, and these reach everything."""
    ingress_namespace: Namespace | None = None
    """The namespace that requests to services come from; unset: every namespace, to the serving port."""
    monitoring_namespace: Namespace = "monitoring"
    """Prometheus' namespace: it scrapes every pod."""
    operator_namespace: Namespace = "kuberay-operator"
    """KubeRay's operator asks the head for its state."""
    egress: list[Egress] | None = [
        Egress(ports=[443, 6443, 6379]),
        Egress(ports=[80, 988], cidrs=["169.254.169.252/32", "169.254.169.254/32", "169.254.170.23/32"]),
    ]
    """Where else pods may go. The default is made to break no install, since no chart knows these addresses: of object stores, hubs and the
    API server (443, 6443: a service's autoscaler asks it), of a Redis that people's own services name (6379), and in the second rule the
    servers of the clouds' workload identity. Closed further, name your cidrs for each of those that you use. null: everywhere."""


class Quota(Spec):
    """A ResourceQuota of the namespace: what its pods may ask for, all together. Unset: as much as there is."""

    gpus: PositiveInt | None = None
    """nvidia.com/gpu."""
    cpus: PositiveInt | None = None
    """Cores."""
    memory: Bytes | None = None


class Monitoring(Spec):
    """Objects for the Prometheus operator and for Grafana's sidecar. The rules and dashboards are those in the chart's files/. A PodMonitor
    and no ServiceMonitor: workers have no Service, and the one of a head would leave out what they count."""

    pod_monitor: bool = False
    """A PodMonitor of all pods of jobs and services, also of those that people submit."""
    rules: bool = False
    """A PrometheusRule with the alerts, each with its runbook."""
    dashboards: bool = False
    """A ConfigMap for each dashboard, with the label grafana_dashboard."""
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

    @model_validator(mode="after")
    def _no_two_of_one_name(self) -> Self:
        """Of two objects of one name the second takes the place of the first, and nothing says so."""
        namespaces = {one.name: one.cluster.namespace if one.cluster else None for one in self.services}
        named = [("jobs", one.name, one.cluster.namespace if one.cluster else None) for one in self.jobs]
        named += [("services", one.name, one.cluster.namespace if one.cluster else None) for one in self.services]
        named += [(f"gateways of kind {one.kind}", one.name or one.service, namespaces.get(one.service)) for one in self.gateways]
        if twice := next((one for one in named if named.count(one) > 1), None):
            raise ValueError(f"two {twice[0]} are named {twice[1]}; give one of them a name of its own")
        return self
