"""The answers of an endpoint to a split's rows, as outputs that are scored like a bundle's own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from danlu.data.columns import Labelled
from danlu.data.encode import NO_TARGET
from danlu.errors import RequestError, ResourceError
from danlu.spec.task import Chat, LanguageTask, Preference, Pretrain
from danlu.tasks.preference import OTHER
from danlu.tasks.rows import Split

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


def write(
    url: str,
    texts: Sequence[str],
    *,
    model: str | None = None,
    api_key: str | None = None,
    batch: int = BATCH,
    timeout_s: float = 60.0,
) -> tuple[list[str], float]:
    """What an encoder-decoder's `POST /v1/completions` writes for each text; and the seconds."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    written: list[str] = []
    began = time.perf_counter()
    with httpx.Client(timeout=timeout_s, headers=headers) as client:
        for start in range(0, len(texts), batch):
            body: dict[str, object] = {"prompt": list(texts[start : start + batch])} | ({} if model is None else {"model": model})
            written += [choice["text"] for choice in _asked(client, f"{url.rstrip('/')}/v1/completions", body)["choices"]]
    return written, time.perf_counter() - began


@dataclass(frozen=True)
class Read:
    """`outputs`: of a chat each row's summed loss, hits and targets; of plain text its summed loss and targets; of a preference the log
    probabilities of its two answers. float64."""

    outputs: np.ndarray
    seconds: float


def row_losses(
    url: str, split: Split, task: LanguageTask, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 60.0
) -> Read:
    """What a served language model thinks of rows: `POST /v1/completions` with their token ids, `echo` and `logprobs`, and no new token."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    found = []
    began = time.perf_counter()
    with httpx.Client(timeout=timeout_s, headers=headers) as client:
        for index in range(len(split)):
            ids, targets = split.encoded.row(index), _targets(split, index)
            parts = [(ids, targets)]
            if isinstance(task, Preference):
                border = int((split.encoded.token_types(index) != OTHER).sum())
                parts = [(ids[:border], targets[:border]), (ids[border:], targets[border:])]
            sums = [_learned(client, url, part, aims, model) for part, aims in parts]
            match task:
                case Preference():
                    found.append([-sums[0][0], -sums[1][0]])
                case Chat():
                    found.append(list(sums[0]))
                case Pretrain():
                    found.append([sums[0][0], sums[0][2]])
                case _:
                    raise AssertionError(f"{task.kind} is not served")
    return Read(np.asarray(found, dtype=np.float64), time.perf_counter() - began)


def _targets(split: Split, index: int) -> np.ndarray:
    """Whether each token of a row is a target; the first has nothing before it."""
    if split.encoded.token_labels is None:
        return np.arange(len(split.encoded.row(index))) > 0
    return np.append(False, split.encoded.row_labels(index)[:-1] != NO_TARGET)


def _learned(client: httpx.Client, url: str, ids: np.ndarray, targets: np.ndarray, model: str | None) -> tuple[float, float, float]:
    """Summed loss of a row's targets, how many of them are the most probable token, and how many there are."""
    body: dict[str, object] = {"prompt": [int(token) for token in ids], "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    read = _asked(client, f"{url.rstrip('/')}/v1/completions", body if model is None else body | {"model": model})["choices"][0]["logprobs"]
    if len(read["token_logprobs"]) != len(ids):
        raise RequestError(
            f"the endpoint gives {len(read['token_logprobs'])} log probabilities of {len(ids)} tokens", where=url, fix="a Danlu service"
        )
    at = np.flatnonzero(targets)
    logprobs = np.asarray([read["token_logprobs"][i] for i in at], dtype=np.float64)
    best = np.asarray([max(read["top_logprobs"][i].values()) for i in at], dtype=np.float64)
    return float(-logprobs.sum()), float((logprobs >= best).sum()), float(len(at))


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
