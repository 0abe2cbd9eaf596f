"""`/v1/embeddings` as OpenAI's own client meets it, over a tiny encoder: texts or the ids that a client made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from conftest import make_rows
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from danlu.artifact.bundle import Bundle, BundleMeta, Lineage
from danlu.serve.engines.encoder import EncoderEngine
from danlu.serve.gateway import Gateway
from danlu.spec.serve import Encoder, Limits
from danlu.spec.task import Embed
from danlu.tasks.packed import PackedEmbedder
from danlu.tasks.predictor import Predictor

TEXTS = [row["text"] for row in make_rows(5, 4)]
MAX_LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def client(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, served: Callable[..., AbstractContextManager[str]]
) -> Iterator[openai.OpenAI]:
    task = Embed()
    model = PackedEmbedder(AutoModel.from_pretrained(tiny_model), pooling=task.pooling)
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    meta = BundleMeta(name="near", task=task, labels=[], max_length=MAX_LENGTH, precision="fp32", probes=[], lineage=lineage)
    predictor = Predictor(model, tokenizer, [], max_length=MAX_LENGTH, task=task)
    gateway = Gateway(EncoderEngine(Encoder(), Bundle(tiny_model, meta), predictor=predictor), "near", Limits(), lambda *_, **__: None)
    with served(gateway) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def vectors(client: openai.OpenAI, given: Any, **more: Any) -> np.ndarray:
    found = client.embeddings.create(model="near", input=given, **more)
    assert [one.index for one in found.data] == list(range(len(found.data)))
    return np.asarray([one.embedding for one in found.data])


def test_the_ids_of_a_text_give_the_texts_vector(client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = vectors(client, TEXTS)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    np.testing.assert_allclose(vectors(client, ids), expected, atol=1e-6)
    np.testing.assert_allclose(vectors(client, ids[0]), expected[:1], atol=1e-6)
    assert client.embeddings.create(model="near", input=ids).usage.prompt_tokens == sum(map(len, ids))
    bare = vectors(client, [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS])
    assert np.abs(bare - expected).max() > 1e-3, "nothing is put before or behind them"


def test_ids_that_the_model_does_not_read_are_refused_with_the_limit(client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    last = len(tokenizer) - 1
    assert len(vectors(client, [[last] * MAX_LENGTH])) == 1
    for given, param, told in (
        ([1] * (MAX_LENGTH + 1), "input", f"has 33 tokens; this model reads {MAX_LENGTH} at most"),
        ([[1], [1] * 99], "input[1]", "has 99 tokens"),
        ([1, last + 1], "input", f"ids of this model's own tokenizer, 0 to {last}"),
        ([[1], [10**12]], "input[1]", "check_embedding_ctx_length=False"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model="near", input=given)
        assert refused.value.param == param
        assert told in str(refused.value)
    assert len(vectors(client, ["wheat " * 99])) == 1, "a text is cut"


def test_a_vector_comes_as_text_as_numbers_and_shorter(client: openai.OpenAI) -> None:
    whole = vectors(client, TEXTS)  # which OpenAI's client asks for in base64
    np.testing.assert_allclose(vectors(client, TEXTS, encoding_format="float"), whole, atol=1e-6)
    short = vectors(client, TEXTS, dimensions=8)
    np.testing.assert_allclose(short, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match=f"vectors have {whole.shape[1]} numbers"):
        vectors(client, TEXTS, dimensions=whole.shape[1] + 1)
