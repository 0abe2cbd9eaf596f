"""What a RayJob or a RayService does and why, from its own status, its pods, their events and its queue. Pure: objects in, words out."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, Literal

from danlu.errors import ClusterError
from danlu.k8s.pods import Object

State = Literal["queued", "starting", "running", "retrying", "succeeded", "failed", "cancelled"]
ENDED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})
RAY_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""A Ray job's own last states. Its RayJob is still `Running` then, until the pod that follows its log has ended too."""
LAST_LINES = 12

Phase = Literal["starting", "running", "updating", "failing"]

NOT_MADE = {
    "violates PodSecurity": "cluster.volumes and cluster.image as the namespace's Pod Security takes them",
    "no PriorityClass": "cluster.priority_class, one of: kubectl get priorityclasses",
    "serviceaccount": "cluster.service_account must exist in that namespace: access.service_account of charts/danlu makes one",
    "must specify": "a LimitRange in that namespace gives defaults to what KubeRay adds to the pods",
}
"""What an API server says that lets no pod be made, and what would help."""
UNSEEN = "if it stays so, KubeRay's operator does not run, or does not watch this namespace: kubectl get deployments -A | grep kuberay"
"""What may help where KubeRay has written no status at all."""


@dataclass(frozen=True)
class JobStatus:
    """A job: its state, why it is in it, what would help, and of a failed one the last lines of its log."""

    name: str
    state: State
    why: str = ""
    fix: str = ""
    created: str = ""
    ended: str = ""
    log: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """What it has left in its storage."""

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.name}: {self.state}" + (f", {self.why}" if self.why else "")]
        lines += [f"  try: {self.fix}"] if self.fix else []
        return "\n".join([*lines, *(f"  | {line}" for line in self.log), *(f"  left: {uri}" for uri in self.files)])


@dataclass(frozen=True)
class ServiceStatus:
    """A service: its phase, why, how many addresses answer, and the bundle that is asked for."""

    name: str
    phase: Phase
    why: str = ""
    fix: str = ""
    endpoints: int = 0
    of: Literal["pods", "replicas"] = "pods"

    def text(self) -> str:
        """For a terminal."""
        told = f"{self.name}: {self.phase}, {self.endpoints} {self.of} answer" + (f"; {self.why}" if self.why else "")
        return told + (f"\n  try: {self.fix}" if self.fix else "")


def job_status(
    job: Object, pods: Sequence[Object] = (), events: Sequence[Object] = (), workloads: Sequence[Object] = (), log: Sequence[str] = ()
) -> JobStatus:
    """A RayJob's state. `log` is the end of its driver's log."""
    name, found = job["metadata"]["name"], job.get("status") or {}
    times = {"created": job["metadata"].get("creationTimestamp", ""), "ended": found.get("endTime") or ""}
    if job["metadata"].get("deletionTimestamp"):
        return JobStatus(name, "cancelled", "it is being deleted", **times)
    match found.get("jobDeploymentStatus") or "":
        case "Complete" if found.get("jobStatus") == "SUCCEEDED":
            return JobStatus(name, "succeeded", **times)
        case "Complete" if found.get("jobStatus") == "STOPPED":
            return JobStatus(name, "cancelled", *_why_stopped(job), **times)
        case "Complete" | "Failed" | "ValidationFailed":
            why, fix = _why_failed(found, pods, log)
            return JobStatus(name, "failed", why, fix, log=tuple(log[-LAST_LINES:]), **times)
        case deployment if job["spec"].get("suspend") and not queue_of(job):
            why = "it is suspended" if deployment in ("", "Suspended") else "its pods are being ended"
            return JobStatus(name, "cancelled", why, f"danlu jobs resume {name}", **times)
        case "Suspended" | "Suspending" if not queue_of(job):
            return JobStatus(name, "starting", "it was suspended, and goes on", **times)
        case "Retrying":
            return JobStatus(name, "retrying", f"attempt {found.get('failed', 0) + 1} of {job['spec'].get('backoffLimit', 0) + 1}", **times)
        case "Running" if found.get("jobStatus") == "RUNNING":
            return JobStatus(name, "running", _memory_kill(pods)[0], **times)
        case "Running" if found.get("jobStatus") in RAY_ENDED:
            return JobStatus(name, "running", f"it has ended ({found['jobStatus']}), and its log is being closed", **times)
        case _ if job["spec"].get("suspend") and (queue := queue_of(job)):
            return JobStatus(name, "queued", _why_queued(queue, job, workloads), **times)
        case _:
            why, fix = _why_starting(pods, events, {("RayJob", name), ("Job", name), ("RayCluster", found.get("rayClusterName"))})
            return JobStatus(name, "starting", why, fix if found else fix or UNSEEN, **times)


