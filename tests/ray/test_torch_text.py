"""The torch engine on a real Ray Serve, asked by OpenAI's client: what comes out is `model.generate`'s and PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import peft
import pytest
import torch
from lm import VOCABULARY, greedy, reference, write_adapter, write_family
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from danlu.artifact.bundle import BundleMeta, Lineage, Probe, write_bundle
from danlu.errors import ResourceError
from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.serve import app
from danlu.serve.engines.torch.forward import trial_row
from danlu.serve.keys import create_key
from danlu.spec.serve import Service
from danlu.spec.task import Pretrain

pytestmark = pytest.mark.usefixtures("ray_local")

MESSAGES: Any = [{"role": "user", "content": "the market price rose, 价格上涨"}]


def service(**fields: Any) -> Service:
    engine = {"kind": "torch", "dtype": "fp32", "kv_cache_memory_gb": 0.1} | fields.pop("engine", {})
    return Service.model_validate({"name": "tiny", "engine": engine, "http": {"port": 0}} | fields)


def test_a_model_and_its_adapter_answer_a_clients_chat_as_by_themselves(tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", "qwen3")
    tuned = write_adapter(base, tmp_path / "tuned", 1, r=4, target_modules="all-linear")
    secret = create_key(tmp_path / "keys.json", "ada")
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]

    def expected(model: PreTrainedModel) -> str:
        return tokenizer.decode(greedy(model, prompt, 24), skip_special_tokens=True)

    endpoint = app.run(
        service(
            engine={"model_name_or_path": str(base), "adapters": {"tuned": str(tuned)}},
            auth={"keys_file": str(tmp_path / "keys.json")},
        )
    )
    try:
        with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=secret, max_retries=0, timeout=60) as client:
            for name, model in (
                ("tiny", reference(base)),
                ("tuned", peft.PeftModel.from_pretrained(reference(base), tuned).eval()),
            ):
                stream = client.chat.completions.create(
                    model=name,
                    messages=MESSAGES,
                    temperature=0,
                    max_tokens=24,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                *chunks, last = list(stream)
                assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(model)
                assert chunks[-1].choices[0].finish_reason == "length"
                assert last.usage is not None
                assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), 24)
            assert [model.id for model in client.models.list()] == ["tiny", "tuned"]
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="another").chat.completions.create(model="tiny", messages=MESSAGES)
            with pytest.raises(openai.BadRequestError, match="128 positions"):
                client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1000, stream=True)
    finally:
        app.stop()


@pytest.mark.soak
def test_a_replica_whose_model_comes_to_nan_says_so_and_is_replaced(tmp_path: Path, wait_for: Callable[..., Any]) -> None:
    folder = write_family(tmp_path / "base", "qwen3", tie_word_embeddings=False)
    tried = trial_row(reference(folder))  # by the engine, before it serves
    sick = next(token for token in range(VOCABULARY - 1, 0, -1) if token not in tried)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][sick] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    endpoint = app.run(service(engine={"model_name_or_path": str(folder)}))
    try:
        with httpx.Client(base_url=endpoint.url, timeout=60) as client:

            def answer(*prompt: int) -> httpx.Response:
                return client.post("/v1/completions", json={"prompt": list(prompt), "max_tokens": 4, "temperature": 0})

            whole = answer(5, 6, 7).json()["choices"][0]["text"]
            broken = answer(5, sick)
            assert broken.status_code == 503
            assert "no numbers" in broken.json()["error"]["message"]
            replaced = wait_for("an answer of another replica", lambda: (found := answer(5, 6, 7)).status_code == 200 and found)
            assert replaced.json()["choices"][0]["text"] == whole
    finally:
        app.stop()


def test_the_engines_own_numbers_are_on_the_metrics_port(tmp_path: Path, metrics_port: Any, wait_for: Callable[..., Any]) -> None:
    base = write_family(tmp_path / "base", "qwen3")
    tuned = write_adapter(base, tmp_path / "tuned", 1, r=4, target_modules="all-linear")
    engine = {"model_name_or_path": str(base), "allow_runtime_lora_updating": True}
    endpoint = app.run(service(name="metered", engine=engine))

    def total(metric: Metric, **labels: str) -> float:
        return metrics_port.total(metric.exported, model="metered", **labels)

    try:
        for _ in range(3):
            asked = {"prompt": list(range(20, 60)), "max_tokens": 4}
            assert httpx.post(f"{endpoint.url}/v1/completions", json=asked, timeout=60).status_code == 200
        for path, status in ((str(tuned), 200), ("/nosuch", 400)):
            load = {"lora_name": path.rpartition("/")[2], "lora_path": path}
            assert httpx.post(f"{endpoint.url}/v1/load_lora_adapter", json=load, timeout=60).status_code == status
        wait_for("the tokens looked up", lambda: total(catalog.SERVE_PREFIX_QUERIED) == pytest.approx(120))
        wait_for("the tokens found", lambda: total(catalog.SERVE_PREFIX_HIT) == pytest.approx(78))
        again = {"prompt": [20, 21, 22, 23] * 8, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        assert httpx.post(f"{endpoint.url}/v1/completions", json=again, timeout=60).status_code == 200
        wait_for("what was guessed", lambda: total(catalog.SERVE_DRAFTED) >= total(catalog.SERVE_DRAFTED_RIGHT) > 0)
        wait_for("what runs its steps", lambda: catalog.SERVE_KERNELS.exported in metrics_port.samples())
        wait_for("the adapter", lambda: total(catalog.SERVE_ADAPTERS) == 1)
        for outcome in ("loaded", "failed"):
            wait_for(outcome, lambda outcome=outcome: total(catalog.SERVE_ADAPTER_LOADS, outcome=outcome) == pytest.approx(1))
    finally:
        app.stop()


@pytest.mark.soak
def test_a_bundle_that_does_not_answer_its_probes_is_not_served(tmp_path: Path) -> None:
    write_family(tmp_path / "model", "qwen3")
    text = "the market price"
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "model")(text)["input_ids"]])
    with torch.no_grad():
        loss = float(reference(tmp_path / "model")(ids, labels=ids).loss)
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    probes = [Probe(text=text, loss=loss + 0.1)]
    meta = BundleMeta(name="w", task=Pretrain(), labels=[], max_length=64, precision="fp32", probes=probes, lineage=lineage)
    write_bundle(tmp_path, meta)
    try:
        with pytest.raises(ResourceError, match=r"QualityError.*where the bundle's evaluation found"):
            app.run(service(bundle=str(tmp_path)))
    finally:
        app.stop()
