"""The answers of an endpoint to a split's rows, as outputs that are scored like a bundle's own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from danlu.data.columns import Labelled
from danlu.errors import RequestError, ResourceError

BATCH = 32
MAX_TRIES = 6


def classify(
    url: str,
    texts: Labelled,
    label_names: Sequence[str],
    *,
    model: str | None = None,
    api_key: str | None = None,
    batch: int = BATCH,
    timeout_s: float = 60.0,
) -> tuple[np.ndarray, float]:
    """Logarithms of the probabilities of `POST /v1/classify`, float64 [rows, labels] in the order of `label_names`; and the seconds.

    Their softmax is the probabilities, so every metric of logits is theirs. A busy endpoint (429, 503) is asked again as it asks for.
    """
    outputs = np.empty((len(texts.texts), len(label_names)))
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    began = time.perf_counter()
    with httpx.Client(timeout=timeout_s, headers=headers) as client:
        for start in range(0, len(texts.texts), batch):
            rows = range(start, min(start + batch, len(texts.texts)))
            items = [{"text": texts.texts[i], "text_pair": texts.pairs[i]} if texts.pairs else texts.texts[i] for i in rows]
            body: dict[str, object] = {"input": items} if model is None else {"model": model, "input": items}
            answer = _asked(client, f"{url.rstrip('/')}/v1/classify", body)
            if start == 0:
                _check_labels(answer["labels"], label_names, url)
                order = [answer["labels"].index(name) for name in label_names]
            for i, found in zip(rows, answer["data"], strict=True):
                outputs[i] = np.asarray(found["probs"], dtype=np.float64)[order]
    # Probabilities are rounded on the way: what has none left is improbable, not impossible.
    return np.log(np.maximum(outputs, 1e-12)), time.perf_counter() - began


def _asked(client: httpx.Client, url: str, body: dict[str, object]) -> dict[str, Any]:
    for attempt in range(MAX_TRIES):
        try:
            response = client.post(url, json=body)
        except httpx.HTTPError as error:
            raise ResourceError(
                f"the endpoint does not answer: {type(error).__name__}: {error}", where=url, fix="check the address; is it serving?"
            ) from error
        if response.status_code not in (429, 503) or attempt + 1 == MAX_TRIES:
            break
        time.sleep(min(float(response.headers.get("retry-after", 2**attempt / 4)), 30.0))
    if response.status_code != 200:
        raise RequestError(
            f"the endpoint answers {response.status_code}: {response.text[:300]}",
            status=response.status_code,
            where=url,
            fix="--api-key, or --model with a name from GET /v1/models" if response.status_code in (401, 403, 404) else "",
        )
    found: dict[str, Any] = response.json()
    return found


def _check_labels(found: object, label_names: Sequence[str], url: str) -> None:
    if not isinstance(found, list) or set(found) != set(label_names):
        raise RequestError(
            f"the endpoint's labels are {found}, the rows' {list(label_names)}", where=url, fix="the bundle that the endpoint serves"
        )