def service_status(
    service: Object, pods: Sequence[Object] = (), events: Sequence[Object] = (), workloads: Sequence[Object] = ()
) -> ServiceStatus:
    """A RayService's phase."""
    name, found = service["metadata"]["name"], service.get("status") or {}
    conditions = {one["type"]: one for one in found.get("conditions", [])}
    ready = conditions.get("Ready", {}).get("status") == "True" or found.get("serviceStatus") == "Running"
    endpoints = int(found.get("numServeEndpoints") or 0)
    clusters = [found.get(which) or {} for which in ("pendingServiceStatus", "activeServiceStatus")]
    makers = {("RayService", name), *(("RayCluster", cluster.get("rayClusterName")) for cluster in clusters)}
    told = [
        f"{application}: {one.get('message', '').strip().splitlines()[-1]}"
        for cluster in clusters
        for application, one in (cluster.get("applicationStatuses") or {}).items()
        if one.get("status") in ("DEPLOY_FAILED", "UNHEALTHY") and one.get("message", "").strip()
    ]
    if told:
        return ServiceStatus(name, "failing", told[0], f"danlu services rollback {name}", endpoints)
    if conditions.get("UpgradeInProgress", {}).get("status") == "True":
        why, fix = _why_starting(pods, events, makers)
        return ServiceStatus(name, "updating", why or "new pods take over when they are ready", fix, endpoints)
    if ready:
        return ServiceStatus(name, "running", endpoints=endpoints)
    if (queue := queue_of(service)) and not pods:
        return ServiceStatus(name, "starting", _why_queued(queue, service, workloads), endpoints=endpoints)
    why, fix = _why_starting(pods, events, makers)
    return ServiceStatus(name, "starting", why, fix if found else fix or UNSEEN, endpoints)


def why_of_log(log: Sequence[str], said: str) -> tuple[str, str]:
    """Why a driver ended, by its log, else by what is `said` of it; after which step; and what would help."""
    why = _danlu_error(log) or said.strip().rpartition("\n")[2]
    return "; ".join(part for part in (why, _last_step(log)) if part), _fix_in(log)


def as_json(one: JobStatus | ServiceStatus) -> str:
    """One line of JSON."""
    return json.dumps(asdict(one), ensure_ascii=False)


def not_there(problem: str, name: str, there: Sequence[str], *, where: str, fix: str) -> ClusterError:
    """What to say of a name that no job or service has: the names there are, the nearest first, and the one that was meant."""
    near = [one for one in there if name and name in one] or difflib.get_close_matches(name, there, n=3, cutoff=0.75)
    listed = [*near, *sorted(set(there) - set(near))]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    told = f"; there is: {', '.join(listed[:8])}{more}" if listed else ""
    return ClusterError(f"{problem}{told}", where=where, fix=f"did you mean {near[0]}? Else {fix}" if near else fix)


def queue_of(job: Object) -> str | None:
    """The Kueue queue of a job or a service."""
    queue: str | None = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    return queue


def keeps_its_pods(job: Object) -> bool:
    """Whether a job was stopped through Ray, and no deletion rule lets its pods go: KubeRay has rules for success and for failure alone."""
    found = job.get("status") or {}
    stopped = found.get("jobDeploymentStatus") == "Complete" and found.get("jobStatus") == "STOPPED"
    return stopped and not job["spec"].get("shutdownAfterJobFinishes")


def _why_stopped(job: Object) -> tuple[str, str]:
    name = job["metadata"]["name"]
    if not keeps_its_pods(job):
        return "it was stopped on its Ray cluster", f"danlu jobs resume {name}"
    why = "it was stopped on its Ray cluster, and its pods stay: no deletion rule is for that"
    return why, f"danlu jobs cancel {name} lets them go; danlu jobs resume {name} goes on"


