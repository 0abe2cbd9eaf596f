"""A service on a real Ray Serve: over HTTP it answers what was evaluated, refuses clearly, scales, and loses no request on the way."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import make_rows
from safetensors.numpy import load_file, save_file

from danlu import sdk
from danlu.artifact.bundle import FileDigest, file_digest, read_bundle, write_bundle
from danlu.errors import ModelError, ResourceError
from danlu.metrics import catalog
from danlu.serve import app
from danlu.serve.app import Endpoint
from danlu.spec.serve import Http, Service
from danlu.spec.train import TrainJob

pytestmark = pytest.mark.usefixtures("ray_local")
TEXTS = [row["text"] for row in make_rows(30, 5)]


def service_of(job: TrainJob, bundle: str, port: int = 0) -> Service:
    return job.service(bundle).model_copy(update={"http": Http(port=port)})


@pytest.fixture(scope="module")
def endpoint(ray_local: object, topics: TrainJob) -> Iterator[Endpoint]:
    """`topics@v1`, served."""
    yield app.run(service_of(topics, "topics@v1"))
    app.stop()


def classify(endpoint: Endpoint, **request: Any) -> httpx.Response:
    return httpx.post(f"{endpoint.url}/v1/classify", timeout=120, **request)


def test_a_port_in_use_is_an_error_that_says_so(topics: TrainJob) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"http.port: 127.0.0.1:{port} cannot be listened on: Address already in use\n  try: "):
            app.run(service_of(topics, "topics@v1", port=port))


def test_answers_are_the_bundles_predictions(endpoint: Endpoint, topics: TrainJob) -> None:
    expected = sdk.predict("topics@v1", TEXTS, storage=topics.storage)
    body = classify(endpoint, json={"model": "topics", "input": TEXTS}).json()
    assert [answer["label"] for answer in body["data"]] == [one.label for one in expected]
    np.testing.assert_allclose([answer["probs"] for answer in body["data"]], [one.probabilities for one in expected], atol=1e-5)
    assert len({answer["label"] for answer in body["data"]}) == 3


def test_requests_at_once_get_their_own_answers(endpoint: Endpoint, topics: TrainJob) -> None:
    expected = sdk.predict("topics@v1", TEXTS, storage=topics.storage)
    with ThreadPoolExecutor(8) as threads:
        responses = list(threads.map(lambda text: classify(endpoint, json={"input": text}), TEXTS))
    np.testing.assert_allclose([one.json()["data"][0]["probs"] for one in responses], [one.probabilities for one in expected], atol=1e-5)


def test_the_other_pages_are_there(endpoint: Endpoint) -> None:
    with httpx.Client(base_url=endpoint.url, timeout=60) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ready", "model": "topics"}
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["topics"]
        document = client.get("/openapi.json").json()
        assert document["paths"].keys() == {"/v1/classify", "/v1/models", "/v1/models/{model}", "/healthz", "/readyz"}
        page = client.get("/docs")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert client.get("/v1/nothing").status_code == 404
        assert client.get("/v1/models", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no text": ({"json": {"input": []}}, 400, "`input` is an empty list"),
    "an empty text": ({"json": {"input": ["wheat", ""]}}, 400, "`input[1]` is empty"),
    "10,000 texts": ({"json": {"input": ["a"] * 10_000}}, 413, "10000 texts in one request; the limit is 256"),
    "a megabyte of text": ({"json": {"input": "a" * 1_000_001}}, 413, "larger than 1,000,000 bytes"),
    "a form": ({"data": {"input": "wheat"}}, 415, "x-www-form-urlencoded"),
    "not JSON": ({"content": b"wheat", "headers": {"content-type": "application/json"}}, 400, "not JSON"),
    "another model": ({"json": {"model": "gpt", "input": "wheat"}}, 404, "there is no model 'gpt' here"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_in_openais_shape(name: str, endpoint: Endpoint) -> None:
    request, status, told = BAD[name]
    response = classify(endpoint, **request)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert told in error["message"]
    assert error["code"] == ("model_not_found" if name == "another model" else status)


def test_a_long_text_is_cut_and_answered(endpoint: Endpoint, topics: TrainJob) -> None:
    text = "wheat " * 100_000
    (expected,) = sdk.predict("topics@v1", [text], storage=topics.storage)
    body = classify(endpoint, json={"input": text}).json()
    np.testing.assert_allclose(body["data"][0]["probs"], expected.probabilities, atol=1e-5)
    assert body["usage"]["prompt_tokens"] == topics.model.max_length


def test_serving_shows_on_the_metrics_port(endpoint: Endpoint, metrics_port: Any, wait_for: Callable[..., Any]) -> None:
    answered = metrics_port.total(catalog.SERVE_INPUTS.exported, model="topics")
    for _ in range(3):
        assert classify(endpoint, json={"input": TEXTS[:7]}).status_code == 200
    assert classify(endpoint, json={"input": []}).status_code == 400
    wait_for("21 more texts", lambda: metrics_port.total(catalog.SERVE_INPUTS.exported, model="topics") >= answered + 21)
    good = {"model": "topics", "route": "/v1/classify", "status": "200"}
    wait_for("the requests", lambda: metrics_port.total(catalog.SERVE_REQUESTS.exported, **good) >= 3)
    wait_for("the refusal", lambda: metrics_port.total(catalog.SERVE_REFUSALS.exported, model="topics", reason="invalid_request_error"))
    wait_for("the batches", lambda: metrics_port.total(f"{catalog.SERVE_BATCH_ROWS.exported}_sum", model="topics") >= 21)
    assert endpoint.metrics_url == metrics_port.url


def test_a_bundle_that_is_not_there_is_an_error_before_anything_starts(topics: TrainJob) -> None:
    with pytest.raises(ModelError, match="'topics' has no 'v9'"):
        app.run(service_of(topics, "topics@v9"))


def test_a_second_service_or_port_beside_one_that_runs_is_refused(endpoint: Endpoint, topics: TrainJob) -> None:
    other = Service.model_validate({"name": "other", "engine": {"kind": "echo"}, "http": {"port": 0}})
    with pytest.raises(ResourceError, match="topics"):
        app.run(other)
    with pytest.raises(ResourceError, match=r"on port \d+ already, not on 1\n"):
        app.run(service_of(topics, "topics@v1", port=1))
    assert classify(endpoint, json={"input": TEXTS[0]}).json()["model"] == "topics"


def test_a_bundle_with_other_weights_is_refused_and_the_running_one_serves_on(endpoint: Endpoint, topics: TrainJob, tmp_path: Path) -> None:
    shutil.copytree(sdk.open_bundle("topics@v1", topics.storage).path, tmp_path / "tampered")
    weights = tmp_path / "tampered" / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"classifier.weight": -tensors["classifier.weight"]}, weights, metadata={"format": "pt"})
    with pytest.raises(ResourceError, match="is not what was written"):
        app.run(service_of(topics, str(tmp_path / "tampered")))
    # Even with digests that fit, the answers to the probes do not.
    write_bundle(tmp_path / "tampered", read_bundle_meta(tmp_path / "tampered"))
    with pytest.raises(ResourceError, match=r"topics did not start: .*QualityError.*where its evaluation answered") as raised:
        app.run(service_of(topics, str(tmp_path / "tampered")))
    assert "Traceback" not in str(raised.value)
    expected = sdk.predict("topics@v1", TEXTS[:1], storage=topics.storage)
    np.testing.assert_allclose(
        classify(endpoint, json={"input": TEXTS[0]}).json()["data"][0]["probs"], expected[0].probabilities, atol=1e-5
    )


def read_bundle_meta(folder: Path) -> Any:
    """What bundle.json says, with the digests of the files as they are now."""
    document = json.loads((folder / "bundle.json").read_text())
    for name in document["files"]:
        path = folder / name
        document["files"][name] = FileDigest(size=path.stat().st_size, sha256=file_digest(path)).model_dump()
    (folder / "bundle.json").write_text(json.dumps(document))
    return read_bundle(folder, verify=True).meta


def test_int8_takes_over_without_a_lost_request_and_answers_its_probes(endpoint: Endpoint, topics: TrainJob) -> None:
    statuses: Counter[int] = Counter()
    done = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(timeout=120) as client:
            while not done.is_set():
                statuses[client.post(f"{endpoint.url}/v1/classify", json={"input": TEXTS[0]}).status_code] += 1
                done.wait(0.05)

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(keep_asking) for _ in range(2)]
        try:
            updated = app.run(service_of(topics, "topics@v2"))
        finally:
            done.set()
        for one in asking:
            one.result()
    assert set(statuses) == {200}
    assert updated.url == endpoint.url
    bundle = sdk.open_bundle("topics@v2", topics.storage)
    assert bundle.meta.quantization is not None
    body = classify(endpoint, json={"input": [probe.text for probe in bundle.meta.probes]}).json()
    assert [answer["label"] for answer in body["data"]] == [probe.label for probe in bundle.meta.probes]
    np.testing.assert_allclose([a["probs"] for a in body["data"]], [probe.probabilities for probe in bundle.meta.probes], atol=1e-5)


def echo(latency_ms: float, **autoscaling: Any) -> Service:
    """A fake model with room for four requests at once."""
    return Service.model_validate(
        {
            "name": "echo",
            "engine": {"kind": "echo", "labels": ["even", "odd"], "latency_ms": latency_ms},
            "limits": {"max_ongoing_requests": 2, "max_queued_requests": 2},
            "autoscaling": autoscaling,
            "http": {"port": 0},
        }
    )


def running_replicas(name: str) -> int:
    from ray import serve

    states = serve.status().applications[name].deployments[name].replica_states
    return states.get("RUNNING", 0)


def test_replicas_follow_the_load_a_flood_is_told_to_come_back_and_stopping_answers_what_has_begun(
    wait_for: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    app.stop()
    with ThreadPoolExecutor(16) as threads:
        endpoint = app.run(echo(300.0, max_replicas=2, target_ongoing_requests=1.0, upscale_delay_s=0.5))
        assert classify(endpoint, json={"input": ["ab", "a"]}).json()["data"][1]["label"] == "odd"
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                classify(endpoint, json={"input": "ab"})

        loads = [threads.submit(load) for _ in range(3)]
        try:
            wait_for("a second replica", lambda: running_replicas("echo") == 2)
        finally:
            done.set()
        for one in loads:
            one.result()

        app.run(echo(4000.0))
        wait_for("one replica", lambda: running_replicas("echo") == 1)
        flood = [threads.submit(classify, endpoint, json={"input": "ab"}) for _ in range(16)]
        # Four are worked on for four seconds; the other twelve hear at once that there is no room.
        wait_for("twelve answers", lambda: sum(one.done() for one in flood) >= 12)
        app.stop()
        responses = [one.result() for one in flood]
    assert Counter(response.status_code for response in responses) == {200: 4, 503: 12}
    for response in responses:
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == 503
        else:
            assert response.json()["data"][0]["label"] == "even"
    assert "raylet" not in capfd.readouterr().out
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{endpoint.url}/healthz")
