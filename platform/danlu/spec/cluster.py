"""Where a job or a service runs on Kubernetes: its pods, their nodes, queues, limits and secrets. Read by danlu.k8s and the chart."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import MEMORY, NonNegativeInt, PositiveInt, Spec

KubeName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""The name of an object: a DNS subdomain."""
Namespace = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
"""The name of a namespace: a DNS label."""
LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
QueueName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$")]
"""The name of a queue, which stands in a label: 63 at most."""
Bytes = Annotated[str, Field(pattern=MEMORY)]
"""Memory as Kubernetes writes it: 512Mi, 64Gi."""
AbsolutePath = Annotated[str, Field(pattern=r"^/[^:]*[^:/]$")]
OWN_PATHS = ("/tmp", "/home/danlu", "/etc/danlu", "/etc/ray-ca", "/etc/ray-tls", "/dev/shm")
"""Where pods have volumes of their own: the rest of their file system is read-only."""
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Toleration(Spec):
    """A taint that the pods put up with."""

    key: LabelKey
    value: LabelValue | None = None
    """Unset: whatever its value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Unset: every effect."""


class SecretEnv(Spec):
    """An environment variable from a Secret that is there already: a hub's token, an object store's keys."""

    name: EnvName
    secret: KubeName
    key: Annotated[str, Field(min_length=1)]


class Volume(Spec):
    """A PersistentVolumeClaim in every pod; with several pods it has to be ReadWriteMany."""

    claim: KubeName
    mount_path: AbsolutePath
    read_only: bool = False


class SecretVolume(Spec):
    """A Secret as files in every pod, read-only: API keys for `auth.keys_file`, a cloud's key file, certificates."""

    secret: KubeName
    mount_path: AbsolutePath


class Head(Spec):
    """The pod of Ray's head and of the job's driver, which reads the rows and writes the bundle. It does no training."""

    cpus: PositiveInt = 2
    memory: Bytes = "8Gi"
    node_selector: dict[str, LabelValue] = {}


class Kueue(Spec):
    """A Kueue LocalQueue (Kueue 0.15 or newer; for services 0.17): all of it starts once there is quota. A service there has a fixed number
    of pods: `min_replicas` and `max_replicas` alike."""

    kind: Literal["kueue"] = "kueue"
    queue: QueueName


class Volcano(Spec):
    """Gang scheduling by Volcano; KubeRay's operator runs with batchScheduler.name=volcano."""

    kind: Literal["volcano"] = "volcano"
    queue: QueueName | None = None


class Yunikorn(Spec):
    """Gang scheduling by Apache YuniKorn; KubeRay's operator runs with batchScheduler.name=yunikorn."""

    kind: Literal["yunikorn"] = "yunikorn"
    queue: Annotated[str, Field(pattern=r"^root(\.[A-Za-z0-9_-]+)*\.[A-Za-z0-9_-]*[A-Za-z0-9]$", max_length=63)]


class Kai(Spec):
    """Gang scheduling by NVIDIA's KAI; KubeRay's operator runs with batchScheduler.name=kai-scheduler."""

    kind: Literal["kai"] = "kai"
    queue: QueueName


class Tls(Spec):
    """Ray's own connections between pods are encrypted, and nobody without a certificate of this CA takes part. Each pod makes its own, for
    its address, when it starts. What training's workers exchange by NCCL or gloo is not Ray's: that is the network's to encrypt."""

    ca_secret: KubeName
    """A Secret with the CA's tls.crt and tls.key, as cert-manager writes it for a Certificate with isCA. Who can read it can take part."""


Scheduler = Annotated[Kueue | Volcano | Yunikorn | Kai, Field(discriminator="kind")]