def _why_queued(queue: str, job: Object, workloads: Sequence[Object]) -> str:
    uid = job["metadata"].get("uid")
    for workload in workloads:
        if any(owner.get("uid") == uid for owner in workload["metadata"].get("ownerReferences", [])):
            conditions = {one["type"]: one for one in (workload.get("status") or {}).get("conditions", [])}
            for kind, said in (("Evicted", "put back"), ("QuotaReserved", "behind the quota"), ("Admitted", "not admitted yet")):
                condition = conditions.get(kind, {})
                if condition.get("status") == ("True" if kind == "Evicted" else "False"):
                    return f"{said} in queue {queue}: {condition.get('message', '')}"
    return f"waiting in queue {queue}"


def _why_starting(pods: Sequence[Object], events: Sequence[Object], makers: Set[tuple[str, str | None]]) -> tuple[str, str]:
    """The first thing that keeps a pod from running, or from being made by one of its `makers`, and what would help."""
    for pod in pods:
        for one in _containers(pod):
            waiting = one.get("state", {}).get("waiting") or {}
            if found := _why_waiting(pod, one, waiting):
                return found
        for condition in (pod.get("status") or {}).get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return _why_unscheduled(pod, condition.get("message", ""))
    if found := _why_not_made(pods, events, makers):
        return found
    names = {pod["metadata"]["name"] for pod in pods if (pod.get("status") or {}).get("phase") == "Pending"}
    for event in sorted(events, key=_time_of, reverse=True):
        if event.get("involvedObject", {}).get("name") in names and event.get("reason") in (
            "FailedMount",
            "FailedAttachVolume",
            "FailedCreatePodSandBox",
        ):
            return (
                f"pod {event['involvedObject']['name']}: {event['message']}",
                "the claims, Secrets and ConfigMaps that cluster: names must exist",
            )
    kill, fix = _memory_kill(pods)
    if kill:
        return kill, fix
    if not pods:
        return "KubeRay has made no pods yet", ""
    waits = sum((pod.get("status") or {}).get("phase") != "Running" for pod in pods)
    return (f"{waits} of {len(pods)} pods are not up yet" if waits else f"all {len(pods)} pods are up"), ""


def _why_not_made(pods: Sequence[Object], events: Sequence[Object], makers: Set[tuple[str, str | None]]) -> tuple[str, str] | None:
    """What the API server said to KubeRay, or to the submitter's Job, that wanted to make a pod; None once a pod was made since."""
    newest = max((pod["metadata"].get("creationTimestamp", "") for pod in pods), default="")
    for event in sorted(events, key=_time_of, reverse=True):
        about, reason = event.get("involvedObject", {}), event.get("reason", "")
        told = (about.get("kind"), about.get("name")) in makers and reason.startswith(("FailedCreate", "FailedToCreate", "Invalid"))
        if not told or _time_of(event) < newest:
            continue
        said = event.get("message", "").strip()
        if "exceeded quota" in said:
            quota = "what ends in this namespace makes room: kubectl describe resourcequota; or a smaller job"
            return f"behind the namespace's quota: {said}", quota
        fix = next((fix for mark, fix in NOT_MADE.items() if mark in said), "")
        return (f"KubeRay refuses it: {said}" if reason.startswith("Invalid") else f"its pods cannot be made: {said}"), fix
    return None


def _time_of(event: Object) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or ""


def _why_waiting(pod: Object, container: Object, waiting: Object) -> tuple[str, str] | None:
    name, message = pod["metadata"]["name"], waiting.get("message", "")
    match waiting.get("reason"):
        case "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull":
            return (
                f"pod {name} cannot pull the image {container.get('image')}: {message}",
                "cluster.image as the registry has it; a private one needs cluster.image_pull_secrets",
            )
        case "CreateContainerConfigError" | "CreateContainerError":
            return f"pod {name}: {message}", "the Secrets and keys that cluster.secret_env names must exist"
        case "CrashLoopBackOff":
            return f"pod {name} starts and ends again: {message}", f"kubectl logs {name} -n {pod['metadata'].get('namespace')} --previous"
        case _:
            return None


