"""A Kubernetes API over real HTTP, on kmock: objects with versions, owners, label and field selectors, watches, server-side apply, dry runs
and the errors of a real one. What it is given is checked against KubeRay's CRDs and Kubernetes' schemas.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp.web
import attrs
import kmock
import pytest
import yaml
from kube import core_errors, crd_errors

Object = dict[str, Any]
KINDS = {
    "rayjobs": ("ray.io/v1", "RayJob"),
    "rayservices": ("ray.io/v1", "RayService"),
    "rayclusters": ("ray.io/v1", "RayCluster"),
    "configmaps": ("v1", "ConfigMap"),
    "pods": ("v1", "Pod"),
    "events": ("v1", "Event"),
    "workloads": ("kueue.x-k8s.io/v1beta2", "Workload"),
}


@attrs.frozen
class Refusal(kmock.KubernetesError):  # type: ignore[misc]
    """A Status as API servers write it."""

    status: int
    reason: str
    message: str
    details: Object | None = None


class Handler(kmock.KubernetesScaffold):  # type: ignore[misc]
    """The server's side; scripted answers (`handler["post"][:1] << 500`) come before it."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.store: dict[tuple[str, str, str], Object] = {}
        self.version = 100
        self.watchers: list[asyncio.Queue[Object]] = []
        self.kinds = dict(KINDS)
        for action, serve in (
            ("LIST", self.on_list),
            ("WATCH", self.on_watch),
            ("FETCH", self.on_fetch),
            ("CREATE", self.on_create),
            ("UPDATE", self.on_update),
            ("DELETE", self.on_delete),
        ):
            self.fallback[kmock.action[action]] << serve

    def keep(self, plural: str, one: Object, event: str) -> Object:
        """Store a new version and tell the watchers."""
        self.version += 1
        api, kind = self.kinds[plural]
        one = {"apiVersion": api, "kind": kind, **copy.deepcopy(one)}
        one["metadata"] = {"uid": str(uuid.uuid4()), "creationTimestamp": "2026-11-25T00:00:00Z", **one["metadata"]}
        one["metadata"]["resourceVersion"] = str(self.version)
        self.store[plural, one["metadata"]["namespace"], one["metadata"]["name"]] = one
        for watcher in self.watchers:
            watcher.put_nowait({"type": event, "object": one})
        return one

    async def _render_error(self, exc: Exception) -> Any:
        if isinstance(exc, Refusal) and not exc.reason:  # a path that no API has: no Status, as from a real server
            return aiohttp.web.Response(status=exc.status, text=exc.message)
        return await super()._render_error(exc)

    def known(self, request: kmock.Request) -> str:
        plural = str(request.resource.plural)
        if plural not in self.kinds:
            raise Refusal(404, "", "404 page not found")
        return plural

    def there(self, request: kmock.Request) -> Object:
        plural = self.known(request)
        one = self.store.get((plural, request.namespace, request.name))
        if one is None:
            raise Refusal(404, "NotFound", f'{plural}.ray.io "{request.name}" not found')
        return one

    def matching(self, request: kmock.Request) -> list[Object]:
        plural, found = self.known(request), []
        for (kind, namespace, _), one in self.store.items():
            pairs = {**one["metadata"].get("labels", {}), "metadata.name": one["metadata"]["name"]}
            selectors = [
                part.split("=") for name in ("labelSelector", "fieldSelector") for part in request.params.get(name, "").split(",") if part
            ]
            if (kind, namespace) == (plural, request.namespace) and all(pairs.get(name) == value for name, value in selectors):
                found.append(one)
        return found

    async def on_list(self, request: kmock.Request) -> Object:
        items = [{name: value for name, value in one.items() if name not in ("apiVersion", "kind")} for one in self.matching(request)]
        return {"kind": "List", "metadata": {"resourceVersion": str(self.version)}, "items": items}

    async def on_watch(self, request: kmock.Request) -> AsyncIterator[Any]:
        queue: asyncio.Queue[Object] = asyncio.Queue()
        self.watchers.append(queue)
        since, name = int(request.params.get("resourceVersion", "0")), request.params["fieldSelector"].removeprefix("metadata.name=")
        kind = self.kinds[self.known(request)][1]
        yield b""
        for one in self.matching(request):
            if int(one["metadata"]["resourceVersion"]) > since:
                yield {"type": "MODIFIED", "object": one}
        ends = asyncio.get_running_loop().time() + float(request.params["timeoutSeconds"])
        while (left := ends - asyncio.get_running_loop().time()) > 0:
            try:
                event = await asyncio.wait_for(queue.get(), left)
            except TimeoutError:
                return
            if event["object"]["kind"] == kind and event["object"]["metadata"]["name"] == name:
                yield event

    async def on_fetch(self, request: kmock.Request) -> Object:
        return self.there(request)

    async def on_create(self, request: kmock.Request) -> Any:
        if request.resource.plural == "selfsubjectaccessreviews":
            raise NotImplementedError
        plural, one = self.known(request), copy.deepcopy(request.data)
        one["metadata"].setdefault("namespace", request.namespace)
        if (plural, request.namespace, one["metadata"]["name"]) in self.store:
            raise Refusal(409, "AlreadyExists", f'{plural}.ray.io "{one["metadata"]["name"]}" already exists')
        self.valid(one)
        return one if request.params.get("dryRun") == "All" else self.keep(plural, one, "ADDED")

    async def on_update(self, request: kmock.Request) -> Object:
        plural, change = self.known(request), yaml.safe_load(request.body)
        if request.headers["Content-Type"] == "application/apply-patch+yaml":
            self.valid(change)
            before = self.store.get((plural, request.namespace, request.name), {"metadata": {"namespace": request.namespace}})
            one = merged({key: value for key, value in before.items() if key != "spec"}, change)
        elif request.headers["Content-Type"] == "application/json-patch+json":
            one = copy.deepcopy(self.there(request))
            for step in change:
                assert step["op"] == "add"
                put(one, step["path"], step["value"])
        else:
            before = self.there(request)
            asked = change.get("metadata", {}).get("resourceVersion")
            if asked and asked != before["metadata"]["resourceVersion"]:
                raise Refusal(409, "Conflict", "the object has been modified; please apply your changes to the latest version")
            one = merged(before, change)
        return one if request.params.get("dryRun") == "All" else self.keep(plural, one, "MODIFIED")

    async def on_delete(self, request: kmock.Request) -> Object:
        one = self.there(request)
        del self.store[self.known(request), request.namespace, request.name]
        for watcher in self.watchers:
            watcher.put_nowait({"type": "DELETED", "object": one})
        return {"kind": "Status", "status": "Success"}

    def valid(self, one: Object) -> None:
        errors = crd_errors(one) if one["kind"].startswith("Ray") else core_errors(one)
        if errors:
            raise Refusal(422, "Invalid", f"{one['kind']} is invalid: {errors[0]}")