class _Cluster(Spec):
    image: Annotated[str, Field(min_length=1)]
    """The image of every pod: Danlu and its libraries, as ops/docker/Dockerfile builds it."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    image_pull_secrets: list[KubeName] = []
    namespace: Namespace | None = None
    """Unset: that of the kubeconfig's context, or of the Helm release."""
    service_account: KubeName | None = None
    """Also what an object store knows the pods by (workload identity), so that no key has to stand in a Secret."""

    memory: Bytes = "16Gi"
    """Of one worker pod; its shared memory counts."""
    shared_memory: Bytes | None = None
    """/dev/shm of every pod, for Ray's object store and for NCCL; unset: what KubeRay gives, as much as the pod's memory."""
    gpu_type: Annotated[LabelValue, Field(min_length=1)] | None = None
    """The workers' nodes' label nvidia.com/gpu.product: NVIDIA-A10G, NVIDIA-H100-80GB-HBM3. How many GPUs follows from the workers."""
    node_selector: dict[str, LabelValue] = {}
    """Labels of the workers' nodes."""
    tolerations: list[Toleration] = []
    """Of every pod; workers with GPUs tolerate nvidia.com/gpu besides."""
    head: Head = Head()

    priority_class: KubeName | None = None
    scheduler: Scheduler | None = None
    """Who starts the pods: a queue, or a scheduler that starts all of them or none. Unset: Kubernetes' own, one by one."""

    env: dict[str, str] = {}
    """For the libraries: HF_ENDPOINT, NCCL_SOCKET_IFNAME, AWS_ENDPOINT_URL, OTEL_EXPORTER_OTLP_ENDPOINT. Of Danlu's own there is only
    DANLU_LOG_FORMAT."""
    secret_env: list[SecretEnv] = []
    volumes: list[Volume] = []
    """`storage:` is a folder in one of them, or an object store's URI."""
    tls: Tls | None = None
    """Unset: Ray's connections are as open as the network they are on; its dashboard asks for a token in any case."""
    secret_volumes: list[SecretVolume] = []
    """They follow their Secrets within a minute or so: a key that is made or revoked needs no new pods."""

    @model_validator(mode="after")
    def _shared_memory_is_part_of_memory(self) -> Self:
        if self.shared_memory is not None and in_bytes(self.shared_memory) >= min(in_bytes(self.memory), in_bytes(self.head.memory)):
            raise ValueError(
                f"shared_memory={self.shared_memory} is part of a pod's memory and leaves nothing of memory={self.memory} or "
                f"head.memory={self.head.memory}; raise them, or lower it"
            )
        return self

    @model_validator(mode="after")
    def _every_mount_has_its_own_path(self) -> Self:
        paths = [*(one.mount_path for one in self.volumes), *(one.mount_path for one in self.secret_volumes)]
        taken = [*OWN_PATHS, *paths]
        if twice := next((path for path in paths if taken.count(path) > 1), None):
            raise ValueError(f"mount_path={twice} is taken; each volume needs a path of its own, and the pods' are {', '.join(OWN_PATHS)}")
        return self

    @model_validator(mode="after")
    def _every_variable_has_one_value(self) -> Self:
        names = [*self.env, *(one.name for one in self.secret_env)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is set twice by env and secret_env; an API server takes each variable once")
        return self


class Ttl(Spec):
    """The Ray cluster is deleted so long after the job's end; the job, its status and its last log lines stay."""

    kind: Literal["ttl"] = "ttl"
    ttl_seconds_after_finished: NonNegativeInt = 300


class Rules(Spec):
    """By how the job ended (KubeRay's deletionRules; its operator needs the feature gate RayJobDeletionPolicy). Not for Kueue. What is
    cancelled lets its pods go at once. What is stopped past Danlu, on its Ray cluster, has no rule: it keeps them until it is cancelled."""

    kind: Literal["rules"] = "rules"
    after_success_s: NonNegativeInt = 0
    """The cluster goes so long after a success."""
    workers_after_failure_s: NonNegativeInt = 0
    """The workers, and the GPUs with them, go so long after a failure."""
    head_after_failure_s: NonNegativeInt = 86_400
    """The head stays so long after a failure, for its logs and dashboard."""

    @model_validator(mode="after")
    def _workers_go_first(self) -> Self:
        if self.workers_after_failure_s > self.head_after_failure_s:
            raise ValueError(
                f"workers_after_failure_s={self.workers_after_failure_s} is more than head_after_failure_s={self.head_after_failure_s}; "
                "the workers go first"
            )
        return self


Cleanup = Annotated[Ttl | Rules, Field(discriminator="kind")]

Spot = Literal["gke", "eks", "karpenter", "aks"]


class JobCluster(_Cluster):
    """The pods of a training job: a head, and as many workers as the job's workers need."""

    workers_per_pod: PositiveInt = 1
    """Training workers that share a pod, and so a node's NVLink: 8 on a node with 8 GPUs. CPUs and GPUs of a pod follow from it."""
    same_topology: LabelKey | None = None
    """Node label whose value is the same for all workers' nodes: topology.kubernetes.io/zone, a rack or a block of one network."""
    spot: Spot | None = None
    """Workers on nodes that can be taken away, as this provider labels them. The head stays off them, and holds what is known."""

    pre_running_deadline_s: PositiveInt | None = None
    """Fail if the job has not begun to run so long after its pods were asked for."""
    active_deadline_s: PositiveInt | None = None
    """Fail if a try takes longer, from when its pods are asked for. What has failed by it is not tried again."""
    backoff_limit: NonNegativeInt = 0
    """How often a failed job is tried again, on new pods. It goes on from the last checkpoint under `storage`."""
    cleanup: Cleanup = Ttl()

    @model_validator(mode="after")
    def _a_queue_deletes_the_cluster(self) -> Self:
        if isinstance(self.scheduler, Kueue) and isinstance(self.cleanup, Rules):
            raise ValueError("cleanup.kind=rules does not go with scheduler.kind=kueue, which suspends jobs; cleanup.kind=ttl does")
        return self


class NewCluster(Spec):
    """A changed service comes up on a second set of pods and takes over at once: for a while it needs twice the GPUs."""

    kind: Literal["new_cluster"] = "new_cluster"


class Incremental(Spec):
    """A changed service comes up on a second set of pods, and traffic moves over step by step. Needs the Gateway API, the feature gate
    RayServiceIncrementalUpgrade of KubeRay's operator, and requests that come by the Gateway it makes, NAME-gateway: no others move."""

    kind: Literal["incremental"] = "incremental"
    gateway_class: KubeName
    step_size_percent: Annotated[int, Field(ge=1, le=100)] = 25
    """Traffic that moves at once."""
    interval_s: PositiveInt = 30
    """Time between two steps."""
    max_surge_percent: Annotated[int, Field(ge=1, le=100)] = 100
    """How much of the new service is up beside the old at most."""

    @model_validator(mode="after")
    def _a_step_has_room(self) -> Self:
        if self.step_size_percent > self.max_surge_percent:
            raise ValueError(
                f"step_size_percent={self.step_size_percent} is more than max_surge_percent={self.max_surge_percent}, and requests move to "
                "pods that are up; lower it, or raise max_surge_percent"
            )
        return self


class InPlace(Spec):
    """Pods are never replaced: a change of bundle, limits or scaling reaches them, a change of image or resources is left out."""

    kind: Literal["in_place"] = "in_place"


Upgrade = Annotated[NewCluster | Incremental | InPlace, Field(discriminator="kind")]


class Redis(Spec):
    """Ray's head keeps its state in this Redis, so that replicas answer on while the head is replaced."""

    address: Annotated[str, Field(min_length=1)]
    """host:port"""
    password_secret: KubeName | None = None
    """A Secret with the key `password`."""


class ServiceCluster(_Cluster):
    """The pods of a service: a head, and as many workers as there are replicas."""

    replicas_per_pod: PositiveInt = 1
    spread_over: LabelKey | None = None
    """Node label over whose values the pods are spread: kubernetes.io/hostname, topology.kubernetes.io/zone."""
    upgrade: Upgrade = NewCluster()
    redis: Redis | None = None


def in_bytes(quantity: str) -> int:
    """64Gi -> 68719476736."""
    return int(quantity[:-2]) << {"Mi": 20, "Gi": 30, "Ti": 40}[quantity[-2:]]