def _why_unscheduled(pod: Object, message: str) -> tuple[str, str]:
    asked = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
    gpu_type = pod["spec"].get("nodeSelector", {}).get("nvidia.com/gpu.product")
    who = pod["spec"].get("schedulerName", "default-scheduler")
    if "node" not in message and who != "default-scheduler":  # it waits for its queue, or for the others of its gang
        return f"pod {pod['metadata']['name']} is not started by {who} yet: {message}", ""
    what = f"pod {pod['metadata']['name']} fits no node: {message}"
    # Of a node the first thing that is against it is told, and its taints come before its labels.
    taints = [taint for taint in re.findall(r"untolerated taint\(?s?\)? ?\{([^}]*)\}", message) if "node-role.kubernetes.io" not in taint]
    if gpu_type and "affinity/selector" in message and "Insufficient" not in message:
        kubectl = "kubectl get nodes -L nvidia.com/gpu.product says which there are"
        tainted = f", unless those with the taint {taints[0].rstrip(': ')} do, which cluster.tolerations allows" if taints else ""
        return what, f"no node has nvidia.com/gpu.product={gpu_type}{tainted}: {kubectl}"
    if "Insufficient nvidia.com/gpu" in message:
        gpus = int(asked.get("nvidia.com/gpu", 1))
        fewer = f"fewer cluster.workers_per_pod (a pod asks for {gpus} GPUs), or " if gpus > 1 else ""
        return what, f"{fewer}wait for nodes with a GPU that is free: kubectl describe nodes | grep nvidia.com/gpu says who has them"
    if "Insufficient" in message:
        return what, f"a smaller pod (it asks for {asked.get('cpu')} cores and {asked.get('memory')})"
    if "taint" in message:
        return what, "cluster.tolerations for that taint"
    if "persistentvolumeclaim" in message.lower():
        return what, "the claims that cluster.volumes names must exist in that namespace, and be bound: kubectl get pvc"
    return what, ""


def _why_failed(found: Object, pods: Sequence[Object], log: Sequence[str]) -> tuple[str, str]:
    said = found.get("message") or ""
    match found.get("reason"):
        case "DeadlineExceeded":
            return (
                f"it took longer than cluster.active_deadline_s: {said}",
                "the same job goes on from its last checkpoint; raise the limit",
            )
        case "PreRunningDeadlineExceeded":
            return (
                f"it had not begun within cluster.pre_running_deadline_s: {said}",
                "`danlu jobs show` of a new try says what it waits for",
            )
        case "ValidationFailed":
            return f"KubeRay refuses it: {said}", "danlu doctor compares the versions"
    kill, fix = _memory_kill(pods)
    why, fix_of_log = why_of_log(log, kill or said)
    if kill and _danlu_error(log):
        why = f"{why}; {kill}"
    return why or str(found.get("reason") or "no reason is given"), fix or fix_of_log


def _memory_kill(pods: Sequence[Object]) -> tuple[str, str]:
    for pod in pods:
        for one in _containers(pod):
            for state in (one.get("state", {}), one.get("lastState", {})):
                if (state.get("terminated") or {}).get("reason") == "OOMKilled":
                    limit = pod["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("memory", "its limit")
                    role = pod["metadata"].get("labels", {}).get("ray.io/node-type", "a")
                    field = "cluster.head.memory" if role == "head" else "cluster.memory"
                    return (
                        f"{role} pod {pod['metadata']['name']} was killed for using more than {limit} of memory",
                        f"a larger {field}, or a smaller micro_batch_size",
                    )
    return "", ""


def _danlu_error(log: Sequence[str]) -> str:
    """The line that `danlu` ends with after a mistake, which for a lost worker names the rank."""
    return next((line.removeprefix("error: ") for line in reversed(log) if line.startswith("error: ")), "")


def _fix_in(log: Sequence[str]) -> str:
    return next((line.strip().removeprefix("try: ") for line in reversed(log) if line.strip().startswith("try: ")), "")


def _last_step(log: Sequence[str]) -> str:
    steps = [match[0] for line in log if (match := re.search(r"\bstep \d+/\d+", line))]
    return f"after {steps[-1]}" if steps else ""


def _containers(pod: Object) -> list[dict[str, Any]]:
    status = pod.get("status") or {}
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
