"""Which cluster: by the kubeconfig, or inside a pod by its service account. A connection, or what is wrong with the way to it."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass

from kubernetes import config
from kubernetes.client import ApiClient, Configuration
from kubernetes.config.config_exception import ConfigException

from danlu.errors import ClusterError

NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LOG_IN = "log in again (your cloud's CLI, or a new kubeconfig)"


@dataclass(frozen=True)
class Kube:
    """A connection: whose cluster, and the namespace that objects without one go to."""

    api: ApiClient
    namespace: str
    context: str


def connect(context: str | None = None, namespace: str | None = None) -> Kube:
    """By the kubeconfig ($KUBECONFIG or ~/.kube/config), or inside a pod by its service account."""
    if namespace is not None and not NAMESPACE.fullmatch(namespace):
        raise ClusterError(
            f"{namespace!r} cannot be a namespace's name", where="--namespace", fix="lower-case letters, digits and dashes, 63 at most"
        )
    try:
        # As config.list_kube_config_contexts, which cannot do without a current one.
        file = config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION
        loader = config.kube_config._get_kube_config_loader(filename=file, active_context=context)
        contexts, active = loader.list_contexts(), loader.current_context
    except ConfigException as error:
        return _without_a_context(context, namespace, error)
    except Exception as error:  # it reads what it has found as it comes, whatever that is
        raise ClusterError(f"{file} is no kubeconfig: {_first_line(error)}", where="kubeconfig", fix="kubectl config view") from error
    by_name = {one["name"]: one for one in contexts}
    chosen = by_name[context or active["name"]]
    try:
        loader.load_and_set(loaded := _configuration())
    except Exception as error:  # it also runs into what is no base64, no file, or a login library's own errors
        raise ClusterError(f"context {chosen['name']!r} cannot be used: {_first_line(error)}", where="kubeconfig") from error
    if not re.match(r"https?://[^/]", str(loaded.host)):
        told = f"context {chosen['name']!r} cannot be used: its cluster's server is {loaded.host!r}"
        raise ClusterError(told, where="kubeconfig", fix="server: https://HOST:PORT")
    user = loader._user.value if loader._user is not None else {}
    if loader._user is None and (named := chosen["context"].get("user")):  # it would ask as nobody
        raise ClusterError(f"context {chosen['name']!r} cannot be used: the file has no user {named!r}", where="kubeconfig", fix=LOG_IN)
    if "exec" in user and not (loaded.api_key or loaded.cert_file):  # it has logged why, and goes on as nobody
        command = " ".join([user["exec"]["command"], *(user["exec"].get("args") or [])])
        raise ClusterError(f"no credentials from `{command}`", where="kubeconfig", fix="run it by hand, and log in as it says")
    return Kube(ApiClient(loaded), namespace or chosen["context"].get("namespace") or "default", chosen["name"])


def _without_a_context(context: str | None, namespace: str | None, error: ConfigException) -> Kube:
    """What there is where the kubeconfig has no such context, or no current one, or is not there."""
    names, current = _contexts()
    if context is not None and names and context not in names:
        near = difflib.get_close_matches(context, names, n=1, cutoff=0.75)
        fix = f"did you mean {near[0]}? There is: {', '.join(names)}" if near else f"one of: {', '.join(names)}"
        raise ClusterError(f"the kubeconfig has no context {context!r}", where="--context", fix=fix) from error
    if (chosen := context or current) in names:
        raise ClusterError(f"context {chosen!r} cannot be used: {_first_line(error)}", where="kubeconfig") from error
    if not names:
        return _inside_a_pod(context, namespace, error)
    named = f"the kubeconfig's current context is {current!r}, which it does not have"
    told = named if current else "the kubeconfig names no current context"
    fix = f"--context, one of: {', '.join(names)}; or kubectl config use-context"
    raise ClusterError(told, where="kubeconfig", fix=fix) from error


def _contexts() -> tuple[list[str], str | None]:  # the current one, too
    try:
        merged = config.kube_config.KubeConfigMerger(config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION).config
        found = {} if merged is None else merged.value
        return sorted(one["name"] for one in found.get("contexts") or []), found.get("current-context")
    except (ConfigException, OSError):  # no such file, or a context without a name
        return [], None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _inside_a_pod(context: str | None, namespace: str | None, error: Exception) -> Kube:
    try:
        config.load_incluster_config(inside := _configuration())
    except ConfigException:
        places = str(config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION).split(os.pathsep)
        there = [place for place in places if os.path.exists(os.path.expanduser(place))]
        raise ClusterError(
            f"there is no kubeconfig that can be read: {error}"
            if there
            else f"there is no kubeconfig: no file {', no file '.join(places)}",
            where="kubeconfig",
            fix="export KUBECONFIG=/path/to/kubeconfig; or --on local runs it on this machine",
        ) from error
    if context is not None:
        raise ClusterError(f"inside a pod there is no context {context!r}", where="--context", fix="leave it out")
    with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace", encoding="utf-8") as file:
        return Kube(ApiClient(inside), namespace or file.read().strip(), "in-cluster")


def _configuration() -> Configuration:
    found = Configuration()
    found.retries = False  # ours know what may be asked again
    return found