def merged(one: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return copy.deepcopy(change)
    found = dict(one) if isinstance(one, dict) else {}
    for name, value in change.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = merged(found.get(name), value)
    return found


def put(one: Any, path: str, value: Any) -> None:
    """RFC 6902's `add`, of a member of an object that is there."""
    *above, last = (int(part) if part.isdecimal() else part for part in path.strip("/").split("/"))
    for part in above:
        one = one[part]
    one[last] = value


class Api:
    """The tests' side: scripts answers, changes objects as a controller would, and reads the requests that came."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handler: Any = None
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._stop: asyncio.Event
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Api:
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    def _serve(self) -> None:
        async def main() -> None:
            self._stop = asyncio.Event()
            self.handler = Handler()
            async with self.handler, kmock.Server(self.handler) as server:
                self.url = str(server.url).rstrip("/")
                self._up.set()
                await self._stop.wait()

        self._loop.run_until_complete(main())

    def do(self, work: Callable[[Any], Any]) -> Any:
        """Run something on the server's own thread."""

        async def call() -> Any:
            return work(self.handler)

        coroutine: Coroutine[Any, Any, Any] = call()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def answer(self, criterion: str, *answers: Any, times: int | None = None) -> None:
        """Answer matching requests otherwise: a status, a body, headers; `times` of them, or all."""

        def script(handler: Any) -> None:
            view = handler[criterion] if times is None else handler[criterion][:times]
            for one in answers:
                view = view << one

        self.do(script)

    def put(self, plural: str, name: str, *, namespace: str = "default", **fields: Any) -> Object:
        """Make or change an object, as somebody else would."""

        def put(handler: Any) -> Object:
            before = handler.store.get((plural, namespace, name), {"metadata": {"name": name, "namespace": namespace}})
            kept: Object = handler.keep(plural, merged(before, fields), "MODIFIED")
            return kept

        found: Object = self.do(put)
        return found

    def get(self, plural: str, name: str, namespace: str = "default") -> Object | None:
        found: Object | None = self.do(lambda handler: copy.deepcopy(handler.store.get((plural, namespace, name))))
        return found

    def requests(self, method: str = "") -> list[str]:
        """`METHOD path` of what has been asked, in order."""
        every = self.do(lambda handler: [(request.method.value.upper(), request.url.path) for request in handler._requests])
        return [f"{verb} {path}" for verb, path in every if not method or verb == method]

    def kubeconfig(self, **contexts: str) -> Path:
        """A file with contexts by name, each with a namespace; the first is the current one."""
        contexts = contexts or {"here": "default"}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": next(iter(contexts)),
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [
                {"name": name, "context": {"cluster": "c", "user": "u", "namespace": namespace}} for name, namespace in contexts.items()
            ],
        }
        path = self.folder / "kubeconfig"
        path.write_text(yaml.safe_dump(document))
        return path


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A cluster whose kubeconfig is the current one; requests are asked again without waiting."""
    from danlu.k8s import client

    monkeypatch.setattr(client, "RETRY_S", 0.001)
    with Api(tmp_path) as found:
        config = found.kubeconfig()
        monkeypatch.setenv("KUBECONFIG", str(config))
        # The client reads the variable once, when it is imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        yield found
